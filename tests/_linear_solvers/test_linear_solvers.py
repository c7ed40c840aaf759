"""Every linear solver against dense algebra: what it must solve, and what it may say otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from systems import (
    F32,
    F64,
    Counting,
    indefinite,
    low_rank_plus_identity,
    operator,
    orthogonal,
    symmetric,
)
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator
from implicit_grad._linear_solvers.general import General

SIZES = (0, 1, 2, 7, 60)


# dtype of the vectors, dtype of the matrix and its products, condition numbers
PRECISIONS = {
    "float64": (F64, F64, (1.0, 30.0, 1e3, 1e8)),
    "float32": (F32, F32, (1.0, 30.0, 1e3)),
    "bfloat16": (F32, torch.bfloat16, (1.0, 4.0)),
}


def spectrum(kind: str, n: int, kappa: float, random: torch.Generator) -> Tensor:
    """Sizes from 1 to kappa, with the signs and zeros of a kind of matrix."""
    values = kappa ** torch.rand(n, dtype=F64, generator=random)
    values[:1], values[-1:] = kappa, 1.0
    if kind == "indefinite":
        values[: n // 2] *= -1
    if kind in ("consistent", "inconsistent"):
        values[-max(1, n // 10) :] = 0.0
    return values


@dataclass(frozen=True)
class System:
    matrix: Tensor  # as the operator has it
    rhs: Tensor

    @staticmethod
    def draw(kind: str, n: int, kappa: float, precision: str, seed: int) -> System:
        vectors, products, _ = PRECISIONS[precision]
        name = f"{kind} {n} {kappa} {precision} {seed}"
        random = torch.Generator().manual_seed(crc32(name.encode()))
        values = spectrum(kind, n, kappa, random)
        if kind == "nonsymmetric":
            matrix = orthogonal(n, random) @ torch.diag(values) @ orthogonal(n, random)
        elif precision == "bfloat16" and kind in ("consistent", "inconsistent"):
            matrix = torch.diag(values)  # rounding would take the singularity away
        else:
            matrix = symmetric(values, random)
        rhs = torch.randn(n, dtype=F64, generator=random)
        if kind == "consistent":
            rhs = matrix @ rhs
        return System(matrix.to(products), rhs.to(vectors))

    @property
    def operator(self) -> Operator:
        return operator(self.matrix, self.rhs)

    def residual(self, x: Tensor) -> float:
        rhs = self.rhs.double()
        return float((rhs - self.matrix.double() @ x.double()).norm() / rhs.norm())

    def error(self, x: Tensor) -> float:
        exact = torch.linalg.solve(self.matrix.double(), self.rhs.double())
        return float((x.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Row:
    """A solver (for a matrix), the condition numbers up to which it must solve each kind of
    system, and how it may end where it need not."""

    make: Callable[[System], LinearSolver]
    solves: dict[str, float]
    otherwise: set[Status]
    exact: bool = False
    kinds: set[str] = field(default_factory=lambda: set(KINDS))


KINDS = ("definite", "indefinite", "nonsymmetric", "consistent", "inconsistent")


SYMMETRIC = set(KINDS) - {"nonsymmetric"}


SLOW = {Status.MAX_ITER, Status.STAGNATED}


BREAKS = SLOW | {Status.NEGATIVE_CURVATURE, Status.SINGULAR}


DEFINITE = {"definite": 1e3, "consistent": 30.0}


def diagonal(system: System) -> Callable[[Tensor], Tensor]:
    sizes = system.matrix.diagonal().abs().to(system.rhs.dtype).clamp(min=1e-3)
    return lambda r: r / sizes


def warmed(system: System) -> LinearSolver:
    solver = ig.CG(warm_start=ig.WarmStart())
    if len(system.rhs):
        solver.solve(system.operator, system.rhs + 0.1 * system.rhs.flip(0))
    return solver


def reusing(system) -> ig.CG:
    """With what was built for a system close by."""
    kept = ig.Reuse(ig.Nystrom(rank=5))
    if len(system.rhs):
        known = system.operator
        near = dataclasses.replace(known, matvec=lambda x: known.matvec(x) + 0.01 * x)
        kept.build(near, system.rhs)
    return ig.CG(preconditioner=kept)


ROWS = {
    "CG": Row(lambda _: ig.CG(), DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG+Jacobi": Row(
        lambda _: ig.CG(preconditioner=ig.Jacobi()), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Jacobi(probes)": Row(
        lambda _: ig.CG(preconditioner=ig.Jacobi(probes=20)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Nystrom": Row(
        lambda _: ig.CG(preconditioner=ig.Nystrom(rank=5)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Cholesky": Row(
        lambda _: ig.CG(preconditioner=ig.Cholesky()), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Reuse": Row(reusing, DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG+callable": Row(
        lambda s: ig.CG(preconditioner=diagonal(s)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+warm": Row(warmed, DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG->MINRES": Row(
        lambda _: ig.CG(on_negative_curvature="minres"),
        DEFINITE | {"indefinite": 30.0},
        SLOW | {Status.SINGULAR},
        kinds=SYMMETRIC,
    ),
    "MINRES": Row(
        lambda _: ig.MINRES(),
        {"definite": 30.0, "indefinite": 30.0, "consistent": 30.0},
        SLOW | {Status.SINGULAR},
        kinds=SYMMETRIC,
    ),
    "GMRES": Row(
        lambda _: ig.GMRES(),
        dict.fromkeys(KINDS[:3], 1e3) | {"consistent": 30.0},
        SLOW | {Status.SINGULAR},
    ),
    "GMRES+callable": Row(
        lambda s: ig.GMRES(preconditioner=diagonal(s)),
        dict.fromkeys(KINDS[:3], 1e3),
        SLOW | {Status.SINGULAR},
    ),
    "GMRES->NormalCG": Row(
        lambda _: General(),
        dict.fromkeys(KINDS[:3], 1e3) | {"consistent": 30.0},
        SLOW | {Status.SINGULAR},
    ),
    "NormalCG": Row(
        lambda _: ig.NormalCG(),
        dict.fromkeys(KINDS[:4], 30.0),
        SLOW | {Status.SINGULAR},
    ),
    "Neumann": Row(
        lambda _: ig.Neumann(terms=1000),
        {"definite": 30.0, "consistent": 30.0},
        {Status.TRUNCATED, Status.DIVERGED, Status.SINGULAR},
    ),
    "Exact": Row(
        lambda _: ig.Exact(),
        dict.fromkeys(KINDS[:3], 1e8),
        {Status.SINGULAR},
        exact=True,
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ROWS)
def test_solved_as_promised_or_honest(name, precision):
    row, (_, products, kappas) = ROWS[name], PRECISIONS[precision]
    eps = torch.finfo(products).eps
    cases = [(k, n, c) for k in row.kinds for n in SIZES for c in kappas]
    for seed, (kind, n, kappa) in enumerate(cases):
        system = System.draw(kind, n, kappa, precision, seed)
        where = (name, kind, n, kappa, precision, seed)
        solution = row.make(system).solve(system.operator, system.rhs)
        status, x = solution.status, solution.x
        assert x.shape == system.rhs.shape and x.dtype == system.rhs.dtype, where
        if n == 0 or not system.rhs.any():
            assert status == Status.ZERO_RHS and not x.any(), where
            continue
        assert bool(torch.isfinite(x).all()) or status == Status.SINGULAR, where
        done = status in (Status.CONVERGED, Status.EXACT)
        assert done or status in row.otherwise, (*where, status, solution.residual)
        assert done or not kappa <= row.solves.get(kind, 0.0), (*where, status, solution.residual)
        if bool(torch.isfinite(x).all()):
            true = system.residual(x)
            slack = 4 * eps * (1 + kappa * float(x.norm() / system.rhs.norm()))
            assert math.isclose(solution.residual, true, rel_tol=1e-2, abs_tol=slack), where
        if not done:
            continue
        if row.exact:
            assert status == Status.EXACT and kind != "inconsistent", where
            if kind == "consistent":  # singular only by unknowns that stand in no equation
                assert not system.matrix.any(0).all(), where
                continue
            assert system.error(x) <= 4 * n * torch.finfo(x.dtype).eps * kappa, where
            continue
        promised = 2 * eps ** (2 / 3)
        assert true <= promised + slack, (*where, true)
        if kind not in ("consistent", "inconsistent"):
            assert system.error(x) <= 1.5 * kappa * (promised + slack), where


def test_how_many_systems():
    count = sum(
        len(row.kinds) * len(SIZES) * len(kappas)
        for row in ROWS.values()
        for *_, kappas in PRECISIONS.values()
    )
    assert count >= 1_000


# ---------------------------------------------------------------- Neumann, MINRES, Exact


@pytest.mark.parametrize("symmetric_", [True, False])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_the_neumann_series_has_its_terms(terms, symmetric_):
    random = torch.Generator().manual_seed(0)
    matrix = torch.eye(9, dtype=F64) + 0.2 * torch.randn(9, 9, dtype=F64, generator=random)
    matrix = (matrix + matrix.T) / 2 if symmetric_ else matrix
    rhs = torch.randn(9, dtype=F64, generator=random)
    step = torch.eye(9, dtype=F64) - 0.5 * matrix
    expected = 0.5 * sum(torch.linalg.matrix_power(step, k) @ rhs for k in range(terms))
    solution = ig.Neumann(terms=terms, scale=0.5).solve(operator(matrix), rhs)
    torch.testing.assert_close(solution.x, expected)
    assert solution.status == Status.TRUNCATED and solution.iterations == terms
    true = float((rhs - matrix @ expected).norm() / rhs.norm())
    assert math.isclose(solution.residual, true, rel_tol=1e-10)


def test_neumann_finds_its_scale_and_notices_divergence():
    random = torch.Generator().manual_seed(0)
    for top in (1e-3, 1.0, 1e5):
        matrix = symmetric(torch.linspace(top / 5, top, 50, dtype=F64), random)
        rhs = torch.randn(50, dtype=F64, generator=random)
        before = torch.get_rng_state()
        found = ig.Neumann(terms=300).solve(operator(matrix), rhs)
        assert torch.equal(torch.get_rng_state(), before)
        assert found.status == Status.CONVERGED and found.iterations <= 8 + 150
        exact = torch.linalg.solve(matrix, rhs)
        assert float((found.x - exact).norm() / exact.norm()) < 1e-9
        for diverging in (
            ig.Neumann(terms=20, scale=2.3 / top).solve(operator(matrix), rhs),
            ig.Neumann(terms=20).solve(operator(-matrix), rhs),
            ig.Neumann(terms=4000, scale=3.0 / top).solve(operator(matrix), rhs),
        ):
            assert diverging.status == Status.DIVERGED and not diverging.status.ok
            assert "smaller scale" in diverging.status.sentence
    zero = ig.Neumann().solve(operator(torch.zeros(3, 3, dtype=F64)), torch.ones(3, dtype=F64))
    assert zero.status == Status.SINGULAR


def test_neumann_notices_growth_before_it_shows():
    """A negative eigenvalue whose component is small still: the residual is small but grows."""
    matrix = torch.diag(torch.tensor([1.0, 0.9, -0.5], dtype=F64))
    rhs = torch.tensor([1.0, 1.0, 1e-4], dtype=F64)
    solution = ig.Neumann(terms=15, scale=1.0).solve(operator(matrix), rhs)
    assert solution.residual < 0.1 and solution.status == Status.DIVERGED


def test_a_neumann_series_cut_off_on_its_hump_is_reported():
    """Far from normal, terms grow before they shrink: such a sum is worse than 0."""
    matrix = torch.tensor([[0.5, -10.0], [0.0, 0.5]], dtype=F64)
    rhs = torch.tensor([0.0, 1.0], dtype=F64)
    cut = ig.Neumann(terms=4, scale=1.0).solve(operator(matrix), rhs)
    assert cut.residual > 1 and cut.status == Status.DIVERGED
    whole = ig.Neumann(terms=100, scale=1.0).solve(operator(matrix), rhs)
    assert whole.status == Status.CONVERGED
    torch.testing.assert_close(whole.x, torch.linalg.solve(matrix, rhs))


def test_minres_has_the_least_residual_of_the_krylov_space():
    for scale in (None, 0.3, torch.linspace(0.5, 2.0, 12, dtype=F64)):
        random = torch.Generator().manual_seed(1)
        values = torch.tensor([-3.0, -1, -0.5, *range(1, 10)], dtype=F64)
        matrix = symmetric(values, random)
        rhs = torch.randn(12, dtype=F64, generator=random)
        weights = torch.ones(12, dtype=F64) * (1.0 if scale is None else scale)
        powers = [rhs / weights]
        for steps in range(1, 6):
            basis = torch.stack(powers, dim=1)
            root = weights.rsqrt()[:, None]
            least = torch.linalg.lstsq(root * (matrix @ basis), root * rhs[:, None]).solution
            found = ig.MINRES(maxiter=steps).solve(operator(matrix, scale=scale), rhs)
            torch.testing.assert_close(found.x, (basis @ least)[:, 0], rtol=1e-8, atol=1e-10)
            assert found.status == Status.TRUNCATED and found.iterations == steps
            assert found.gap < 1e-13 and -3 <= found.extremes[0] <= found.extremes[1] <= 9
            powers.append(matrix @ powers[-1] / weights)
        found = ig.MINRES().solve(operator(matrix, scale=scale), rhs)
        assert -3 - 1e-9 <= found.extremes[0] < 0 and found.status == Status.CONVERGED


def test_minres_damps():
    matrix, rhs = indefinite(3)
    found = ig.MINRES(rtol=1e-12, damping=0.7).solve(operator(matrix), rhs).x
    shifted = matrix + 0.7 * torch.eye(60, dtype=F64)
    torch.testing.assert_close(found, torch.linalg.solve(shifted, rhs), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [ig.MINRES(), ig.NormalCG()])
def test_inconsistent_systems_get_a_least_squares_solution(solver):
    for seed in range(20):
        system = System.draw("inconsistent", 60, 30.0, "float64", seed)
        found = solver.solve(system.operator, system.rhs)
        assert found.status == Status.SINGULAR and found.iterations < 180
        least = torch.linalg.lstsq(system.matrix, system.rhs[:, None], driver="gelsd").solution
        best = system.residual(least[:, 0])
        assert best * (1 - 1e-9) <= found.residual <= best * (1 + 1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_exact_reports_the_extreme_eigenvalues_of_symmetric_matrices(sign):
    values = torch.linspace(1.0, 5.0, 9, dtype=F64)
    values[::2] *= sign or 1.0
    random = torch.Generator().manual_seed(0)
    matrix = symmetric(values, random)
    if sign == 0.0:
        matrix = matrix + torch.triu(torch.ones(9, 9, dtype=F64), 1)
    rhs = torch.randn(9, dtype=F64, generator=random)
    found = ig.Exact().solve(operator(matrix), rhs)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-12, atol=1e-12)
    assert found.status == Status.EXACT and (found.extremes is None) == (sign == 0.0)
    if sign:
        torch.testing.assert_close(found.extremes, (float(values.min()), float(values.max())))


def test_exact_takes_rounded_matrices_for_symmetric_and_no_others():
    random = torch.Generator().manual_seed(0)
    matrix = symmetric(torch.linspace(1.0, 3.0, 50, dtype=F64), random).float()
    rhs = torch.randn(50, generator=random)
    rounded = matrix * (1 + 0.004 * (torch.rand(50, 50, generator=random) - 0.5))
    coarse = Operator(lambda x: rounded @ x, lambda x: rounded.T @ x, eps=2.0**-8)
    assert ig.Exact().solve(coarse, rhs).extremes is not None
    assert ig.Exact().solve(operator(rounded), rhs).extremes is None
    skewed = matrix + 0.1 * torch.triu(torch.ones(50, 50))
    assert (
        ig.Exact().solve(Operator(skewed.matmul, skewed.T.matmul, eps=2.0**-8), rhs).extremes
        is None
    )


@pytest.mark.parametrize("factor", ["ldl_factor_ex", "ldl_solve"])
def test_exact_does_without_ldl_where_a_device_lacks_it(factor, monkeypatch):
    def absent(*_):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.linalg, factor, absent)
    matrix, rhs = indefinite(0)
    found = ig.Exact().solve(operator(matrix), rhs)
    assert found.status == Status.EXACT
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [ig.CG, ig.MINRES])
def test_a_fixed_budget_does_not_warn_of_rounding(solver):
    """It promised no tolerance; where rounding ends it early, that is all it could do."""
    system = System.draw("definite", 60, 1e3, "float32", 0)
    statuses = {
        solver(maxiter=k).solve(system.operator, system.rhs, verify=verify).status
        for k in (1, 30, 300, 900)
        for verify in (True, False)
    }
    assert statuses <= {Status.TRUNCATED, Status.CONVERGED}
    asked = solver(maxiter=900, rtol=1e-7).solve(system.operator, system.rhs)
    assert asked.status in (Status.STAGNATED, Status.MAX_ITER)


@pytest.mark.parametrize(("kappa", "most"), [(30.0, 100), (1e3, 300)])
def test_cg_notices_steps_that_lead_nowhere(kappa, most):
    for seed in range(3):
        system = System.draw("inconsistent", 60, kappa, "bfloat16", seed)
        solution = ig.CG(maxiter=3000).solve(system.operator, system.rhs)
        assert solution.status == Status.SINGULAR and solution.iterations < most


def test_minres_ends_where_rounding_lets_it_gain_nothing():
    for seed in range(5):
        system = System.draw("indefinite", 40, 1e5, "float64", seed)
        asked = ig.MINRES(maxiter=2000, rtol=1e-15).solve(system.operator, system.rhs)
        fixed = ig.MINRES(maxiter=2000).solve(system.operator, system.rhs)
        assert asked.status == Status.STAGNATED and asked.iterations < 2000
        assert fixed.status == Status.TRUNCATED and fixed.iterations < 2000


@pytest.mark.parametrize(
    ("solver", "rtol_error", "promised"),
    [
        (ig.CG(), None, True),
        (ig.CG(maxiter=3, rtol=1e-3), None, True),
        (ig.CG(maxiter=3), 0.1, True),
        (ig.CG(maxiter=3), None, False),
        (ig.MINRES(maxiter=3, rtol=1e-3), None, True),
        (ig.MINRES(maxiter=3), None, False),
    ],
)
def test_the_residual_is_recomputed_where_something_was_promised(solver, rtol_error, promised):
    system = System.draw("definite", 60, 30.0, "float64", 0)
    counting = Counting(system.matrix)
    known = dataclasses.replace(counting.operator, rtol_error=rtol_error)
    unverified = solver.solve(known, system.rhs, verify=False)
    assert (unverified.residual is not None) == promised
    assert counting.products == unverified.iterations + promised
    assert solver.solve(known, system.rhs).residual is not None


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("solver", [ig.CG, ig.MINRES, ig.NormalCG, ig.Neumann, ig.Exact])
def test_options_go_by_name(solver):
    with pytest.raises(TypeError):
        solver(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ig.MINRES(maxiter=0), r"MINRES\(maxiter=0\): expected None or an integer of at"),
        (lambda: ig.MINRES(rtol=2.0), r"MINRES\(rtol=2.0\)"),
        (lambda: ig.MINRES(atol=-1.0), r"MINRES\(atol=-1.0\)"),
        (lambda: ig.MINRES(damping=-1.0), r"MINRES\(damping=-1.0\): expected a finite"),
        (lambda: ig.CG(damping=math.nan), r"CG\(damping=nan\)"),
        (lambda: ig.CG(on_negative_curvature="ggn"), r'"stop", "raise", "minres" or "gauss'),
        (lambda: ig.CG(preconditioner=ig.Jacobi), r"CG\(preconditioner=<class .*Jacobi\(\)"),
        (lambda: ig.CG(preconditioner=3), r"CG\(preconditioner=3\): expected None, Jacobi\(\)"),
        (lambda: ig.CG(warm_start=True), r"CG\(warm_start=True\): expected None or a WarmStart"),
        (lambda: ig.Neumann(terms=0), r"Neumann\(terms=0\): expected an integer of at least 1"),
        (lambda: ig.Neumann(terms=True), r"Neumann\(terms=True\)"),
        (lambda: ig.Neumann(scale=0.0), r"Neumann\(scale=0.0\)"),
        (lambda: ig.Neumann(scale=math.inf), r"Neumann\(scale=inf\)"),
        (lambda: ig.Jacobi(probes=1), r"Jacobi\(probes=1\): expected None or an integer of at"),
        (lambda: ig.Nystrom(rank=0), r"Nystrom\(rank=0\): expected an integer of at least 1"),
        (lambda: ig.Cholesky(max_size=0), r"Cholesky\(max_size=0\): expected an integer of at"),
        (lambda: ig.Reuse(ig.Jacobi), r"Reuse\(<class .*expected Cholesky\(\), Nystrom\(rank="),
        (lambda: ig.Reuse(lambda r: r), r"Reuse\(<function"),
        (lambda: ig.Reuse(ig.Jacobi(), solves=0), r"Reuse\(solves=0\): expected an integer of at"),
        (lambda: ig.Exact(max_size=0), r"Exact\(max_size=0\): expected an integer of at least 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (ig.Exact(max_size=5), "dense 6 × 6 matrix; its max_size is 5"),
        (ig.CG(preconditioner=ig.Cholesky(max_size=5)), r"6 × 6 matrix.*5\. Use Nystrom"),
        (ig.CG(preconditioner=ig.Jacobi(max_size=5)), r"6 products for 6 unknowns.*probes=10"),
    ],
)
def test_systems_that_are_too_large_are_refused(solver, message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        solver.solve(operator(torch.eye(6, dtype=F64)), torch.ones(6, dtype=F64))


def test_results_of_equal_solves_are_equal():
    matrix, rhs = low_rank_plus_identity(0, 40)

    def once(row: Row) -> LinearSolution:
        return row.make(System(matrix, rhs)).solve(operator(matrix), rhs)

    for row in ROWS.values():
        one, other = once(row), once(row)
        assert torch.equal(one.x, other.x) and one.iterations == other.iterations


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("asked", [0.0, 1.0])
def test_exact_lets_be_what_stands_in_no_equation(symmetric, asked):
    matrix = torch.zeros(5, 5, dtype=F64)
    part = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    part = part @ part.mT + torch.eye(3) + (0 if symmetric else torch.ones(3, 3).triu(1))
    at = torch.tensor([0, 2, 4])
    matrix[at[:, None], at] = part.to(F64)
    rhs = torch.tensor([1.0, 0.0, 2.0, asked, 3.0], dtype=F64)
    found = ig.Exact().solve(operator(matrix), rhs)
    if asked:
        assert found.status == Status.SINGULAR
        return
    assert found.status == Status.EXACT and not found.x[[1, 3]].any()
    torch.testing.assert_close(found.x[at], torch.linalg.solve(part, rhs[at]))
