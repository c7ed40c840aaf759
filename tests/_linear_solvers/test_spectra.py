"""CG on 20 families of spectra, 20 matrices each, in three precisions: solved, or honest."""

import math

import pytest
import torch

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import Operator

F32, F64 = torch.float32, torch.float64
SEEDS = range(20)


def log_uniform(n, kappa):
    return torch.logspace(0, -math.log10(kappa), n, dtype=F64)


def two_values(n, kappa):
    return torch.tensor([1.0, 1 / kappa], dtype=F64).repeat(n // 2)


def outliers(n, kappa):
    return torch.cat([torch.full((n - 3,), 1 / kappa, dtype=F64), torch.ones(3, dtype=F64)])


def clusters(n, kappa):
    centres = torch.logspace(0, -math.log10(kappa), 5, dtype=F64)
    return centres.repeat_interleave(n // 5) * (1 + 1e-3 * torch.rand(n, dtype=F64))


def chebyshev(n, kappa):
    nodes = torch.cos(math.pi * (torch.arange(n, dtype=F64) + 0.5) / n)
    return ((1 + 1 / kappa) + (1 - 1 / kappa) * nodes) / 2


FAMILIES = {
    "log-uniform, κ = 10": lambda: log_uniform(60, 1e1),
    "log-uniform, κ = 1e3": lambda: log_uniform(60, 1e3),
    "log-uniform, κ = 1e6": lambda: log_uniform(60, 1e6),
    "log-uniform, κ = 1e8": lambda: log_uniform(60, 1e8),
    "uniform": lambda: torch.linspace(1, 1e-2, 60, dtype=F64),
    "uniform, κ = 1e5": lambda: torch.linspace(1, 1e-5, 60, dtype=F64),
    "Chebyshev's points": lambda: chebyshev(60, 100.0),
    "Chebyshev's points, κ = 1e4": lambda: chebyshev(60, 1e4),
    "two values": lambda: two_values(60, 1e4),
    "bulk and large outliers": lambda: outliers(60, 1e4),
    "bulk and a small outlier": lambda: torch.cat([torch.ones(59, dtype=F64), F64_(1e-6)]),
    "clusters": lambda: clusters(60, 1e4),
    "a power law": lambda: torch.arange(1, 61, dtype=F64) ** -2.0,
    "near singular": lambda: torch.cat([log_uniform(59, 1e2), F64_(1e-12)]),
    "half nearly zero": lambda: torch.tensor([1.0, 1e-9], dtype=F64).repeat_interleave(30),
    "spaced by eps": lambda: 1 + torch.arange(60, dtype=F64) * torch.finfo(F64).eps,
    "one number": lambda: torch.full((60,), 3.0, dtype=F64),
    "one unknown": lambda: F64_(0.3),
    "two unknowns": lambda: torch.tensor([1.0, 1e-7], dtype=F64),
    "seven unknowns": lambda: log_uniform(7, 1e4),
}  # fmt: skip


def F64_(value):
    return torch.tensor([value], dtype=F64)


def matrix(spectrum, seed):
    random = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=F64))
    rhs = torch.randn(n, generator=random, dtype=F64)
    return (Q * spectrum) @ Q.T, rhs


def check(A, rhs, precision):
    """Never a claim of convergence without it; and what rounding allows is reached."""
    kappa = float(torch.linalg.cond(A))
    exact = torch.linalg.solve(A, rhs)
    dtype = F64 if precision == "float64" else F32
    A, rhs, eps = A.to(dtype), rhs.to(dtype), None
    if precision == "bfloat16 products":
        coarse, eps = A.bfloat16(), torch.finfo(torch.bfloat16).eps

        def matvec(x):
            return (coarse @ x.bfloat16()).float()
    else:

        def matvec(x):
            return A @ x

    rtol = {"float64": 1e-6, "float32": 1e-5}.get(precision, 0.1)
    solver = ig.CG(maxiter=500, rtol=rtol)
    found = solver.solve(Operator(matvec, matvec, eps=eps), rhs)
    residual = float((rhs - matvec(found.x)).norm() / rhs.norm())
    if found.status == Status.CONVERGED:
        assert residual <= 2 * max(solver.rtol, 10 * (eps or torch.finfo(dtype).eps))
        if eps is None:
            bound = 2 * kappa * (solver.rtol + 10 * torch.finfo(dtype).eps)
            assert float((found.x - exact).norm() / exact.norm()) <= bound
    else:
        assert not found.status.ok
    return found.status


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16 products"])
@pytest.mark.parametrize("name", FAMILIES)
def test_solved_or_honest(name, precision):
    statuses = [check(*matrix(FAMILIES[name](), seed), precision) for seed in SEEDS]
    easy = {"float64": 1e6, "float32": 1e2}.get(precision, 1.5)
    spectrum = FAMILIES[name]()
    if float(spectrum.max() / spectrum.min()) <= easy:
        assert set(statuses) == {Status.CONVERGED}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_thousand_unknowns(precision, seed):
    A, rhs = matrix(log_uniform(1000, 1e3 if precision == "float64" else 1e2), seed)
    assert check(A, rhs, precision) == Status.CONVERGED


@pytest.mark.parametrize("seed", range(5))
def test_down_to_the_floor_of_rounding(seed):
    """‖x − x*‖ ≤ 10 κ eps ‖x*‖ when the residual is as small as it gets."""
    A, rhs = matrix(log_uniform(60, 1e4), seed)
    exact = torch.linalg.solve(A, rhs)
    for dtype in (F64, F32):
        M, b = A.to(dtype), rhs.to(dtype)
        found = ig.CG(maxiter=400).solve(Operator(lambda x, M=M: M @ x, lambda x, M=M: M @ x), b)
        error = float((found.x - exact).norm() / exact.norm())
        assert error <= 10 * 1e4 * torch.finfo(dtype).eps
