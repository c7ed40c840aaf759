"""The error bound of CG, and CG that stops by it: against solutions in extended precision."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import os
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator
from implicit_grad._linear_solvers.error_bounds import (
    ErrorWatch,
    error_bound,
    radau_bound,
    ritz_values,
)

F32, F64 = torch.float32, torch.float64


def ramp(n: int) -> Tensor:
    return torch.arange(n, dtype=F64) / max(1, n - 1)


# (n, kappa, n uniform numbers) -> eigenvalues of which the least is about 1
SPECTRA = {
    "log-uniform": lambda n, k, u: k**u,
    "uniform": lambda n, k, u: 1 + (k - 1) * u,
    "linear": lambda n, k, u: 1 + (k - 1) * ramp(n),
    "geometric": lambda n, k, u: k ** ramp(n),
    "clustered": lambda n, k, u: k ** ((5 * u).floor() / 4) * (1 + 1e-3 * u),
    "two clusters": lambda n, k, u: torch.where(u < 0.5, 1 + 1e-4 * u, k * (1 - 1e-4 * u)),
    "bulk and outliers": lambda n, k, u: torch.where(ramp(n) < 0.95, 1 + u, k * (1 + u)),
    "small outliers": lambda n, k, u: torch.where(ramp(n) < 0.1, 1 + u, k * (0.9 + 0.1 * u)),
    "half at 1": lambda n, k, u: torch.where(ramp(n) < 0.5, torch.ones(n, dtype=F64), k**u),
    "near-singular": lambda n, k, u: torch.where(ramp(n) == 0, 1.0, k * (1 + u) / 2),
    "identity": lambda n, k, u: torch.ones(n, dtype=F64),
    "eps-spaced": lambda n, k, u: 1 + 1e-15 * n * torch.arange(n, dtype=F64),
    "power law": lambda n, k, u: 1 + k / (1 + torch.arange(n, dtype=F64)) ** 2,
    "chebyshev": lambda n, k, u: 1 + (k - 1) * (1 - torch.cos(math.pi * ramp(n))) / 2,
    "dense at the low end": lambda n, k, u: 1 + (k - 1) * u**4,
    "dense at the high end": lambda n, k, u: 1 + (k - 1) * u**0.25,
    "strakos": lambda n, k, u: 1 + (k - 1) * ramp(n) * 0.9 ** (n * (1 - ramp(n))),
    "hessian": lambda n, k, u: 1 + (k - 1) * 10 ** (-6 * u),
    "one": lambda n, k, u: torch.full((1,), k, dtype=F64),
    "two": lambda n, k, u: torch.tensor([1.0, k], dtype=F64),
}
FAMILIES = list(SPECTRA)
LONG = "IMPLICIT_GRAD_LONG" in os.environ
SEEDS = 20 if LONG else 10


@dataclasses.dataclass(frozen=True)
class Convex:
    """A strongly convex system, rounded to a dtype; all else is about that very matrix."""

    matrix: Tensor
    rhs: Tensor
    scale: float | Tensor | None
    weights: Tensor  # the scale per element, in float64
    spectrum: Tensor  # of the matrix over its scale

    @property
    def operator(self) -> Operator:
        return self.known()

    def known(self, **known) -> Operator:
        return Operator(self.matrix.matmul, self.matrix.matmul, self.scale, **known)

    @property
    def mu(self) -> float:
        """The least eigenvalue, less what the dense solver may be wrong about it."""
        n, eps = len(self.spectrum), torch.finfo(F64).eps
        return float(self.spectrum[0]) - 5 * n * eps * float(self.spectrum[-1])

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The solution to extended precision, by iterative refinement."""
        matrix = self.matrix.double().numpy()
        wide = matrix.astype(np.longdouble)
        rhs = self.rhs.double().numpy().astype(np.longdouble)
        inverse = np.linalg.inv(matrix)
        x = np.zeros_like(rhs)
        for _ in range(6):
            residual = rhs - wide @ x
            size = float(np.abs(residual).max()) or 1.0
            x = x + (inverse @ (residual / size).astype(float)) * np.longdouble(size)
        return x

    def norm(self, x: np.ndarray) -> float:
        return float(np.sqrt(np.sum(x * x * self.weights.numpy())))

    def error(self, x: Tensor) -> float:
        return self.norm(x.double().numpy() - self.exact)

    @property
    def floor(self) -> float:
        """About the least error that rounding allows."""
        kappa = float(self.spectrum[-1] / self.spectrum[0])
        return torch.finfo(self.matrix.dtype).eps * kappa * self.norm(self.exact)


@functools.cache
def convex(family: str, seed: int, dtype: torch.dtype) -> Convex | None:
    """One problem; None where rounding made the matrix indefinite or nearly so."""
    random = torch.Generator().manual_seed(1_000 * seed + FAMILIES.index(family))
    draw = functools.partial(torch.rand, dtype=F64, generator=random)
    n = {"one": 1, "two": 2}.get(family, (3, 10, 40, 80, 200)[seed % 5])
    kappa = 10 ** (float(draw(1)) * (6 if dtype == F64 else 4))
    values = SPECTRA[family](n, kappa, draw(n)) * 10 ** (4 * float(draw(1)) - 2)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]
    scale: float | Tensor | None = None
    if seed % 3 == 1:
        scale = 10 ** (2 * float(draw(1)) - 1)
    elif seed % 3 == 2:
        scale = (10 ** (2 * draw(n) - 1)).to(dtype)
    weights = torch.ones(n, dtype=F64) * (1.0 if scale is None else scale)
    root = weights.sqrt()
    matrix = root[:, None] * (basis @ torch.diag(values) @ basis.T) * root
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    spectrum = torch.linalg.eigvalsh(matrix.double() / root[:, None] / root)
    if spectrum[0] <= 3 * n**0.5 * torch.finfo(dtype).eps * spectrum[-1]:
        return None
    rhs = torch.randn(n, dtype=dtype, generator=random)
    return Convex(matrix, rhs, scale, weights, spectrum)


@functools.cache
def problems(dtype: torch.dtype) -> list[Convex]:
    drawn = [convex(family, seed, dtype) for family in FAMILIES for seed in range(SEEDS)]
    return [problem for problem in drawn if problem is not None]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_bound_holds_and_is_tight(dtype):
    """Problems truncated at up to 9 places and solved, 5,816 times if LONG: never violated.

    No bound can be tight for an error whose residual might all lie along μ but does not: where the
    least Ritz value has met μ already, or the right-hand side has hardly any part along μ, it is
    looser; by no more than κ.
    """
    ratios, early, drawn = [], [], problems(dtype)
    assert len(drawn) >= 0.95 * SEEDS * len(FAMILIES)
    for problem in drawn:
        n = len(problem.rhs)
        steps = [k for k in (1, 2, 3, 5, 8, 13, 20, 40, 80) if k <= n]
        for solver in (ig.CG(), *(ig.CG(maxiter=k) for k in steps)):
            solution = solver.solve(problem.operator, problem.rhs)
            bound, error = error_bound(solution, problem.mu), problem.error(solution.x)
            assert bound is not None and bound >= error
            if error > 10 * problem.floor:  # below, an error may well be all rounding
                ratios.append(bound / error)
                assert bound / error <= max(30, 2 * float(problem.spectrum[-1]) / problem.mu)
                ritz = ritz_values(solution.coefficients)
                if ritz and ritz[0] > 1.001 * problem.mu:
                    early.append(bound / error)
    assert len(ratios) > 50 * SEEDS and len(early) > 0.7 * len(ratios)
    assert statistics.median(ratios) <= 2.0
    assert sum(ratio <= 30 for ratio in ratios) >= 0.96 * len(ratios)
    assert sum(ratio <= 30 for ratio in early) >= 0.99 * len(early)


def test_the_bound_holds_for_products_in_bfloat16():
    """The matrix is exact in bfloat16; vectors are rounded to it before a product, and after."""
    tried, known = 0, 0
    for problem in problems(F32):
        narrow = problem.matrix.bfloat16()
        root = problem.weights.sqrt()
        spectrum = torch.linalg.eigvalsh(narrow.double() / root[:, None] / root)
        if spectrum[0] <= 0.02 * spectrum[-1]:
            continue
        rounded = dataclasses.replace(problem, matrix=narrow.float(), spectrum=spectrum)

        def matvec(x, narrow=narrow):
            return (narrow @ x.bfloat16()).float()

        eps = torch.finfo(torch.bfloat16).eps
        operator = Operator(matvec, matvec, rounded.scale, eps=eps)
        for k in (1, 2, 3, 8, None):
            solver = ig.CG() if k is None else ig.CG(maxiter=k)
            solution = solver.solve(operator, rounded.rhs)
            bound = error_bound(solution, rounded.mu)
            tried, known = tried + 1, known + (bound is not None)
            assert bound is None or bound >= rounded.error(solution.x)
    assert tried > 25 * SEEDS and known > 0.8 * tried


@pytest.mark.parametrize("factor", [1e-3, 0.5])
def test_the_bound_holds_for_any_lower_bound_on_the_spectrum(factor):
    for problem in problems(F64)[::7]:
        for solver in (ig.CG(), ig.CG(maxiter=6), ig.MINRES(), ig.CG(rtol=1e-3)):
            solution = solver.solve(problem.operator, problem.rhs)
            assert error_bound(solution, factor * problem.mu) >= problem.error(solution.x)


@pytest.mark.parametrize("solver", ["restart", "jacobi", "nystrom", "warm", "minres"])
def test_the_bound_holds_without_cgs_coefficients(solver):
    known = []
    for problem in problems(F32)[::5]:
        # a tolerance below the floor makes CG restart
        make = {
            "restart": ig.CG(rtol=1e-9),
            "jacobi": ig.CG(preconditioner=ig.Jacobi(), rtol=1e-3),
            "nystrom": ig.CG(preconditioner=ig.Nystrom(rank=3), rtol=1e-3),
            "warm": ig.CG(warm_start=ig.WarmStart(), rtol=1e-3),
            "minres": ig.MINRES(rtol=1e-3),
        }[solver]
        if solver == "warm":
            make.solve(problem.operator, problem.rhs + 0.1)
        solution = make.solve(problem.operator, problem.rhs)
        if solver in ("jacobi", "nystrom", "minres"):
            assert not solution.coefficients
        assert error_bound(solution, problem.mu) >= problem.error(solution.x)
        complete = len(solution.coefficients) == solution.iterations
        known.append("all" if complete else "some" if solution.coefficients else "none")
    if solver == "restart":  # two runs are not one recurrence
        assert set(known) == {"all", "none"}


def test_the_bound_is_in_the_units_of_the_right_hand_side():
    problem = convex("log-uniform", 4, F64)
    one = ig.CG(maxiter=5).solve(problem.operator, problem.rhs)
    other = ig.CG(maxiter=5).solve(problem.operator, problem.rhs * 2.0**30)
    for mu in (problem.mu, problem.mu / 3):
        assert error_bound(other, mu) == error_bound(one, mu) * 2.0**30
    assert other.gap == one.gap * 2.0**30 and other.residual_norm == one.residual_norm * 2.0**30


def test_the_bound_is_in_the_units_of_the_scale():
    problem, unit = convex("log-uniform", 3, F64), 2.0**-20
    small = dataclasses.replace(problem, matrix=problem.matrix * unit, scale=unit)
    one = ig.CG(maxiter=5).solve(problem.operator, problem.rhs)
    other = ig.CG(maxiter=5).solve(small.operator, problem.rhs)
    assert torch.equal(other.x, one.x / unit)
    assert other.gap == one.gap * 2.0**10 and other.residual_norm == one.residual_norm * 2.0**10
    assert error_bound(other, problem.mu) == error_bound(one, problem.mu) * 2.0**10


def test_there_is_no_bound_where_nothing_is_known():
    x, status = torch.ones(2, dtype=F64), Status.CONVERGED
    coefficients = ((0.5, 0.1, 1e-3),)
    known = {"coefficients": coefficients, "residual_norm": 0.1, "gap": 0.0}
    assert error_bound(LinearSolution(x, status, **known), 1.0) < 0.1
    for change in (
        {"residual_norm": None},
        {"residual_norm": math.nan},
        {"extremes": (-0.1, 1.0)},
        {"substitute": "minres"},
        {"coefficients": ((2.0, 0.1, 1e-3),)},  # a Ritz value of 1/2 denies that μ is 1
    ):
        assert error_bound(LinearSolution(x, status, **(known | change)), 1.0) is None
    # denied by rounding alone, or no coefficients: the residual still bounds the error
    for coefficients in (((1 + 1e-15, 0.1, 1e-3),), ()):
        change = {"coefficients": coefficients}
        assert error_bound(LinearSolution(x, status, **(known | change)), 1.0) == 0.1
    assert radau_bound(LinearSolution(x, status, coefficients=((2.0, 0.1, 1e-3),)), 1.0) is None
    assert ritz_values(()) == []


def test_a_residual_that_was_not_recomputed_bounds_nothing():
    problem = convex("linear", 2, F64)
    solver = ig.CG(maxiter=3)
    solution = solver.solve(problem.operator, problem.rhs, verify=False)
    assert solution.gap is solution.residual is None and error_bound(solution, 1.0) is None


# ---------------------------------------------------------------- stopping at an error


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rtol_error", [0.3, 1e-2, 1e-4])
def test_a_known_mu_makes_the_error_as_small_as_asked(dtype, rtol_error):
    iterations, needed, by_error = 0, 0, 0
    drawn = problems(dtype)[:: 4 if LONG else 2]
    for problem in drawn:
        known = problem.known(mu=problem.mu, rtol_error=rtol_error)
        for solver in (ig.CG(), ig.CG(maxiter=500)):
            solution = solver.solve(known, problem.rhs)
            limit = rtol_error * problem.norm(solution.x.double().numpy())
            if solution.error_is_bound is None:
                continue
            assert solution.error_is_bound is True
            assert solution.status in (Status.CONVERGED, Status.STAGNATED)
            if solution.status == Status.CONVERGED:
                by_error += 1
                assert problem.error(solution.x) <= 2 * limit
                if problem.floor < 0.01 * limit:
                    assert problem.error(solution.x) <= limit
        iterations += solution.iterations

        def enough(k, problem=problem, limit=limit):  # CG's error never grows
            shorter = ig.CG(maxiter=k).solve(problem.operator, problem.rhs)
            return problem.error(shorter.x) <= limit

        needed += 1 + bisect.bisect_left(range(1, solution.iterations), True, key=enough)
    assert by_error > 0.8 * len(drawn)  # of twice as many solves
    assert iterations <= 1.6 * needed


@pytest.mark.parametrize("rtol_error", [1e-2, 1e-4])
def test_an_estimated_mu_is_called_an_estimate(rtol_error):
    within, total = 0, 0
    for problem in problems(F64)[:: 2 if LONG else 1]:
        solution = ig.CG().solve(problem.known(rtol_error=rtol_error), problem.rhs)
        if solution.error_is_bound is None:
            continue
        assert solution.error_is_bound is False and solution.status == Status.CONVERGED
        total += 1
        limit = rtol_error * problem.norm(solution.x.double().numpy())
        within += problem.error(solution.x) <= limit
    assert total > 75 and within >= 0.85 * total


@pytest.mark.parametrize("known_mu", [True, False])
@pytest.mark.parametrize("preconditioner", [ig.Jacobi(), ig.Nystrom(rank=4), lambda r: 3 * r])
def test_preconditioned_cg_stops_by_its_residual(preconditioner, known_mu):
    total = 0
    for problem in problems(F64)[::7]:
        known = problem.known(mu=problem.mu if known_mu else None, rtol_error=1e-3)
        solution = ig.CG(preconditioner=preconditioner).solve(known, problem.rhs)
        if solution.error_is_bound is None:
            continue
        total += 1
        assert solution.error_is_bound == known_mu
        limit = 1e-3 * problem.norm(solution.x.double().numpy())
        residual = known.residual_norm(problem.rhs - problem.matrix @ solution.x)
        mu = problem.mu if known_mu else solution.extremes[0] / float(problem.weights.max())
        assert residual <= 1.01 * mu * limit
        if known_mu:
            assert problem.error(solution.x) <= limit
    assert total > 10


def test_a_warm_start_is_measured_against_all_of_x():
    problem = convex("log-uniform", 3, F64)
    known = problem.known(mu=problem.mu, rtol_error=1e-3)
    solver = ig.CG(warm_start=ig.WarmStart())
    first = solver.solve(known, problem.rhs)
    second = solver.solve(known, problem.rhs * (1 + 1e-5))
    assert second.iterations <= 3 < first.iterations
    assert problem.error(second.x) <= 2e-3 * problem.norm(problem.exact)


@pytest.mark.parametrize("rtol_error", [1e-5, 1e-6])
def test_an_error_below_rounding_is_not_claimed(rtol_error):
    statuses = []
    for problem in problems(F32):
        known = problem.known(mu=problem.mu, rtol_error=rtol_error)
        solution = ig.CG(maxiter=300).solve(known, problem.rhs)
        if not solution.error_is_bound:
            continue
        statuses.append(solution.status)
        if solution.status == Status.CONVERGED:
            limit = rtol_error * problem.norm(solution.x.double().numpy())
            assert problem.error(solution.x) <= 2 * limit
    assert min(map(statuses.count, (Status.CONVERGED, Status.STAGNATED))) > SEEDS / 2
    assert set(statuses) == {Status.CONVERGED, Status.STAGNATED}


@pytest.mark.parametrize(
    "solver", [ig.MINRES(), ig.NormalCG(), ig.Exact(), ig.Neumann(), ig.CG(maxiter=0)]
)
def test_other_solvers_do_not_mind_a_wanted_error(solver):
    problem = convex("linear", 1, F64)
    with_goal = solver.solve(problem.known(mu=problem.mu, rtol_error=0.1), problem.rhs)
    without = solver.solve(problem.operator, problem.rhs)
    assert torch.equal(with_goal.x, without.x) and with_goal.error_is_bound is None


def test_the_watch_carries_the_bound_of_the_coefficients():
    problem = convex("log-uniform", 3, F64)
    solution = ig.CG(maxiter=12).solve(problem.operator, problem.rhs)
    start = problem.operator.residual_norm(problem.rhs) ** 2
    known, unknown = ErrorWatch(problem.mu, start), ErrorWatch(None, start)
    for row in solution.coefficients:
        known.note(*row)
        unknown.note(*row)
    energy = radau_bound(solution, problem.mu)
    assert math.isclose(known.error, math.sqrt(energy / problem.mu), rel_tol=1e-12)
    assert known.is_bound and not unknown.is_bound
    diagonal, least = unknown.mu, ritz_values(solution.coefficients)[0]
    assert not unknown.within(known.error / 100) and unknown.mu == diagonal
    assert unknown.within(1e9) and math.isclose(unknown.mu, least, rel_tol=1e-12)
    assert diagonal > least


def test_there_is_no_bound_where_the_solve_itself_refutes_mu():
    """A concave part of the loss leaves curvature between 0 and λ, which CG's Ritz values show."""
    matrix = torch.diag(torch.linspace(-0.9, 2.0, 12, dtype=torch.float64))  # λ = 1: A ⪰ 0.1
    theta, monitor = torch.ones(12, dtype=torch.float64, requires_grad=True), ig.Monitor()
    condition = ig.proximal(lambda w: w @ matrix @ w / 2, 1.0, convex=True)
    exact = torch.linalg.solve(matrix + torch.eye(12, dtype=torch.float64), theta.detach())
    solve = ig.implicit(
        lambda theta: exact, condition, linear_solver=ig.CG(maxiter=9), monitor=monitor
    )
    solve(theta).sum().backward()
    assert monitor.last.ritz_min < 0.9 and monitor.last.solve_error_bound is None


def test_no_error_is_estimated_from_a_ritz_value_that_is_not_positive():
    """Of a Lanczos matrix that is positive definite but for rounding."""
    watch = ErrorWatch(None, 1.0)
    for row in ((1.0, 1e20, 1.0), (1.0, 1.0, 1.0)):
        watch.note(*row)
    assert ritz_values([(1.0, 1e20, 1.0), (1.0, 1.0, 1.0)])[0] <= 0 < watch.mu
    assert not watch.within(1e300) and watch.error == math.inf


@pytest.mark.parametrize("said", [{}, {"convex": True}])
def test_a_loss_is_convex_only_if_that_is_said(said):
    theta, monitor = torch.ones(3, dtype=F64, requires_grad=True), ig.Monitor()
    condition = ig.proximal(lambda w: w.square().sum() / 2, 1.0, **said)
    ig.implicit(lambda theta: theta / 2, condition, monitor=monitor)(theta).sum().backward()
    assert (monitor.last.solve_error_bound is not None) == bool(said)


def test_gauss_newton_has_no_bound_by_the_convexity_of_the_loss():
    """log² of exp(φ) is convex in φ and not in the outputs: Gauss-Newton plus λ may be below λ."""

    def bound(curvature):
        monitor = ig.Monitor()
        condition = ig.proximal(
            lambda out: out.log().square().sum(), 1.0, convex=True, model=lambda phi: phi.exp()
        )
        theta = torch.tensor([0.0, 4.2], dtype=F64, requires_grad=True)
        solve = ig.implicit(
            lambda theta: theta.detach() / 3,
            condition,
            linear_solver=ig.CG(maxiter=1),
            curvature=curvature,
            monitor=monitor,
            on_failure="ignore",
        )
        solve(theta).backward(torch.tensor([1.0, 1e-3], dtype=F64))
        return monitor.last.solve_error_bound

    assert bound("gauss_newton") is None
    assert bound("hessian") > 0
