"""How often a solve waits for a device: what is read of one, and what the later looks change.

The code for devices that one waits for runs here on the CPU, where waiting takes no time.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_grad import CG, Jacobi, Status
from implicit_grad._linear_solvers import base, cg, cg_batched
from implicit_grad._linear_solvers.base import Operator

F64 = torch.float64


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor counts as one on a device that is waited for."""
    for module in (base, cg, cg_batched):
        monkeypatch.setattr(module, "waited_for", lambda x: True)


class Reads(TorchDispatchMode):
    """Counts numbers that are read one by one, and lists that are read at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        plain = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda x: (self._note(), plain(x))[1])

    def _note(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self._note()
        return function(*args, **kwargs or {})


def system(n: int = 40, least: float = 1.0, number: float | None = None) -> tuple[Operator, Tensor]:
    """A system with a scale for each element, or one that is a number."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=F64))[0]
    matrix = basis @ torch.diag(torch.linspace(least, 50, n, dtype=F64)) @ basis.T
    each = torch.rand(n, generator=random, dtype=F64) + 0.5
    scale = each if number is None else number
    rhs = torch.randn(n, generator=random, dtype=F64)
    return Operator(lambda x: matrix @ x, lambda x: matrix @ x, scale), rhs


def per_iteration(monkeypatch: pytest.MonkeyPatch, **options: object) -> float:
    """Reads that an iteration adds."""
    operator, rhs = system()
    few, many = 2, 10
    counts = []
    for maxiter in (few, many):
        with Reads(monkeypatch) as reads:
            found = CG(maxiter=maxiter, **options).solve(operator, rhs, verify=False)
        assert found.iterations == maxiter
        counts.append(reads.count)
    return (counts[1] - counts[0]) / (many - few)


def test_an_iteration_of_a_fixed_budget_waits_once(waiting, monkeypatch):
    assert per_iteration(monkeypatch) == 1


def test_an_iteration_to_a_tolerance_waits_twice(waiting, monkeypatch):
    assert per_iteration(monkeypatch, rtol=1e-12) == 2


SOLVERS = {
    "budget": CG(maxiter=7),
    "tolerance": CG(rtol=1e-10),
    "preconditioned": CG(maxiter=7, preconditioner=lambda r: r / 20),
    "Jacobi": CG(maxiter=7, preconditioner=Jacobi()),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("least", [1.0, -20.0], ids=["definite", "indefinite"])
@pytest.mark.parametrize("number", [None, 0.25], ids=["scale per element", "scale"])
def test_the_solutions_are_the_same(name, least, number, request):
    operator, rhs = system(least=least, number=number)
    expected = SOLVERS[name].solve(operator, rhs)
    request.getfixturevalue("waiting")
    found = SOLVERS[name].solve(operator, rhs)
    assert (found.status, found.iterations) == (expected.status, expected.iterations)
    assert float((found.x - expected.x).norm() / expected.x.norm()) < 1e-12
    told = torch.tensor(found.coefficients) - torch.tensor(expected.coefficients)
    assert not told.numel() or float(told.abs().max()) < 1e-10


def test_a_budget_that_more_than_suffices_costs_one_product_more(waiting):
    count = 0

    def product(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return 3 * x

    found = CG(maxiter=9).solve(Operator(product, product), torch.ones(5, dtype=F64), verify=False)
    assert found.status is Status.CONVERGED and found.iterations == count == 2
    assert torch.equal(found.x, torch.ones(5, dtype=F64) / 3)


def test_a_preconditioner_that_is_none_is_told_late_as_well(waiting):
    operator, rhs = system()
    answers = iter([1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    cg_ = CG(maxiter=5, preconditioner=lambda r: r * next(answers))
    assert cg_.solve(operator, rhs, verify=False).status is Status.BAD_PRECONDITIONER


def test_products_that_are_not_finite_are_told(waiting):
    found = CG(maxiter=5).solve(Operator(lambda x: x * torch.nan, None), torch.ones(3))
    assert found.status is Status.NONFINITE_OPERATOR and bool(found.x.isnan().all())
