"""The faults of ../shared/reliability.md §1, row by row: what the user sees, and what stays.

Each row builds a problem, tells `user.owns(...)` what belongs to the user, provokes the fault and
checks the exception, the status or the value. When it returns, all that the user owns, and torch's
own state, must be bitwise what it was. Where the library promises something else than the row's
column "we must", the docstring says so after "Deviation:".
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import learn2learn as l2l
import pytest
import torch
from fingerprint import differences, fingerprint
from problems import in_threads, minimize, normal, prox
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import implicit_grad as ig
from implicit_grad._theorem.implicit_function import ImplicitFunction

pytestmark = pytest.mark.usefixtures("double_precision")

STYLES = ("tensor", "closure")
Status = ig.Status


class User:
    """The owner of tensors and modules, who compares them before and after."""

    def __init__(self) -> None:
        self.property: tuple[Any, ...] = ()
        self._before: dict[str, Any] | None = None

    def owns(self, *things: Any) -> None:
        """From here on, nothing about these things, or about torch's state, may change."""
        if self._before is not None:
            self.check()
        self.property = (*self.property, *things)
        self._before = fingerprint(*self.property)

    @contextlib.contextmanager
    def acts(self) -> Iterator[None]:
        """What the body changes is the user's doing, such as a model's forward in train mode."""
        self.owns()
        yield
        self._before = fingerprint(*self.property)

    def check(self) -> None:
        """Compare."""
        assert self._before is not None, "the row does not say what the user owns"
        changed = differences(self._before, fingerprint(*self.property))
        assert not changed, f"changed: {changed}"


Row = Callable[[User], None]
ROWS: dict[int, tuple[str, Row]] = {}
ON_GPU: dict[int, tuple[str, Row]] = {}


def row(number: int, name: str, table: dict[int, tuple[str, Row]] = ROWS) -> Callable[[Row], Row]:
    """Enter a function as a row of the table."""

    def enter(function: Row) -> Row:
        assert number not in table
        table[number] = name, function
        return function

    return enter


def ids(table: dict[int, tuple[str, Row]]) -> list[Any]:
    return [pytest.param(f, id=f"{n:02d} {name}") for n, (name, f) in sorted(table.items())]


# ---------------------------------------------------------------- what the rows share


def quadratic(matrix: Tensor, **options: Any) -> ig.ImplicitSolver:
    """b ↦ argmin φᵀMφ/2 − bᵀφ, so that the gradient is M⁻¹v."""

    def objective(phi: Tensor, b: Tensor) -> Tensor:
        return phi @ (matrix.to(phi) @ phi) / 2 - b @ phi

    def solver(b: Tensor) -> Tensor:
        return torch.linalg.solve(matrix.double(), b.double()).to(b)

    return ig.implicit(solver, ig.argmin(objective), **options)


def pulled(solve_for: Callable[..., Tensor], b: Tensor, v: Tensor) -> Tensor:
    """The gradient for a cotangent that is given outright."""
    return grad(solve_for(b), b, v)[0]


def diagonal(*entries: float) -> Tensor:
    return torch.diag(torch.tensor(entries))


LAM = 0.5


def loss(phi: Tensor, X: Tensor) -> Tensor:
    return (X @ phi).square().sum() / 2 + (phi**4).sum() / 4


def good(theta: Tensor, X: Tensor) -> Tensor:
    return minimize(lambda phi: loss(phi, X) + prox(phi, theta, LAM), theta)


CONDITION = ig.proximal(loss, LAM)


def problem() -> tuple[Tensor, Tensor]:
    return normal(3, seed=1), normal(4, 3, seed=2, grad=False)


def expected_at(theta: Tensor, X: Tensor) -> Tensor:
    """(H + λ)⁻¹ λ 1, by a dense solve."""
    phi = good(theta.detach(), X)
    hessian = torch.autograd.functional.hessian(lambda p: loss(p, X), phi)
    return torch.linalg.solve(hessian + LAM * torch.eye(3), LAM * torch.ones(3))


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual, expected)


def made(build: Callable[[], Any]) -> Any:
    """A module with the same weights every time, and no trace on torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build()


def network(*extra: nn.Module) -> nn.Sequential:
    return made(lambda: nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1)))


def learner_of(model: nn.Module, lam: Any = 20.0, lr: float = 0.01, **options: Any) -> Any:
    """A clone, ready to adapt, with a linear solve to rounding error."""
    options = {"linear_solver": ig.CG(rtol=1e-13), "on_failure": "raise", **options}
    theirs = {k: options.pop(k) for k in ("allow_unused", "allow_nograd") if k in options}
    return ig.imaml(l2l.algorithms.MAML(model, lr=lr, **theirs), lam=lam, **options).clone()


def adapt(learner: Any, criterion: Callable[[], Tensor], style: str, steps: int = 1) -> None:
    if style == "closure":
        learner.adapt(criterion, steps=steps)
        return
    for _ in range(steps):
        learner.adapt(criterion())


def batch(seed: int = 5, inputs: int = 3) -> tuple[Tensor, Tensor]:
    return normal(6, inputs, seed=seed, grad=False), normal(6, 1, seed=seed + 50, grad=False)


def in_module(module: nn.Module, X: Tensor, criterion: Callable[[Tensor], Tensor]) -> Any:
    """phi ↦ a loss of the module's output under the parameters phi."""
    return lambda phi: criterion(functional_call(module, phi, (X,)))


def cotangents(parameters: Any) -> list[Tensor]:
    return [normal(*p.shape, seed=i, grad=False).to(p) for i, p in enumerate(parameters)]


def wavy(output: Tensor) -> Tensor:
    return output.sin().sum() + output.square().sum() / 4


def gradients_in(
    module: nn.Module, X: Tensor, curvature: Any = "auto", lam: float = 30.0
) -> tuple[tuple[Tensor, ...], str]:
    """Gradients with respect to a module's parameters around 0.9 θ, and what A was made of."""
    monitor = ig.Monitor()
    theta = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    solve = ig.implicit(
        lambda theta: {k: 0.9 * t for k, t in theta.items()},
        ig.proximal(in_module(module, X, wavy), lam),
        linear_solver=ig.CG(rtol=1e-13),
        curvature=curvature,
        monitor=monitor,
        on_failure="ignore",
    )
    phi = solve(theta)
    found = grad(list(phi.values()), list(theta.values()), cotangents(phi.values()))
    assert monitor.last is not None and monitor.last.status in (
        Status.CONVERGED,
        Status.STAGNATED,
        Status.INNER_NOT_STATIONARY,
    )
    return found, monitor.last.curvature


def dense_gradients_in(module: nn.Module, X: Tensor, lam: float = 30.0) -> list[Tensor]:
    """The same by torch's dense Hessian, with the buffers as they are for each evaluation."""
    names, values = zip(*module.named_parameters(), strict=True)
    sizes = [p.numel() for p in values]

    def split(vector: Tensor) -> list[Tensor]:
        parts = vector.split(sizes)
        return [part.view_as(p) for part, p in zip(parts, values, strict=True)]

    def value(vector: Tensor) -> Tensor:
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        weights = dict(zip(names, split(vector), strict=True))
        return wavy(functional_call(module, {**weights, **buffers}, (X,)))

    phi = torch.cat([0.9 * p.detach().flatten() for p in values])
    v = torch.cat([t.flatten() for t in cotangents(values)])
    hessian = torch.autograd.functional.hessian(value, phi)
    return split(torch.linalg.solve(hessian + lam * torch.eye(len(phi)), lam * v))


def all_near(actual: Any, expected: Any, tolerance: float) -> None:
    actual, expected = (torch.cat([t.flatten() for t in ts]) for ts in (actual, expected))
    near(actual, expected, tolerance)


# ---------------------------------------------------------------- 1a. numerics of the solve


@row(1, "p·Ap = 0")
def vanishing_curvature(user: User) -> None:
    b, v = normal(2), torch.ones(2)
    user.owns(b, v)
    monitor = ig.Monitor()
    solve = quadratic(diagonal(-1, 1), monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature at phi"):
        found = pulled(solve, b, v)
    assert monitor.last.status == Status.NEGATIVE_CURVATURE and monitor.last.min_curvature == 0
    assert torch.equal(found, v)  # no direction was good: v itself, first-order MAML
    # one good direction and then a vanishing one: the last iterate that is finite and downhill
    v = torch.tensor([1.0, 1.0, 4.0])
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature"):
        found = pulled(quadratic(diagonal(-1, 1, 2)), normal(3), v)
    assert found.isfinite().all() and v @ found > 0
    minres = quadratic(diagonal(-1, 1), linear_solver=ig.MINRES(), on_failure="ignore")
    near(pulled(minres, b, torch.ones(2)), torch.tensor([-1.0, 1.0]))


@row(2, "an indefinite A")
def indefinite(user: User) -> None:
    b, v, matrix = normal(3), torch.ones(3), diagonal(-1 + 1e-6, 1, 2)
    user.owns(b, v)
    monitor = ig.Monitor()
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature at phi"):
        found = pulled(quadratic(matrix, monitor=monitor), b, v)
    assert monitor.last.status == Status.NEGATIVE_CURVATURE and monitor.last.min_curvature < 0
    assert v @ found > 0 and found.norm() <= v.norm() * (1 + 1e-12)
    # one product alone cannot see it; then the residual tells
    one = quadratic(matrix, linear_solver=ig.CG(maxiter=1), monitor=monitor)
    near(pulled(one, b, v), torch.full((3,), 1.5), 1e-5)
    assert monitor.last.status == Status.TRUNCATED and monitor.last.linear_residual > 1
    refusing = quadratic(matrix, on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match=r"non-positive curvature.*min_curvature -"):
        pulled(refusing, b, v)


@row(3, "NaN in the incoming gradient")
def nan_comes_in(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model, x, y)
    v = torch.tensor([1.0, float("nan"), 1.0])
    monitor = ig.Monitor()
    solve = ig.implicit(good, CONDITION, monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match="incoming gradient holds NaN or Inf"):
        assert grad(solve(theta, X), theta, v)[0].isnan().all()
    assert monitor.last.status == Status.NONFINITE_RHS and monitor.last.products == 0
    for style in STYLES:
        learner = learner_of(model, on_failure="ignore")
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        found = grad(learner(x).sum() * float("nan"), list(model.parameters()))
        assert all(g.isnan().all() for g in found)


SIZES = {
    torch.float16: (300.0, 1e-4),  # the squares of these over- and underflow in these dtypes
    torch.float32: (1e20, 1e-23),
    torch.float64: (1e200, 1e-200),
}


def sized(user: User, which: int) -> None:
    for dtype, sizes in SIZES.items():
        b = torch.ones(2, dtype=dtype, requires_grad=True)
        v = torch.tensor([1.0, -1.0], dtype=dtype) * sizes[which]
        user.owns(b, v)
        assert v.square().sum() in (float("inf"), 0.0) or (dtype == torch.float16 and which)
        monitor = ig.Monitor()
        found = pulled(quadratic(diagonal(2, 3), monitor=monitor, on_failure="raise"), b, v)
        eps = torch.finfo(dtype).eps
        near(found, v / torch.tensor([2.0, 3.0], dtype=dtype), 4 * eps if which == 0 else 2e-3)
        assert monitor.last.status == Status.CONVERGED


@row(4, "Inf in the incoming gradient, or its square overflows")
def large(user: User) -> None:
    sized(user, 0)
    b = normal(2)
    user.owns(b)
    solve = quadratic(diagonal(2, 3), on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match="NaN or Inf") as caught:
        pulled(solve, b, torch.tensor([1.0, float("inf")]))
    assert caught.value.report.status == Status.NONFINITE_RHS


@row(5, "the square of the incoming gradient underflows")
def small(user: User) -> None:
    sized(user, 1)


@row(6, "a zero incoming gradient")
def zero_comes_in(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model)
    monitor = ig.Monitor()
    solve = ig.implicit(good, CONDITION, monitor=monitor, on_failure="raise")
    (found,) = grad(solve(theta, X), theta, torch.zeros(3))
    assert torch.equal(found, torch.zeros(3)) and not found.signbit().any()
    assert (monitor.last.status, monitor.last.products) == (Status.ZERO_RHS, 0)
    for style in STYLES:
        learner = learner_of(model, monitor=monitor)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        found = grad(0.0 * learner(x).sum(), list(model.parameters()))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in found)
        assert (monitor.last.status, monitor.last.products) == (Status.ZERO_RHS, 0)


@row(7, "NaN in the Hessian")
def nan_in_the_hessian(user: User) -> None:
    theta = normal(3)
    user.owns(theta)
    condition = ig.argmin(lambda phi, theta: (phi - theta).square().sum(dim=0).sqrt())
    monitor = ig.Monitor()
    solve = ig.implicit(torch.clone, condition, monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match=r"gave NaN or Inf.*sqrt or norm at 0"):
        assert grad(solve(theta).sum(), theta)[0].isnan().all()
    assert monitor.last.status == Status.NONFINITE_OPERATOR


@row(8, "condition number 1e6")
def badly_conditioned(user: User) -> None:
    """The status is honest in every dtype.

    Deviation: the default budget is min(10 n, 1000) iterations, and 5 for `imaml`; "10 to 20" is
    for the caller to ask for.
    """
    basis, _ = torch.linalg.qr(normal(200, 200, grad=False))
    matrix = basis @ torch.diag(torch.logspace(-6, 0, 200)) @ basis.T
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stored, v = matrix.to(dtype), normal(200, seed=1, grad=False).to(dtype)
        theta = torch.zeros(200, dtype=dtype, requires_grad=True)
        user.owns(theta, v)
        condition = ig.argmin(lambda phi, b: phi @ (stored @ phi) / 2 - b @ phi)  # noqa: B023
        for cg in (ig.CG(rtol=1e-5), ig.CG(rtol=1e-5, maxiter=20), ig.CG(maxiter=20)):
            monitor = ig.Monitor()
            solve = ig.implicit(
                torch.clone, condition, linear_solver=cg, monitor=monitor, on_failure="ignore"
            )
            (u,) = grad(solve(theta), theta, v)
            report = monitor.last
            if dtype != torch.bfloat16:  # there, u is rounded once more
                residual = stored.double() @ u.double() - v.double()
                true = float(residual.norm() / v.double().norm())
                floor = 20 * torch.finfo(dtype).eps * float(u.norm() / v.norm())
                assert abs(report.linear_residual - true) <= 1e-3 * true + floor
            assert report.iterations <= (cg.maxiter or 1000)
            if report.status == Status.CONVERGED:
                eps = torch.finfo(dtype).eps
                assert report.linear_residual <= 2 * max(1e-5, 10 * eps)
            else:
                assert report.status in (
                    Status.TRUNCATED if cg.rtol is None else Status.MAX_ITER,
                    Status.STAGNATED,
                    Status.NEGATIVE_CURVATURE,  # rounding in bfloat16 makes the matrix indefinite
                )
                assert dtype == torch.bfloat16 or report.status != Status.NEGATIVE_CURVATURE
        with pytest.warns(ig.ImplicitGradWarning, match="ran out of iterations|non-positive"):
            few = ig.CG(rtol=1e-5, maxiter=3)
            grad(ig.implicit(torch.clone, condition, linear_solver=few)(theta), theta, v)


@row(9, "a non-symmetric operator")
def not_symmetric(user: User) -> None:
    """CG is refused for it when the solver is wrapped.

    Deviation: no probe for symmetry in backward. ∂F/∂φ of an objective is symmetric as torch takes
    it; `root` and `fixed_point` are known to be general, and CG does not go with them.
    """
    matrix, b, v = torch.tensor([[1.0, 2.0], [-2.0, 1.0]]), normal(2), torch.tensor([1.0, 1.0])
    user.owns(matrix, b, v)
    condition = ig.root(lambda phi, b: matrix @ phi - b)

    def solver(b: Tensor) -> Tensor:
        return torch.linalg.solve(matrix, b)

    for linear_solver in (ig.CG(), ig.MINRES()):
        for general in (condition, ig.fixed_point(lambda phi, b: phi - matrix @ phi + b)):
            with pytest.raises(ig.InvalidArgumentError, match="needs a symmetric system"):
                ig.implicit(solver, general, linear_solver=linear_solver)
    for linear_solver in (None, ig.NormalCG(), ig.Exact()):
        solve = ig.implicit(solver, condition, linear_solver=linear_solver, on_failure="raise")
        near(pulled(solve, b, v), matrix.T.inverse() @ v)


@row(10, "an absolute tolerance and a scaled loss")
def scaled_loss(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model)
    solve = ig.implicit(good, CONDITION, on_failure="raise")
    phi, v = solve(theta, X), normal(3, seed=9, grad=False)
    learner = learner_of(model, linear_solver=ig.CG(maxiter=5))
    adapt(learner, lambda: mse_loss(learner(x), y), "tensor")
    outer, parameters = mse_loss(learner(x + 1), y), list(model.parameters())
    for k in (-40, -16, 16, 40):
        scale = 2.0**k
        first, second = (grad(phi, theta, s * v, retain_graph=True)[0] for s in (1.0, scale))
        assert torch.equal(scale * first, second)
        first, second = (grad(s * outer, parameters, retain_graph=True) for s in (1.0, scale))
        assert all(torch.equal(scale * a, b) for a, b in zip(first, second, strict=True))


@row(11, "a parameter without dimensions")
def without_dimensions(user: User) -> None:
    theta = torch.tensor(2.0, requires_grad=True)
    user.owns(theta)
    condition = ig.proximal(lambda phi: 1.5 * phi**2, 1.0)  # φ = θ/4
    for linear_solver in (ig.CG(), ig.NormalCG(), ig.MINRES(), ig.Exact()):
        solve = ig.implicit(
            lambda t: t / 4, condition, linear_solver=linear_solver, on_failure="raise"
        )
        near(grad(solve(theta), theta)[0], torch.tensor(0.25), 1e-15)


@row(12, "complex parameters")
def complex_parameters(user: User) -> None:
    """Refused by name as φ or θ; complex data have their gradient."""
    z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    model = nn.Linear(2, 1, dtype=torch.complex128)
    user.owns(z, model)
    modulus = ig.argmin(lambda p, z: ((p - z.abs() ** 2) ** 2).sum())
    with pytest.raises(ig.InvalidSolutionError, match=r"floating-point tensor.*complex128"):
        ig.implicit(lambda z: z / 2, modulus)(z)
    with pytest.raises(
        ig.InvalidArgumentError, match=r"theta.*floating-point tensors only.*complex"
    ):
        ig.imaml(l2l.algorithms.MAML(model, lr=0.1)).clone()
    near(grad(ig.implicit(lambda z: z.abs() ** 2, modulus)(z).sum(), z)[0], 2 * z.detach())


@row(13, "a loss linear in phi")
def linear_loss(user: User) -> None:
    """g = v after one product: CG does not know beforehand that H = 0, and says CONVERGED."""
    theta, c, v = normal(3, seed=1), normal(3, seed=2), normal(3, seed=3, grad=False)
    user.owns(theta, c, v)
    cases = {
        "linear": lambda phi, c: c @ phi,
        "constant": lambda phi, c: c.sum(),
        "without a graph": lambda phi, c: torch.tensor(1.0),
    }
    for function in cases.values():
        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda t, c, f=function: t - (c if f is cases["linear"] else 0) / 2,
            ig.proximal(function, 2.0),
            monitor=monitor,
            on_failure="raise",
        )
        near(grad(solve(theta, c), theta, v)[0], v, 1e-15)
        assert monitor.last.status == Status.CONVERGED and monitor.last.products <= 2


@row(14, "tolerances below the precision of the dtype")
def below_the_floor(user: User) -> None:
    """rtol counts as at least 10 eps; a residual above that is STAGNATED, not CONVERGED."""
    b = torch.zeros(30, dtype=torch.float32, requires_grad=True)
    user.owns(b)
    eps, errors, statuses = torch.finfo(torch.float32).eps, [], set()
    for seed in range(20):
        basis, _ = torch.linalg.qr(normal(30, 30, seed=seed, grad=False))
        matrix = (basis @ torch.diag(torch.logspace(-2, 0, 30)) @ basis.T).float()
        v, monitor = normal(30, seed=seed, grad=False).float(), ig.Monitor()
        solve = quadratic(
            (matrix + matrix.T) / 2,
            linear_solver=ig.CG(rtol=1e-15),
            monitor=monitor,
            on_failure="ignore",
        )
        u = pulled(solve, b, v).double()
        report = monitor.last
        assert report.status in (Status.CONVERGED, Status.STAGNATED)
        statuses.add(report.status)
        if report.status == Status.CONVERGED:
            assert report.linear_residual <= 2 * 10 * eps
        exact = torch.linalg.solve((matrix + matrix.T).double() / 2, v.double())
        errors.append(float((u - exact).norm() / exact.norm()))
    assert max(errors) < 100 * 10 * eps and Status.CONVERGED in statuses


# ---------------------------------------------------------------- 1b. model and loss


def adapted_loss(
    user: User, model: nn.Module, style: str, **options: Any
) -> tuple[Any, Tensor, list[Tensor]]:
    """A learner after a step, its outer loss, and θ; from here on the model is owned."""
    user.owns(model)
    with user.acts():
        (x, y), learner = batch(), learner_of(model, **options)
        adapt(learner, lambda: mse_loss(learner(x), y), style)
        outer = mse_loss(learner(x + 1), y)
    user.owns(learner.module)
    return learner, outer, list(model.parameters())


@row(15, "BatchNorm in train mode")
def batch_norm(user: User) -> None:
    model = network(nn.BatchNorm1d(4)).train()
    for style in STYLES:
        _, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
        grad(outer, parameters, retain_graph=True)
    user.check()
    statistics = model[1].running_mean.clone()
    gradients_in(model, batch()[0], lam=300.0)  # F leaves them alone in forward, too
    assert torch.equal(model[1].running_mean, statistics)


@row(16, "eval() between forward and backward")
def other_mode(user: User) -> None:
    for style in STYLES:
        found, before = [], torch.get_rng_state()
        for flip in (False, True):
            model = network(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
            if flip:
                with user.acts():
                    torch.set_rng_state(before)
            learner, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
            with user.acts():
                learner.train(not flip), model.train(not flip)
            found.append(grad(outer, parameters))
        assert all(map(torch.equal, *found))
        user.owns()


@row(17, "dropout")
def dropout(user: User) -> None:
    theta = normal(30, seed=1)
    user.owns(theta)
    masks: list[Tensor] = []

    def masked(phi: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(30), 0.5))
        return (masks[-1] * phi**4).sum()

    for maxiter, tolerance in ((5, 5e-2), (20, 1e-7), (60, 1e-13)):
        masks.clear()
        solve = ig.implicit(
            torch.clone,
            ig.proximal(masked, 20.0),
            linear_solver=ig.CG(maxiter=maxiter),
            on_failure="ignore",
        )
        (found,) = grad(solve(theta).sum(), theta)
        assert len(masks) == 1  # one evaluation of F, so one mask, for all products
        near(found, 20 / (20 + 12 * masks[0] * theta.detach() ** 2), tolerance)


@row(18, "random numbers")
def random_numbers(user: User) -> None:
    theta = normal(3, seed=1)

    def solver(theta: Tensor) -> Tensor:
        return theta + torch.rand(3)

    def noisy(phi: Tensor) -> Tensor:
        return nn.functional.dropout(phi, 0.5).square().sum()

    solve = ig.implicit(solver, ig.proximal(noisy, 1.0), on_failure="ignore")
    torch.manual_seed(7)
    solver(theta)
    drawn_by_the_solver = torch.get_rng_state()
    torch.manual_seed(7)
    phi = solve(theta)
    assert torch.equal(torch.get_rng_state(), drawn_by_the_solver)
    user.owns(theta)
    grad(phi.sum(), theta, create_graph=True)[0].sum().backward(inputs=[phi])
    for style in STYLES:
        model = network(nn.Dropout(0.5))
        _, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
        grad(outer, parameters)


@row(19, "spectral_norm")
def power_iteration(user: User) -> None:
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = made(lambda: nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))  # noqa: B023
        model.train()
        with torch.no_grad():
            model(batch()[0])
        user.owns(model)
        x, _ = batch()
        all_near(gradients_in(model, x)[0], dense_gradients_in(model, x), 1e-10)


@row(20, "forward hooks")
def forward_hooks(user: User) -> None:
    """F is evaluated, and so the hooks run, once in forward; backward runs none."""
    model, calls = network(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    user.owns(model)
    x, y = batch()
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    condition = ig.proximal(in_module(model, x, lambda out: mse_loss(out, y)), 2.0)
    phi = ig.implicit(lambda t: t, condition, on_failure="ignore")(theta)
    assert len(calls) == 1
    grad(phi["0.weight"].sum(), list(theta.values()), retain_graph=True)
    assert len(calls) == 1
    for style, expected in (("tensor", 1), ("closure", 2)):  # F once more, at the solution
        calls.clear()
        learner = learner_of(model)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        assert len(calls) == expected
        grad(sum(p.sum() for p in learner.parameters()), list(model.parameters()))
        assert len(calls) == expected


@row(21, "an unused parameter")
def unused(user: User) -> None:
    theta = {"used": normal(3, seed=1), "unused": normal(2, seed=2)}
    v = [normal(3, seed=3, grad=False), normal(2, seed=4, grad=False)]
    user.owns(theta, v)
    condition = ig.proximal(lambda phi: phi["used"].square().sum(), 2.0)
    solve = ig.implicit(
        lambda t: {"used": t["used"] / 2, "unused": t["unused"]}, condition, on_failure="raise"
    )
    phi = solve(theta)
    found = grad(list(phi.values()), list(theta.values()), [v[0], v[1]])
    near(found[0], v[0] / 2, 1e-14), near(found[1], v[1], 1e-14)
    model = made(lambda: nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(2, 1)}))
    user.owns(model)
    x, y = batch()
    for style in STYLES:
        learner = learner_of(model)
        with pytest.raises(ig.InvalidArgumentError, match=r"unused\.weight.*allow_unused=True"):
            adapt(learner, lambda: mse_loss(learner.used(x), y), style)  # noqa: B023
        learner = learner_of(model, allow_unused=True)
        adapt(learner, lambda: mse_loss(learner.used(x), y), style)  # noqa: B023
        outer = (learner.unused.weight * v[1]).sum()  # moved by nothing but its pull
        near(grad(outer, model["unused"].weight)[0], v[1][None], 1e-14)


@row(22, "a frozen parameter")
def frozen(user: User) -> None:
    """With `imaml` the solve is over the others; with `implicit`, θ is what the caller makes it."""
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    user.owns(model)
    (x, y), lam = batch(inputs=2), 0.7
    for style in STYLES:
        learner = learner_of(model)
        with pytest.raises(ig.InvalidArgumentError, match=r"bias.*allow_nograd=True"):
            adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        learner = learner_of(model, lam=lam, allow_nograd=True)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        assert torch.equal(learner.bias, model.bias)
        found = grad(learner.weight.sum(), [model.weight, *()])[0]
        hessian = 2 * x.T @ x / len(x)  # over the weight alone
        expected = torch.linalg.solve(hessian + lam * torch.eye(2), lam * torch.ones(2))
        near(found[0], expected, 1e-12)
    theta = {"free": normal(2, seed=1), "held": normal(2, seed=2, grad=False)}
    user.owns(theta)
    coupled = ig.proximal(lambda p: (p["free"] + p["held"]).square().sum() / 2, 1.0)

    def both(t: Any) -> Any:
        s = (t["free"] + t["held"]) / 3
        return {"free": t["free"] - s, "held": t["held"] - s}

    phi = ig.implicit(both, coupled, on_failure="raise")(theta)
    near(grad(phi["free"].sum(), theta["free"])[0], torch.full((2,), 2 / 3), 1e-12)
    assert not theta["held"].requires_grad


class Tied(nn.Module):
    """One weight under two names: wᵀ tanh(W x) with W the encoder's and the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


@row(23, "tied weights")
def tied(user: User) -> None:
    model, lam = made(Tied), 3.0
    x = normal(5, 3, seed=1, grad=False)
    user.owns(model, x)
    assert len(list(model.parameters())) == 1 and len(model.state_dict()) == 2

    def value(w: Tensor) -> Tensor:
        return (torch.tanh(x @ w.T) @ w.T - x).square().mean()

    v = normal(3, 3, seed=7, grad=False)

    def expected(at: Tensor) -> Tensor:
        hessian = torch.autograd.functional.hessian(value, at).reshape(9, 9)
        return torch.linalg.solve(hessian + lam * torch.eye(9), lam * v.flatten()).view(3, 3)

    w = model.encoder.weight.detach()
    for style in STYLES:
        learner = learner_of(model, lam=lam)
        adapt(learner, lambda: (learner(x) - x).square().mean(), style)  # noqa: B023
        assert learner.encoder.weight is learner.decoder.weight
        found = grad(learner.encoder.weight, model.encoder.weight, v)[0]
        at = w if style == "tensor" else learner.encoder.weight.detach()
        near(found, expected(at), 1e-10)
    # by functional_call, either one name or both
    theta = w.clone().requires_grad_()
    for names in (("encoder.weight",), ("encoder.weight", "decoder.weight")):
        condition = ig.proximal(
            in_module(model, x, lambda out: (out - x).square().mean()), lam / len(names)
        )
        solve = ig.implicit(
            lambda t: dict.fromkeys(t, next(iter(t.values())) * 1), condition, on_failure="ignore"
        )
        phi = solve(dict.fromkeys(names, theta))
        near(grad(phi["encoder.weight"], theta, v)[0], expected(w), 1e-9)


@row(24, "a parameter without elements")
def without_elements(user: User) -> None:
    theta = {"a": normal(3, seed=1), "empty": torch.zeros(0, 2, requires_grad=True)}
    user.owns(theta)
    condition = ig.proximal(lambda p: p["a"].square().sum() / 2 + p["empty"].sum(), 1.0)
    for linear_solver in (ig.CG(), ig.NormalCG(), ig.Exact()):
        solve = ig.implicit(
            lambda t: {"a": t["a"] / 2, "empty": t["empty"]},
            condition,
            linear_solver=linear_solver,
            on_failure="raise",
        )
        found = grad(solve(theta)["a"].sum(), list(theta.values()))
        near(found[0], torch.full((3,), 0.5), 1e-14)
        assert found[1].shape == (0, 2)


@row(25, "two dtypes in one tree")
def mixed_dtypes(user: User) -> None:
    theta = {"a": normal(3, seed=1), "b": normal(2, seed=2, dtype=torch.float32)}
    user.owns(theta)
    condition = ig.proximal(lambda p: (p["a"].sum() + p["b"].double().sum()).square() / 2, 1.0)

    def solver(t: Any) -> Any:
        s = (t["a"].sum() + t["b"].double().sum()) / 6
        return {"a": t["a"] - s, "b": (t["b"].double() - s).float()}

    phi = ig.implicit(solver, condition, on_failure="raise")(theta)
    found = grad(phi["a"].sum() + phi["b"].sum().double(), list(theta.values()))
    assert [g.dtype for g in found] == [torch.float64, torch.float32]
    near(found[0], torch.full((3,), 1 / 6), 1e-6)
    near(found[1], torch.full((2,), 1 / 6).float(), 1e-6)


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        if kind == "MultiheadAttention":
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        if kind == "TransformerEncoderLayer":
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.kind == "scaled_dot_product_attention":
            return nn.functional.scaled_dot_product_attention(x, x, x)
        return self.inner(x, x, x)[0] if "Multi" in self.kind else self.inner(x)


@row(26, "fused attention")
def attention(user: User) -> None:
    x = normal(2, 3, 4, seed=1, grad=False)
    for kind in ("scaled_dot_product_attention", "MultiheadAttention", "TransformerEncoderLayer"):
        model = made(lambda: Attention(kind))  # noqa: B023
        user.owns(model)
        (exact, curvature), (rough, _) = (
            gradients_in(model, x, c, lam=300.0) for c in ("auto", "finite_difference")
        )
        assert curvature == "hessian", kind
        all_near(rough, exact, 1e-8)
        learner = learner_of(model, lam=50.0, on_failure="ignore")
        learner.adapt(learner(x).square().mean())
        grad(learner(x).sum(), list(model.parameters()))


class Bag(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(5, 3, seed=1).detach())
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "EmbeddingBag":
            return nn.functional.embedding_bag(x, self.weight)
        sparse = self.kind == "Embedding(sparse=True)"
        return nn.functional.embedding(x, self.weight, sparse=sparse).mean(1)


@row(27, "embeddings")
def embeddings(user: User) -> None:
    """EmbeddingBag takes finite differences, and the report says so.

    Deviation: Embedding(sparse=True) works as well; its gradients are made dense.
    """
    index = torch.tensor([[0, 1], [3, 1], [4, 4]])
    expected, _ = gradients_in(Bag("Embedding"), index)
    for kind, curvature in (
        ("EmbeddingBag", "finite_difference"),
        ("Embedding(sparse=True)", "hessian"),
    ):
        model = Bag(kind)
        user.owns(model)
        found, how = gradients_in(model, index)
        assert how == curvature
        all_near(found, expected, 1e-8)
        for style in STYLES:
            learner = learner_of(model, on_failure="ignore")
            if (kind, style) == ("EmbeddingBag", "tensor"):
                learner.adapt(learner(index).square().mean())
                with pytest.raises(ig.GraphError, match=r"no second derivative.*adapt\(lambda"):
                    grad(learner(index).sum(), model.weight)
                continue
            adapt(learner, lambda: learner(index).square().mean(), style)  # noqa: B023
            assert grad(learner(index).sum(), model.weight)[0].layout == torch.strided


class GridSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2)
        self.shift = nn.Parameter(torch.tensor([0.03, -0.05]))

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x.view(1, 1, 4, -1))
        where = torch.tensor([[0.1, 0.2], [-0.4, 0.3]]).view(1, 2, 1, 2) + self.shift
        return nn.functional.grid_sample(image, where, align_corners=False)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(2, -1, 3))[0]


def recurrent(user: User, device: str) -> None:
    kinds = [lambda kind=kind: Recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)]
    for build in (*kinds, GridSample):
        model = made(build).to(device)
        x = normal(4, 3, seed=1, grad=False).to(device)
        user.owns(model)
        (exact, curvature), (rough, _) = (
            gradients_in(model, x, c) for c in ("auto", "finite_difference")
        )
        assert curvature == "hessian" or device == "cuda"
        all_near(rough, exact, 1e-7)
        for style in STYLES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # learn2learn looks at .grad
                learner = learner_of(model, lam=50.0, on_failure="ignore")
            adapt(learner, lambda: learner(x).square().mean(), style)  # noqa: B023
            weights = dict(learner.module.named_parameters())  # cuDNN's flat ones must be these
            near(learner(x), functional_call(model, weights, (x,)), 1e-12)
            grad(learner(x).sum(), list(model.parameters()))


@row(28, "recurrent layers, convolutions, grid_sample")
def on_cpu(user: User) -> None:
    recurrent(user, "cpu")


@row(29, "an inner model that is compiled")
def compiled(user: User) -> None:
    X, matrix = normal(5, 2, seed=1, grad=False), normal(2, 2, seed=2, grad=False)
    theta, v = normal(2, seed=3), torch.tensor([1.0, -2.0])
    user.owns(X, matrix, theta)

    def inner(phi: Tensor, X: Tensor) -> Tensor:
        return torch.tanh(X @ (matrix @ phi)).square().sum()

    # torch gives it a second derivative of 0, without a word
    found, in_one_piece = {}, torch.compile(inner, backend="aot_eager")
    for name, function in (("eager", inner), ("compiled", in_one_piece)):
        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda t, X: 0.9 * t, ig.proximal(function, 5.0), monitor=monitor, on_failure="ignore"
        )
        found[name] = grad(solve(theta, X), theta, v)[0], monitor.last.curvature
    assert found["compiled"][1] == "finite_difference"
    near(found["compiled"][0], found["eager"][0], 1e-8)
    twice = ig.proximal(in_one_piece, 5.0)
    phi = ig.implicit(lambda t, X: 0.9 * t, twice, on_failure="ignore")(theta, X)
    with pytest.raises(ig.GraphError, match=r"compiled \(torch\.compile\)"):
        grad(phi, theta, v, create_graph=True)


@row(30, "a reentrant checkpoint in the inner problem")
def reentrant_checkpoint(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)

    def through(reentrant: bool) -> ig.ImplicitSolver:
        return ig.implicit(
            good,
            ig.proximal(lambda p, X: checkpoint(loss, p, X, use_reentrant=reentrant), LAM),
            on_failure="raise",
        )

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        grad(through(True)(theta, X).sum(), theta)
    near(grad(through(False)(theta, X).sum(), theta)[0], expected_at(theta, X))


def autocast_case(where: str, style: str) -> list[Tensor]:
    """Gradients in float32 with autocast nowhere, around forward or around backward."""
    model = network().float()
    x, y = (t.float() for t in batch())
    if style == "implicit":
        theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        condition = ig.proximal(in_module(model, x, lambda out: mse_loss(out, y)), 1.5)
        solve = ig.implicit(
            lambda t: {k: 0.9 * p for k, p in t.items()}, condition, on_failure="ignore"
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
            phi = list(solve(theta).values())
        leaves = list(theta.values())
    else:
        learner = learner_of(model, linear_solver=ig.CG(maxiter=5))
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
            adapt(learner, lambda: mse_loss(learner(x), y), style)
        phi, leaves = list(learner.parameters()), list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "backward"):
        return list(grad(phi, leaves, cotangents(phi)))


@row(31, "autocast around forward")
def autocast_forward(user: User) -> None:
    """F is evaluated in float32 by `implicit`; a loss handed to `adapt` is what was made."""
    user.owns(normal(1))
    plain = autocast_case("nowhere", "implicit")
    assert all(map(torch.equal, plain, autocast_case("forward", "implicit")))
    plain = autocast_case("nowhere", "tensor")
    assert not all(map(torch.equal, plain, autocast_case("forward", "tensor")))
    all_near(autocast_case("forward", "tensor"), plain, 2e-2)


@row(32, "autocast around backward")
def autocast_backward(user: User) -> None:
    user.owns(normal(1))
    for style in ("implicit", *STYLES):
        plain, ambient = (autocast_case(where, style) for where in ("nowhere", "backward"))
        assert all(map(torch.equal, plain, ambient)), style


@row(33, "products by finite differences")
def differences_of_gradients(user: User) -> None:
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 5e-4)):
        theta = normal(3, seed=1, dtype=dtype)
        X = normal(4, 3, seed=2, grad=False, dtype=dtype)
        user.owns(theta, X)
        calls, found = [], {}

        def counted(phi: Tensor, X: Tensor) -> Tensor:
            calls.append(1)  # noqa: B023
            return loss(phi, X)

        def solver(theta: Tensor, X: Tensor) -> Tensor:
            return good(theta.double(), X.double()).to(theta)

        for curvature in ("hessian", "finite_difference"):
            calls.clear()
            monitor = ig.Monitor()
            solve = ig.implicit(
                solver,
                ig.proximal(counted, LAM),
                curvature=curvature,
                linear_solver=ig.CG(maxiter=3),
                monitor=monitor,
                on_failure="ignore",
            )
            found[curvature] = grad(solve(theta, X).sum(), theta)[0]
            assert monitor.last.curvature == curvature
            products = monitor.last.products
        # in forward, to see whether it still is what it was, two a product and for ∂F/∂a
        assert len(calls) == 1 + 1 + 2 * products + 2
        near(found["finite_difference"], found["hessian"], tolerance)


# ---------------------------------------------------------------- 1c. the contract of autograd

MODIFIED = "modified in place between forward and backward"


@row(34, "optimizer.step() before backward()")
def stepped_too_early(user: User) -> None:
    X = problem()[1]
    user.owns(X)
    theta = problem()[0]
    phi = ig.implicit(good, CONDITION)(theta, X)
    with torch.no_grad():
        theta.sub_(0.1)
    with pytest.raises(ig.GraphError, match=MODIFIED):
        grad(phi.sum(), theta)
    for style in STYLES:
        model, (x, y) = network(), batch()
        learner = learner_of(model)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        outer = mse_loss(learner(x), y)
        with torch.no_grad():
            model[0].weight.sub_(0.1)
        with pytest.raises(ig.GraphError, match=MODIFIED):
            grad(outer, list(model.parameters()))


@row(35, "the support batch is overwritten before backward()")
def overwritten_batch(user: User) -> None:
    """Deviation: what autograd itself saved (a captured batch) raises torch's own sentence.

    As the row says, writes through `.data` escape.
    """
    theta, X = problem()
    user.owns(theta)
    phi = ig.implicit(good, CONDITION)(theta, X)
    X.zero_()
    with pytest.raises(ig.GraphError, match=MODIFIED):
        grad(phi.sum(), theta)
    X = problem()[1]
    phi = ig.implicit(lambda t: good(t, X), ig.proximal(lambda p: loss(p, X), LAM))(theta)
    X.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(phi.sum(), theta)
    model = network()
    user.owns(model)
    for style in STYLES:
        (x, y), learner = batch(), learner_of(model)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        outer = sum(p.square().sum() for p in learner.parameters())
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grad(outer, list(model.parameters()))


@row(36, "phi is changed in place")
def changed_phi(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    phi = ig.implicit(good, CONDITION)(theta, X)
    with torch.no_grad():
        phi.add_(1.0)
    with pytest.raises(ig.GraphError, match=MODIFIED):
        grad(phi.sum(), theta)


@row(37, "the solver returns theta itself")
def returns_theta(user: User) -> None:
    theta = normal(3, seed=1)
    user.owns(theta)
    condition = ig.argmin(lambda phi, t: (phi - t).square().sum() + (phi - t).pow(4).sum())
    data = normal(3, seed=2, grad=False)
    user.owns(data)
    phi = ig.implicit(lambda t, d: d, ig.argmin(lambda p, t, d: (p - d - t).square().sum()))(
        torch.zeros(3, requires_grad=True), data
    )
    assert phi.untyped_storage().data_ptr() != data.untyped_storage().data_ptr()
    for alias in (lambda t: t, torch.Tensor.detach, lambda t: t.view(3), lambda t: t.data):
        phi = ig.implicit(alias, condition, on_failure="raise")(theta)
        assert phi.untyped_storage().data_ptr() != theta.untyped_storage().data_ptr()
        near(grad(phi.square().sum(), theta)[0], 2 * theta.detach(), 1e-14)


@row(38, "the solver edits its arguments in place")
def edits_arguments(user: User) -> None:
    """θ is lent as a copy. An argument without gradient is not; changing it is an error."""
    theta, X = problem()
    user.owns(theta)

    def careless(theta: Tensor, X: Tensor) -> Tensor:
        phi = good(theta, X)
        theta.zero_()
        return phi

    found = grad(ig.implicit(careless, CONDITION)(theta, X).sum(), theta)[0]
    near(found, expected_at(theta, X))
    solve = ig.implicit(lambda theta, X: good(theta, X.mul_(2.0)), CONDITION)
    with pytest.raises(ig.InvalidSolutionError, match=r"changed one of its arguments.*clone\(\)"):
        solve(theta, X)


def refused(user: User, spoilt: dict[str, tuple[Callable[[Tensor], Any], str]]) -> None:
    theta = {"w": normal(3, seed=1), "b": normal(1, seed=2)}
    user.owns(theta)
    condition = ig.proximal(lambda p: p["w"].square().sum() + p["b"].square().sum(), 1.0)
    for change, sentence in spoilt.values():
        ran = []

        def solver(t: Any) -> Any:
            ran.append(1)  # noqa: B023
            return {"w": change(t["w"]), "b": t["b"]}  # noqa: B023

        with pytest.raises(ig.InvalidSolutionError, match=sentence):
            ig.implicit(solver, condition)(theta)
        assert len(ran) == 1


@row(39, "phi of another shape")
def other_shape(user: User) -> None:
    like = r"phi\['w'\] must be like theta, a float64 tensor of shape \(3,\).*of shape "
    refused(
        user,
        {
            "a column": (lambda t: t[:, None], like + r"\(3, 1\)"),
            "a scalar": (lambda t: t.sum(), like + r"\(\)"),
            "two of them": (lambda t: torch.stack([t, t]), like + r"\(2, 3\)"),
        },
    )


@row(40, "phi of another dtype")
def other_dtype(user: User) -> None:
    sentence = r"phi\['w'\] must be like theta, a float64 tensor.*returned a float32 tensor"
    refused(user, {"float32": (torch.Tensor.float, sentence)})


@row(41, "phi of integers, a list, None, on another device")
def other_things(user: User) -> None:
    refused(
        user,
        {
            "integers": (torch.Tensor.long, r"phi\['w'\].*floating-point.*int64"),
            "a list": (torch.Tensor.tolist, "phi must have the same"),
            "None": (lambda t: None, "phi must have the same"),
            "a string": (str, r"phi\['w'\].*a str"),
            "another device": (lambda t: t.to("meta"), r"on cpu; the solver returned.*on meta"),
        },
    )


@row(42, "phi of NaN")
def nan_phi(user: User) -> None:
    """Deviation: always an exception, in forward, whatever on_failure says: no gradient is left."""
    sentence = r"phi\['w'\] holds NaN or Inf: the solver diverged"
    refused(user, {str(x): (lambda t, x=x: t * float(x), sentence) for x in ("nan", "inf", "-inf")})
    model, (x, y) = network(), batch()
    user.owns(model)
    learner = learner_of(model, solver=lambda f, phi: tuple(p * float("nan") for p in phi))
    user.owns(learner.module)
    with pytest.raises(ig.InvalidSolutionError, match="holds NaN or Inf"):
        learner.adapt(lambda: mse_loss(learner(x), y))


class OwnError(Exception):
    pass


@row(43, "the solver raises")
def solver_raises(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model)

    def stopped(*_: Any) -> Any:
        raise OwnError("out of memory")

    with pytest.raises(OwnError, match=r"^out of memory$"):
        ig.implicit(stopped, CONDITION)(theta, X)
    learner = learner_of(model, solver=stopped)
    user.owns(learner.module)
    with pytest.raises(OwnError, match=r"^out of memory$"):
        learner.adapt(lambda: mse_loss(learner(x), y))


@row(44, "the solver calls loss.backward()")
def solver_calls_backward(user: User) -> None:
    """θ is lent as a detached copy, so its .grad is safe, and our own minimisers touch no .grad.

    Deviation: what a solver's own backward() leaves in tensors that it captured is its business
    (training a module of its own is what many solvers do): it is neither undone nor reported.
    """
    theta, X, c = *problem(), normal(3, seed=8)
    theta.grad, c.grad = torch.ones(3), torch.ones(3)
    user.owns(theta, X, c)

    def trains(theta: Tensor, X: Tensor) -> Tensor:
        phi = good(theta, X).requires_grad_()
        assert theta.requires_grad is False
        anchor = theta.requires_grad_()
        (loss(phi, X) + prox(phi, anchor, LAM)).backward()
        return phi - 0.0 * phi.grad

    near(grad(ig.implicit(trains, CONDITION)(theta, X).sum(), theta)[0], expected_at(theta, X))
    captured = ig.proximal(lambda phi, X: loss(phi - c, X), LAM)
    for solver in (
        ig.solvers.GradientDescent(lr=0.02, steps=3),
        ig.solvers.Nesterov(lr=0.02, steps=3),
        ig.solvers.NewtonCG(tol=1e-3),
        ig.solvers.TorchOptim(factory=lambda ts: torch.optim.SGD(ts, lr=0.02), steps=3),
        ig.solvers.TorchOptim(factory=torch.optim.LBFGS, steps=3),
        ig.solvers.SciPyMinimize(),
    ):
        solve = ig.implicit(solver, captured, on_failure="ignore")
        grad(solve(theta, X).sum(), [theta, c])
    model, (x, y) = network(), batch()
    encoder = made(lambda: nn.Linear(3, 3))
    user.owns(model, encoder)
    for style in STYLES:
        learner = learner_of(model)
        adapt(learner, lambda: mse_loss(learner(encoder(x)), y), style)  # noqa: B023
        outer = mse_loss(learner(encoder(x)), y)
        grad(outer, [*model.parameters(), *encoder.parameters()])


@row(45, "backward twice, the graph retained")
def backward_twice(user: User) -> None:
    theta, X = problem()
    model = network()
    user.owns(theta, X, model)
    outer = ig.implicit(good, CONDITION)(theta, X).square().sum()
    first, second = (grad(outer, theta, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    for style in STYLES:
        _, outer, parameters = adapted_loss(user, model, style)
        first, second = (grad(outer, parameters, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))


@row(46, "backward twice, the graph not retained")
def backward_twice_without(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    collecting = gc.isenabled()
    gc.disable()
    try:
        phi = ig.implicit(good, CONDITION)(theta, X)
        node = weakref.ref(phi.grad_fn.problem)
        outer = phi.square().sum()
        grad(outer, theta)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            grad(outer, theta)
        del phi, outer
        assert node() is None  # without the garbage collector
    finally:
        if collecting:
            gc.enable()


@row(47, "double backward")
def double_backward(user: User) -> None:
    """Right, to rounding error, or a loud error: with `imaml`, and under constraints."""
    theta, X = problem()
    user.owns(theta, X)
    exact = ig.implicit(good, CONDITION, linear_solver=ig.CG(rtol=1e-14), on_failure="ignore")
    with user.acts():
        assert torch.autograd.gradgradcheck(lambda t: exact(t, X), theta)
    first = grad(exact(theta, X).sum(), theta, create_graph=True)[0]
    second = grad(first.sum(), theta)[0]
    step = 1e-5 * torch.ones(3)
    ahead, behind = (expected_at(theta.detach() + s * step, X).sum() for s in (1, -1))
    assert abs(second.sum() - (ahead - behind) / 2e-5) < 1e-7
    model = network()
    reasons = {"tensor": r"create_graph=True.*adapt\(lambda", "closure": "truncated"}
    for style in STYLES:
        truncated = ig.CG(maxiter=2)
        _, outer, parameters = adapted_loss(user, model, style, linear_solver=truncated)
        with pytest.raises(ig.GraphError, match=f"econd derivatives.*{reasons[style]}"):
            first = grad(outer, parameters, create_graph=True)
            grad(sum(g.square().sum() for g in first), parameters)
    bounded = ig.argmin(lambda phi, t: (phi - t).square().sum(), bounds=(-5.0, 5.0))
    phi = ig.implicit(torch.clone, bounded)(theta)
    with pytest.raises(ig.GraphError, match="under constraints are not available"):
        grad(phi.square().sum(), theta, create_graph=True)


@row(48, "no_grad and inference_mode")
def without_gradients(user: User) -> None:
    """Deviation: under inference_mode, too, φ is returned, as a plain tensor without a graph."""
    theta, X = problem()
    user.owns(theta, X)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            phi = ig.implicit(good, CONDITION)(theta, X)
        assert not phi.requires_grad and phi.grad_fn is None and not phi.is_inference()
        near(phi, good(theta.detach(), X), 1e-13)


@row(49, "torch.func.grad and vmap")
def transforms(user: User) -> None:
    theta, X = problem()
    thetas = normal(4, 3, seed=4, grad=False)
    user.owns(theta, X, thetas)
    solve = ig.implicit(good, CONDITION, on_failure="raise")
    near(torch.func.grad(lambda t: solve(t, X).sum())(theta.detach()), expected_at(theta, X))
    each = torch.func.vmap(torch.func.grad(lambda t: solve(t, X).sum()))(thetas)
    near(each, torch.stack([expected_at(t, X) for t in thetas]))


@row(50, "is_grads_batched")
def batched_gradients(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    phi = ig.implicit(good, CONDITION)(theta, X)
    with pytest.raises(ig.GraphError, match=r"is_grads_batched=True.*torch\.func\.vmap or jacrev"):
        grad(phi, theta, torch.eye(3), is_grads_batched=True)


@row(51, "torch.compile around it")
def compiled_caller(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    solve = ig.implicit(good, CONDITION, on_failure="raise")

    def outer(theta: Tensor, X: Tensor) -> Tensor:
        return (solve(theta * 2.0, X) * 3.0).square().sum()

    eager = grad(outer(theta, X), theta)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at .grad of tensors that are no leaves
        value = torch.compile(outer, backend="eager")(theta, X)
    near(grad(value, theta)[0], eager, 1e-9)


@row(52, "detect_anomaly with NaN")
def anomaly(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    solve = ig.implicit(good, CONDITION, on_failure="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that anomaly mode is on
        with torch.autograd.detect_anomaly():
            phi = solve(theta, X)
            with pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values"):
                grad(phi, theta, torch.full((3,), float("nan")))


@row(53, "pickle, deepcopy, torch.save")
def copies(user: User) -> None:
    theta, X = problem()
    model = network()
    user.owns(theta, X, model)
    solve = ig.implicit(good, CONDITION, linear_solver=ig.CG(rtol=1e-12), on_failure="raise")
    expected = grad(solve(theta, X).sum(), theta)[0]
    stream = io.BytesIO()
    torch.save(solve, stream)
    stream.seek(0)
    for other in (
        pickle.loads(pickle.dumps(solve)),
        copy.deepcopy(solve),
        copy.copy(solve),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(grad(other(theta, X).sum(), theta)[0], expected)
    maml = ig.imaml(l2l.algorithms.MAML(model, lr=0.01), lam=100.0)
    x, y = batch()
    found = []
    for other in (maml, pickle.loads(pickle.dumps(maml)), copy.deepcopy(maml)):
        learner = other.clone()
        adapt(learner, lambda: mse_loss(learner(x), y), "tensor")  # noqa: B023
        found.append(grad(mse_loss(learner(x), y), list(other.module.parameters())))
        copy.deepcopy(other)  # after a solve, too
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


@row(54, "one Function class for all calls")
def one_class(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    solve = ig.implicit(good, CONDITION)
    before = len(torch.autograd.Function.__subclasses__())
    nodes = {type(solve(theta, X).grad_fn) for _ in range(20)}
    assert len(nodes) == 1 and nodes.pop() is type(solve(theta, X).grad_fn)
    assert len(torch.autograd.Function.__subclasses__()) == before
    assert solve(theta, X).grad_fn._forward_cls is ImplicitFunction


@row(55, "three threads")
def three_threads(user: User) -> None:
    """A pure function; a shared module with buffers in the condition; learners of one model.

    Deviation: `torch.func.functional_call` on one module from several threads at once is torch's
    to make safe (it swaps the module's parameters): give each thread a `copy.copy` of the module.
    """
    theta, X = problem()
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    norm.requires_grad_(False)
    model, (x, y) = network(), batch()
    user.owns(theta, X, norm, model)
    pure = ig.implicit(good, CONDITION, on_failure="raise")
    shared = ig.implicit(
        lambda theta, X: theta.clone(),
        ig.proximal(lambda phi, X: (norm(X) @ phi).square().sum(), 30.0),
        on_failure="ignore",
    )
    maml = ig.imaml(l2l.algorithms.MAML(model, lr=0.01), lam=100.0)

    def by_imaml() -> Tensor:
        learner = maml.clone()
        learner.adapt(mse_loss(learner(x), y))
        return torch.cat([g.flatten() for g in grad(mse_loss(learner(x), y), model.parameters())])

    works = (
        lambda: grad(pure(theta, X).sum(), theta)[0],
        lambda: grad(shared(theta, X).sum(), theta)[0],
        by_imaml,
    )
    for work in works:
        expected = work()
        for found in in_threads(lambda _: [work() for _ in range(15)], 3):  # noqa: B023
            assert all(torch.equal(g, expected) for g in found)


@row(56, "an exception at the k-th product")
def exception_in_backward(user: User) -> None:
    model = network(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    (x, y), armed = batch(), [-1]
    user.owns(model, theta, x, y)

    def explode(gradient: Tensor) -> None:
        armed[0] -= 1
        if armed[0] == 0:
            raise OwnError

    def criterion(output: Tensor) -> Tensor:
        output.register_hook(explode)
        return mse_loss(output, y)

    solve = ig.implicit(
        lambda t: {k: 0.9 * p for k, p in t.items()},
        ig.proximal(in_module(model, x, criterion), 100.0),
        linear_solver=ig.CG(maxiter=6),
        on_failure="ignore",
    )
    phi = solve(theta)
    leaves = list(theta.values())

    def backward() -> tuple[Tensor, ...]:
        return grad(list(phi.values()), leaves, cotangents(phi.values()), retain_graph=True)

    expected, raised = backward(), 0
    for k in range(1, 8):
        armed[0] = k
        try:
            backward()
        except OwnError:
            raised += 1
        armed[0] = -1
        assert all(map(torch.equal, backward(), expected))
    assert raised >= 6


@row(57, "saved_tensors_hooks")
def offloading(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    packed: list[Tensor] = []
    solution = good(theta.detach(), X)
    solve = ig.implicit(lambda theta, X: solution, CONDITION, on_failure="raise")

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        phi = solve(theta, X)
    for large in (theta, X, phi):
        assert any(t.shape == large.shape and torch.equal(t, large) for t in packed)
    near(grad(phi.sum(), theta)[0], expected_at(theta, X))
    with torch.autograd.graph.save_on_cpu():
        phi = solve(theta, X)
    near(grad(phi.sum(), theta)[0], expected_at(theta, X))


@row(58, "an inner problem that is not solved")
def unsolved(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)
    for steps, solved in ((2, False), (400, True)):
        monitor = ig.Monitor()
        descent = ig.solvers.GradientDescent(lr=0.03, steps=steps)
        solve = ig.implicit(descent, CONDITION, monitor=monitor)
        if solved:
            grad(solve(theta, X).sum(), theta)
            assert monitor.last.status == Status.CONVERGED and monitor.last.inner_residual < 1e-2
            continue
        with pytest.warns(ig.ImplicitGradWarning, match="phi does not solve the inner problem"):
            phi = solve(theta, X)
            grad(phi.sum(), theta)
        assert monitor.last.status == Status.INNER_NOT_STATIONARY
        at, start = phi.detach().requires_grad_(), theta.detach()
        (residual,) = grad(loss(at, X) + prox(at, start, LAM), at)
        assert abs(monitor.last.inner_residual - float(residual.norm())) < 1e-12
        with pytest.raises(ig.LinearSolveError, match="phi does not solve the inner problem"):
            strict = ig.implicit(descent, CONDITION, on_failure="raise")
            grad(strict(theta, X).sum(), theta)


@row(59, "one bad task among several")
def bad_task(user: User) -> None:
    """One report for each task; "raise" lets the caller skip a task, "ignore" keeps its NaN.

    Deviation: skipping is the caller's line of code, there is no policy that does it by itself.
    """
    theta, X = problem()
    user.owns(theta, X)
    weights = (1.0, float("nan"), 2.0)
    monitor = ig.Monitor()
    solve = ig.implicit(good, CONDITION, monitor=monitor, on_failure="ignore")
    kept = grad(sum(w * solve(theta, X).sum() for w in weights), theta)[0]
    assert kept.isnan().all()
    counted = sorted(report.status for report in monitor.reports)
    assert counted == sorted([Status.NONFINITE_RHS, Status.CONVERGED, Status.CONVERGED])
    strict, total, skipped = ig.implicit(good, CONDITION, on_failure="raise"), torch.zeros(3), 0
    for w in weights:
        try:
            total += grad(w * strict(theta, X).sum(), theta)[0]
        except ig.LinearSolveError as error:
            assert error.report.status == Status.NONFINITE_RHS
            skipped += 1
    assert skipped == 1
    near(total, 3 * expected_at(theta, X))


# ---------------------------------------------------------------- on a GPU, where there is one


@row(18, "random numbers on the device", ON_GPU)
def device_random_numbers(user: User) -> None:
    theta = normal(3, seed=1).detach().cuda().requires_grad_()
    noisy = ig.proximal(lambda phi: nn.functional.dropout(phi, 0.5).square().sum(), 1.0)
    user.owns(theta)
    phi = ig.implicit(torch.clone, noisy, on_failure="ignore")(theta)
    grad(phi.sum(), theta)


@row(28, "cuDNN's recurrent layers", ON_GPU)
def on_gpu(user: User) -> None:
    recurrent(user, "cuda")


@row(32, "autocast around backward on the device", ON_GPU)
def device_autocast(user: User) -> None:
    theta = normal(8, 8, seed=1, dtype=torch.float32).detach().cuda().requires_grad_()
    X = normal(8, 8, seed=2, grad=False, dtype=torch.float32).cuda()
    user.owns(theta, X)
    condition = ig.proximal(lambda p, X: torch.tanh(X @ p).square().sum(), 20.0)
    phi = ig.implicit(lambda t, X: 0.9 * t, condition, on_failure="ignore")(theta, X)
    plain = grad(phi.sum(), theta, retain_graph=True)[0]
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(grad(phi.sum(), theta)[0], plain)


@row(41, "phi on another device", ON_GPU)
def other_device(user: User) -> None:
    sentence = r"on cpu; the solver returned.*on cuda:0"
    refused(user, {"cuda": (torch.Tensor.cuda, sentence)})


HERE = ids(ROWS) + (ids(ON_GPU) if torch.cuda.is_available() else [])


@pytest.mark.parametrize("check", HERE)
def test_row(check: Row) -> None:
    user = User()
    check(user)
    user.check()


def test_every_row_is_here() -> None:
    assert sorted(ROWS) == list(range(1, 60))
