"""GMRES against dense algebra: what it solves, what it costs, and how it says that it cannot."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies
from systems import F32, F64, Counting, operator, orthogonal
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status


def system(n: int, kappa: float, seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Without symmetry, singular values from 1 to kappa."""
    random = torch.Generator().manual_seed(seed)
    values = kappa ** torch.linspace(0, 1, n, dtype=F64)
    matrix = orthogonal(n, random) @ torch.diag(values) @ orthogonal(n, random)
    return matrix.to(dtype), torch.randn(n, dtype=F64, generator=random).to(dtype)


def residual(matrix: Tensor, x: Tensor, rhs: Tensor) -> float:
    matrix, x, rhs = matrix.double(), x.double(), rhs.double()
    return float((rhs - matrix @ x).norm() / rhs.norm())


def shift(n: int) -> Tensor:
    """Turns e₁ into e₂, …, eₙ into e₁: its eigenvalues lie all around 0."""
    return torch.eye(n, dtype=F64).roll(1, dims=0)


def first(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)[0]


def transport(side: int = 20) -> tuple[Tensor, Tensor]:
    """Convection and diffusion on a square, by upwind differences, and its right-hand side."""
    h, wind = 1 / (side + 1), 40.0
    eye = torch.eye(side, dtype=F64)
    behind = torch.diag(torch.ones(side - 1, dtype=F64), -1)
    line = (2 * eye - behind - behind.T) / h**2 + wind * (eye - behind) / h
    matrix = torch.kron(line, eye) + torch.kron(eye, line)
    return matrix, torch.linspace(1, 2, side**2, dtype=F64)


# ---------------------------------------------------------------- it solves


@pytest.mark.parametrize(("dtype", "kappa", "error"), [(F64, 1e4, 1e-6), (F32, 30.0, 2e-3)])
def test_the_solution_is_that_of_a_dense_factorisation(dtype, kappa, error):
    for n in (1, 2, 5, 40):
        for seed in range(5):
            matrix, rhs = system(n, kappa, seed, dtype)
            found = ig.GMRES().solve(operator(matrix), rhs)
            exact = torch.linalg.solve(matrix.double(), rhs.double())
            assert found.status == Status.CONVERGED and found.x.dtype == dtype
            assert (found.x - exact).norm() <= error * exact.norm()
            assert found.iterations <= n or dtype == F32


@hypothesis.given(
    n=strategies.integers(1, 12),
    decades=strategies.floats(0, 18),
    magnitude=strategies.integers(-60, 60),
    restart=strategies.none() | strategies.integers(1, 14),
    seed=strategies.integers(0, 10**6),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_success_is_a_small_true_residual(n, decades, magnitude, restart, seed):
    matrix, rhs = system(n, 10**decades, seed)
    matrix = matrix * 10.0**magnitude
    found = ig.GMRES(restart=restart).solve(operator(matrix), rhs)
    true = residual(matrix, found.x, rhs)
    rounding = 1e-14 * float(torch.linalg.matrix_norm(matrix, 2) * found.x.norm() / rhs.norm())
    assert math.isclose(found.residual, true, rel_tol=1e-6, abs_tol=rounding)
    if found.status == Status.CONVERGED:
        assert true <= 2 * torch.finfo(F64).eps ** (2 / 3) + rounding
    else:
        assert found.status in (Status.MAX_ITER, Status.STAGNATED, Status.SINGULAR)
        assert true <= 1 + 1e-9 + rounding  # never worse than nothing
    if decades <= 6 and (restart is None or restart >= n):
        assert found.status == Status.CONVERGED


@pytest.mark.parametrize("n", [2, 9])
def test_a_matrix_that_turns_vectors_around_takes_a_vector_for_each_unknown(n):
    found = ig.GMRES().solve(operator(shift(n)), first(n))
    assert found.status == Status.CONVERGED and found.iterations == n
    torch.testing.assert_close(found.x, shift(n).T @ first(n))


def test_complex_eigenvalues_about_an_axis():
    blocks = [torch.tensor([[a, b], [-b, a]]) for a, b in ((0.1, 5.0), (1.0, -2.0), (-0.3, 1.0))]
    matrix, rhs = torch.block_diag(*blocks).double(), torch.linspace(1, 2, 6, dtype=F64)
    found = ig.GMRES().solve(operator(matrix), rhs)
    assert found.status == Status.CONVERGED
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-8)


def test_iterations_are_those_of_the_krylov_space():
    """After k products no vector of the space of k has a smaller residual."""
    matrix, rhs = system(12, 30.0, 0)
    powers = [rhs]
    for steps in range(1, 8):
        basis = torch.stack(powers, dim=1)
        basis = torch.linalg.qr(basis).Q
        best = torch.linalg.lstsq(matrix @ basis, rhs[:, None]).solution[:, 0]
        counting = Counting(matrix)
        found = ig.GMRES(maxiter=steps).solve(counting.operator, rhs)
        torch.testing.assert_close(found.x, basis @ best, rtol=1e-8, atol=1e-10)
        assert found.status == Status.MAX_ITER and found.iterations == steps
        assert counting.products == steps + 1  # the last one recomputes the residual
        powers.append(matrix @ powers[-1] / (matrix @ powers[-1]).norm())


def test_convection_and_diffusion_with_fewer_products_than_normal_cg():
    matrix, rhs = transport()
    exact = torch.linalg.solve(matrix, rhs)
    counts = []
    for solver in (ig.GMRES(), ig.NormalCG(maxiter=4000)):
        found = solver.solve(operator(matrix), rhs)
        assert found.status == Status.CONVERGED
        assert (found.x - exact).norm() <= 1e-7 * exact.norm()
        counts.append(found.iterations)
    assert 3 * counts[0] < 2 * counts[1] and counts[0] < 200


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("restart", [1, 5, 30])
def test_restarts_reach_the_same_solution_with_fewer_vectors(restart):
    matrix, rhs = system(60, 3.0, 0)
    matrix = matrix @ matrix.T + 0.5 * (matrix - matrix.T)  # the symmetric part is definite
    whole = ig.GMRES().solve(operator(matrix), rhs)
    cycled = ig.GMRES(restart=restart).solve(operator(matrix), rhs)
    assert whole.status == cycled.status == Status.CONVERGED
    assert cycled.iterations >= whole.iterations
    torch.testing.assert_close(cycled.x, whole.x, rtol=1e-7, atol=1e-7)


def test_cycles_that_lead_nowhere_are_not_repeated():
    found = ig.GMRES(restart=4).solve(operator(shift(9)), first(9))
    assert found.status == Status.STAGNATED and found.iterations <= 8  # one restart more
    assert "restart" in found.status.sentence


def test_a_budget_that_ends_early_is_the_budget_s_end():
    """Not rounding's: with more products the same system is solved."""
    found = ig.GMRES(maxiter=8).solve(operator(shift(9)), first(9))
    assert found.status == Status.MAX_ITER and found.iterations == 8
    assert ig.GMRES(maxiter=9).solve(operator(shift(9)), first(9)).status == Status.CONVERGED


# ---------------------------------------------------------------- preconditioners


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_preconditioner_of_any_scale_saves_products(scale):
    matrix, rhs = transport()
    inverse = torch.linalg.inv(matrix.tril()) * scale
    plain = ig.GMRES().solve(operator(matrix), rhs)
    found = ig.GMRES(preconditioner=lambda r: inverse @ r).solve(operator(matrix), rhs)
    assert found.status == Status.CONVERGED and found.iterations < plain.iterations
    exact = torch.linalg.solve(matrix, rhs)
    assert (found.x - exact).norm() <= 1e-7 * exact.norm()
    size = float(torch.linalg.matrix_norm(matrix, 2))
    assert 0.01 * size < found.norm <= size * (1 + 1e-9)  # ‖M‖, not that of the product with P


def test_the_inverse_as_preconditioner_takes_one_product():
    matrix, rhs = system(20, 1e3, 0)
    inverse = torch.linalg.inv(matrix)
    found = ig.GMRES(preconditioner=lambda r: inverse @ r).solve(operator(matrix), rhs)
    assert found.status == Status.CONVERGED and found.iterations == 1


def test_a_preconditioner_of_another_form_is_refused():
    matrix, rhs = system(4, 2.0, 0)
    with pytest.raises(ig.InvalidArgumentError, match=r"GMRES.preconditioner=.*same form"):
        ig.GMRES(preconditioner=lambda r: r[:2]).solve(operator(matrix), rhs)


@pytest.mark.parametrize("bad", [ig.Jacobi(), ig.Nystrom, "ilu", 3])
def test_what_is_no_function_is_no_preconditioner(bad):
    with pytest.raises(ig.InvalidArgumentError, match="preconditioner"):
        ig.GMRES(preconditioner=bad)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "20"])
def test_restart_is_a_positive_integer(bad):
    with pytest.raises(ig.InvalidArgumentError, match=r"restart=.*at least 1"):
        ig.GMRES(restart=bad)


# ---------------------------------------------------------------- it cannot


@pytest.mark.parametrize("dtype", [F64, F32])
def test_singular_systems_are_told_where_there_is_no_solution(dtype):
    for n in (2, 8, 30):
        matrix, rhs = system(n, 10.0, 0)
        left, values, right = torch.linalg.svd(matrix)
        values[-1] = 0.0
        matrix = (left @ torch.diag(values) @ right).to(dtype)
        found = ig.GMRES().solve(operator(matrix), rhs.to(dtype))
        assert not found.status.ok
        assert torch.isfinite(found.x).all() and found.residual <= 1 + 1e-6


def test_the_zero_matrix_is_singular():
    found = ig.GMRES().solve(operator(torch.zeros(3, 3, dtype=F64)), torch.ones(3, dtype=F64))
    assert found.status == Status.SINGULAR and not found.x.any() and found.residual == 1.0


def test_a_nilpotent_matrix_is_singular():
    matrix = torch.diag(torch.ones(3, dtype=F64), -1)
    found = ig.GMRES().solve(operator(matrix), first(4))
    assert found.status == Status.SINGULAR and found.residual >= 1 - 1e-12


def test_a_consistent_singular_system_is_solved_or_told():
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        matrix, rhs = system(9, 10.0, seed)
        matrix[:, 0] = matrix[:, 1]
        rhs = matrix @ torch.randn(9, dtype=F64, generator=random)
        found = ig.GMRES().solve(operator(matrix), rhs)
        true = residual(matrix, found.x, rhs)
        assert true < 1e-9 if found.status.ok else found.status == Status.SINGULAR


@pytest.mark.parametrize("kappa", [1e15, 1e17])
def test_a_matrix_singular_but_for_rounding_is_singular(kappa):
    """Whether a column of H vanishes, or y is so long that rounding hides the right side."""
    matrix, rhs = system(10, kappa, 0)
    assert ig.GMRES().solve(operator(matrix), rhs).status == Status.SINGULAR


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told(bad):
    matrix, rhs = system(5, 2.0, 0)
    spoilt = matrix.clone()
    spoilt[2, 3] = bad
    found = ig.GMRES().solve(operator(spoilt), rhs)
    assert found.status == Status.NONFINITE_OPERATOR and found.x.isnan().all()
    spoilt = rhs.clone()
    spoilt[2] = bad
    assert ig.GMRES().solve(operator(matrix), spoilt).status == Status.NONFINITE_RHS


def test_nothing_asked_takes_no_product():
    counting = Counting(torch.eye(3, dtype=F64))
    found = ig.GMRES().solve(counting.operator, torch.zeros(3, dtype=F64))
    assert found.status == Status.ZERO_RHS and not found.x.any() and counting.products == 0


# ---------------------------------------------------------------- the default, with NormalCG


def rotation(phi: Tensor, theta: Tensor) -> Tensor:
    """Its Jacobian is a shift of more unknowns than the basis has vectors for."""
    return phi.roll(1) - theta


def test_the_default_goes_on_with_normal_cg_where_gmres_gets_nowhere(monkeypatch):
    gmres = "implicit_grad._linear_solvers.gmres"
    monkeypatch.setattr(f"{gmres}._NUMBERS", 0)  # 20 vectors, as with a million of unknowns
    theta = torch.linspace(0, 1, 50, dtype=F64).requires_grad_()
    weights = first(50)
    monitor = ig.Monitor()
    kept = {"on_failure": "raise", "monitor": monitor}
    solve = ig.implicit(lambda t: t.roll(-1), ig.root(rotation), **kept)
    (solve(theta) @ weights).backward()
    torch.testing.assert_close(theta.grad, weights.roll(1))
    assert monitor.last.status == Status.CONVERGED and monitor.last.iterations > 20
    alone = ig.implicit(
        lambda t: t.roll(-1), ig.root(rotation), linear_solver=ig.GMRES(), on_failure="raise"
    )
    with pytest.raises(ig.LinearSolveError, match="restart"):
        (alone(theta) @ weights).backward()


def test_a_preconditioner_that_is_not_finite_is_named():
    system = operator(torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)))
    solution = ig.GMRES(preconditioner=lambda r: r * math.nan).solve(system, torch.ones(4).double())
    assert solution.status is Status.BAD_PRECONDITIONER
