"""Roots and fixed points said to have a symmetric Jacobian, of either sign; and false promises."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import normal
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status

F64 = torch.float64
N = 12


EIGENVALUES = {
    "positive": torch.linspace(0.5, 4.0, N, dtype=F64),
    "negative": -torch.linspace(0.5, 4.0, N, dtype=F64),
    "indefinite": torch.linspace(-3.0, 4.1, N, dtype=F64),
}


def symmetric(kind: str) -> Tensor:
    basis = torch.linalg.qr(normal(N, N, seed=1, grad=False)).Q
    matrix = basis @ torch.diag(EIGENVALUES[kind]) @ basis.T
    return (matrix + matrix.T) / 2


def skewed(kind: str) -> Tensor:
    return symmetric(kind) + torch.diag(torch.full((N - 1,), 0.8, dtype=F64), 1)


V = torch.linspace(1.0, -0.5, N, dtype=F64)


def gradient(matrix, linear_solver=None, on_failure="raise", promise=True, monitor=None):
    """Of v·φ with respect to θ and c, where A φ + c·θ = 0; and in closed form."""
    theta, c = normal(N, seed=2), torch.tensor(1.3, dtype=F64, requires_grad=True)
    solve = ig.implicit(
        lambda t, c: torch.linalg.solve(matrix, -c * t),
        ig.root(lambda phi, t, c: matrix @ phi + c * t, symmetric=promise),
        linear_solver=linear_solver,
        on_failure=on_failure,
        monitor=monitor,
    )
    found = torch.autograd.grad(solve(theta, c) @ V, (theta, c))
    u = torch.linalg.solve(matrix.T, -V)
    return found, (c.detach() * u, u @ theta.detach())


def assert_right(found, expected, rtol=1e-8):
    for actual, exact in zip(found, expected, strict=True):
        assert (actual - exact).norm() <= rtol * exact.norm()


DEFINITE = {
    "CG": ig.CG(),
    "CG+Jacobi": ig.CG(preconditioner=ig.Jacobi()),
    "CG+Nystrom": ig.CG(preconditioner=ig.Nystrom(rank=4)),
    "CG+Reuse": ig.CG(preconditioner=ig.Reuse(ig.Cholesky())),
    "CG+warm": ig.CG(warm_start=ig.WarmStart()),
}


ANY = {
    "default": None,
    "MINRES": ig.MINRES(),
    "CG->MINRES": ig.CG(on_negative_curvature="minres"),
    "Exact": ig.Exact(),
    "GMRES": ig.GMRES(),
    "NormalCG": ig.NormalCG(),
}


# ---------------------------------------------------------------- the promise is kept


@pytest.mark.parametrize("kind", EIGENVALUES)
@pytest.mark.parametrize("name", ANY)
def test_any_symmetric_matrix(kind, name):
    assert_right(*gradient(symmetric(kind), ANY[name]))


@pytest.mark.parametrize("kind", ["positive", "negative"])
@pytest.mark.parametrize("name", DEFINITE)
def test_cg_takes_definite_matrices_of_either_sign(kind, name):
    for _ in range(2):  # what is kept from the first solve serves the second
        assert_right(*gradient(symmetric(kind), DEFINITE[name]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_the_sign_of_a_preconditioner_is_the_matrix_s(kind, sign):
    """Its author may have thought of A⁻¹ or of |A|⁻¹."""
    inverse = sign * torch.linalg.inv(symmetric(kind))
    monitor = ig.Monitor()
    solver = ig.CG(preconditioner=lambda r: inverse @ r)
    assert_right(*gradient(symmetric(kind), solver, monitor=monitor))
    assert monitor.last.iterations == 1


def test_the_default_is_minres_with_a_product_an_iteration():
    counts = {}
    for promise in (True, False):
        monitor = ig.Monitor()
        assert_right(*gradient(symmetric("indefinite"), promise=promise, monitor=monitor))
        counts[promise] = monitor.last.products
    assert counts[True] <= N + 3 and counts[False] <= N + 3


def test_a_truncated_negative_definite_solve_is_that_of_the_negated_system():
    monitor = ig.Monitor()
    solver = ig.CG(maxiter=3)
    (found, _), _ = gradient(symmetric("negative"), solver, monitor=monitor)
    (mirrored, _), _ = gradient(-symmetric("negative"), solver)
    torch.testing.assert_close(found, -mirrored)
    assert monitor.last.status == Status.TRUNCATED


def test_second_derivatives():
    theta = normal(N, seed=3)
    laplacian = -symmetric("positive")

    def residual(phi, t):
        return laplacian @ phi - phi**3 + t

    def solver(t):
        phi = torch.zeros_like(t)
        for _ in range(40):
            slope = laplacian - 3 * torch.diag(phi**2)
            phi = phi - torch.linalg.solve(slope, residual(phi, t))
        return phi

    solve = ig.implicit(
        solver,
        ig.root(residual, symmetric=True),
        linear_solver=ig.CG(rtol=1e-13),
        on_failure="raise",
    )
    closed = torch.autograd.functional.hessian(lambda t: solver(t) @ V, theta.detach())
    (slope,) = torch.autograd.grad(solve(theta) @ V, theta, create_graph=True)
    rows = [torch.autograd.grad(s, theta, retain_graph=True)[0] for s in slope]
    torch.testing.assert_close(torch.stack(rows), closed, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("linear_solver", [None, ig.CG()], ids=["default", "CG"])
def test_a_fixed_point_of_gradient_steps(linear_solver):
    matrix, theta = symmetric("positive"), normal(N, seed=4)

    def step(phi, t):
        return phi - 0.2 * (matrix @ phi - t)

    solve = ig.implicit(
        lambda t: torch.linalg.solve(matrix, t),
        ig.fixed_point(step, symmetric=True),
        linear_solver=linear_solver,
        on_failure="raise",
    )
    (found,) = torch.autograd.grad(solve(theta) @ V, theta)
    assert_right([found], [torch.linalg.solve(matrix, V)])


# ---------------------------------------------------------------- it is not


def test_cg_stops_where_the_matrix_is_indefinite():
    with pytest.raises(ig.LinearSolveError, match=r"curvature of both signs.*MINRES"):
        gradient(symmetric("indefinite"), ig.CG())
    monitor = ig.Monitor()
    gradient(symmetric("indefinite"), ig.CG(), on_failure="ignore", monitor=monitor)
    assert monitor.last.status == Status.INDEFINITE


@pytest.mark.parametrize("kind", EIGENVALUES)
@pytest.mark.parametrize(
    "solver",
    [None, ig.CG(), ig.CG(maxiter=3), ig.MINRES(maxiter=3), ig.MINRES(rtol=1e-12)],
    ids=["default", "CG", "CG(3)", "MINRES(3)", "MINRES(1e-12)"],
)
def test_a_promise_that_was_not_kept_is_told(kind, solver):
    monitor = ig.Monitor()
    found, expected = gradient(skewed(kind), solver, on_failure="ignore", monitor=monitor)
    if monitor.last.status.ok and monitor.last.status != Status.TRUNCATED:
        assert_right(found, expected, rtol=1e-6)  # nobody's word was needed
    else:
        assert monitor.last.status == Status.NOT_SYMMETRIC
        assert "Leave symmetric=True out" in Status.NOT_SYMMETRIC.sentence


def test_the_default_tells_a_broken_promise():
    with pytest.raises(ig.LinearSolveError, match="not symmetric, though symmetric=True"):
        gradient(skewed("positive"))


@pytest.mark.parametrize("solver", [ig.GMRES(), ig.NormalCG(), ig.Exact()])
def test_solvers_that_need_no_symmetry_take_nobody_s_word(solver):
    assert_right(*gradient(skewed("indefinite"), solver))


@pytest.mark.parametrize("solver", [ig.CG(), ig.MINRES()])
def test_without_the_promise_symmetric_solvers_are_refused(solver):
    with pytest.raises(ig.InvalidArgumentError, match=r"GMRES\(\).*symmetric=True"):
        gradient(symmetric("positive"), solver, promise=False)


@pytest.mark.parametrize("make", [ig.root, ig.fixed_point])
@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_the_promise_is_true_or_false(make, bad):
    with pytest.raises(ig.InvalidArgumentError, match=r"symmetric=.*True or False"):
        make(lambda phi: phi, symmetric=bad)


def test_gauss_newton_is_for_minima():
    solver = ig.CG(on_negative_curvature="gauss_newton")
    with pytest.raises(ig.InvalidArgumentError, match="for minima, not for root"):
        gradient(symmetric("positive"), solver)


def test_no_random_number_of_the_user_s_is_drawn():
    before = torch.get_rng_state()
    run = functools.partial(gradient, skewed("positive"), ig.CG(maxiter=2))
    run(on_failure="ignore")
    assert torch.equal(torch.get_rng_state(), before)


def test_damping_of_a_negative_definite_matrix_moves_it_away_from_zero():
    A = -torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(A, b.detach()),
        ig.root(lambda x, b: A @ x - b, symmetric=True),
        linear_solver=ig.CG(damping=0.5),
    )
    (found,) = torch.autograd.grad(solve(b).sum(), b)
    torch.testing.assert_close(found, 1 / (A.diagonal() - 0.5))
