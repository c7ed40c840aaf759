"""Every minimiser and root finder, wrapped: hypergradients by closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from minimisers import DESCENTS, NEEDS_SCIPY, RIDGE, lbfgs
from problems import normal, wavy
from torch import Tensor

import implicit_grad as ig
from implicit_grad.solvers import GurobiQP, NewtonCG, ProximalGradient, SciPyMinimize, SciPyRoot


def ridge_problem() -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Callable[..., Tensor]]:
    """θ-centred ridge regression: its arguments, objective and closed form."""
    X, y = normal(10, 4, seed=1), normal(10, seed=2)
    theta, lam = normal(4, seed=3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def objective(w, theta, X, y, lam):
        return ((X @ w - y) ** 2).mean() + lam / 2 * (w - theta).square().sum()

    def closed(theta, X, y, lam):
        A = 2 * X.T @ X / len(y) + lam * torch.eye(4, dtype=X.dtype)
        return torch.linalg.solve(A, 2 * X.T @ y / len(y) + lam * theta)

    return (theta, X, y, lam), objective, closed


EVERY = {
    **{
        name: (lambda make=make: make(RIDGE, tol=1e-11))
        for name, make in DESCENTS.items()
        if name != "LBFGS"
    },
    "LBFGS": lambda: lbfgs(RIDGE, tol=1e-7, steps=20),
    "SciPy": lambda: pytest.importorskip("scipy") and SciPyMinimize(tol=1e-11),
    "SciPy trust-exact": lambda: (
        pytest.importorskip("scipy") and SciPyMinimize(method="trust-exact", tol=1e-11)
    ),
    "Gurobi": lambda: pytest.importorskip("gurobipy") and GurobiQP(),
}


@pytest.mark.parametrize("condition", ["argmin", "proximal"])
@pytest.mark.parametrize("solver", EVERY)
def test_hypergradients_match_the_closed_form(solver, condition):
    args, objective, closed = ridge_problem()
    expected = torch.autograd.grad(wavy(closed(*args)), args)
    if condition == "argmin":
        solve = ig.implicit(EVERY[solver](), ig.argmin(objective), on_failure="raise")
        phi = solve(*args)
    else:
        loss = lambda w, X, y: ((X @ w - y) ** 2).mean()  # noqa: E731
        condition = ig.proximal(loss, args[3])
        phi = ig.implicit(EVERY[solver](), condition, on_failure="raise")(*args[:3])
    for found, exact in zip(torch.autograd.grad(wavy(phi), args), expected, strict=True):
        assert (found - exact).norm() < (1e-7 if solver == "LBFGS" else 1e-9) * exact.norm()


CONSTRAINED_SOLVERS = {
    "SLSQP": lambda: SciPyMinimize(method="SLSQP", tol=1e-14),
    "COBYQA": lambda: SciPyMinimize(method="COBYQA", tol=1e-10),
    "Gurobi": lambda: pytest.importorskip("gurobipy") and GurobiQP(),
}


@NEEDS_SCIPY
@pytest.mark.parametrize("solver", CONSTRAINED_SOLVERS)
def test_hypergradients_of_a_projection_on_the_simplex(solver):
    """On the support S of the solution, dφ/dy = I − 11ᵀ/|S|; off it, 0."""
    y = torch.tensor([0.9, 0.5, -0.3, 0.1, 0.05], dtype=torch.float64, requires_grad=True)
    condition = ig.argmin(
        lambda p, y: (p - y).square().sum(), bounds=(0, None), equality=lambda p, y: p.sum() - 1
    )
    phi = ig.implicit(CONSTRAINED_SOLVERS[solver](), condition, on_failure="raise")(y)
    threshold = (1.4 - 1) / 2  # by Held, Wolfe and Crowder's algorithm: 0.9 and 0.5 stay
    assert (phi - (y - threshold).clamp_min(0)).abs().max() < 1e-7
    support = (y.detach() > threshold + 1e-9).double()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights * phi).sum(), [y])
    on_support = weights * support
    expected = on_support - support * on_support.sum() / support.sum()
    assert (slope - expected).abs().max() < 1e-6


@NEEDS_SCIPY
def test_root_finders_go_with_roots_and_fixed_points():
    """x = tanh(W x)/3 + b, either way; the reference unrolls the iteration."""
    W, b = normal(4, 4, seed=1), normal(4, seed=2)
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(100):
        x = torch.tanh(W @ x / 4) / 3 + b
    expected = torch.autograd.grad(wavy(x), [W, b])
    conditions = (
        ig.fixed_point(lambda x, b, W: torch.tanh(W @ x / 4) / 3 + b),
        ig.root(lambda x, b, W: x - b - torch.tanh(W @ x / 4) / 3),
    )
    for condition, method in itertools.product(conditions, ("hybr", "lm", "krylov", "broyden1")):
        solver = SciPyRoot(method=method, tol=1e-12)
        phi = ig.implicit(solver, condition, on_failure="raise")(b, W)
        for found, exact in zip(torch.autograd.grad(wavy(phi), [W, b]), expected, strict=True):
            assert (found - exact).norm() < 1e-9 * exact.norm()


def smooth_fit(w, X, y, lam):
    """A fit whose slope in its inputs is penalised, as in physics-informed training."""
    at = X.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad((at @ w).sum(), at, create_graph=True)
    return (X @ w - y).square().sum() + lam * slope.square().sum()


def force(w, X, y, lam):
    (slope,) = torch.autograd.grad(smooth_fit(w, X, y, lam), w, create_graph=True)
    return slope


GRADIENTS_INSIDE = {
    "NewtonCG": (NewtonCG(tol=1e-12), ig.argmin(smooth_fit)),
    "ProximalGradient": (
        ProximalGradient(rtol=1e-13),
        ig.prox_gradient(smooth_fit, ig.prox.soft_threshold(0.0)),
    ),
    "Newton": (ig.solvers.Newton(), ig.root(force, symmetric=True)),
    "SLSQP": (
        SciPyMinimize(method="SLSQP", tol=1e-14),
        ig.argmin(lambda w, *args: w.square().sum(), equality=force),
    ),
    "SciPyRoot": (SciPyRoot(), ig.root(force, symmetric=True)),
}


@NEEDS_SCIPY
@pytest.mark.parametrize("name", GRADIENTS_INSIDE)
def test_functions_that_take_gradients_themselves(name):
    X, y, lam = normal(6, 2, seed=1), normal(6, seed=2), torch.tensor(0.3, dtype=torch.float64)
    solver, condition = GRADIENTS_INSIDE[name]
    args, start = (X, y, lam.requires_grad_()), torch.full((2,), 0.1, dtype=torch.float64)
    solve = ig.implicit(solver, condition, init=lambda *_: start, on_failure="raise")
    found = torch.autograd.grad(wavy(solve(*args)), args)
    exact = torch.linalg.solve(X.T @ X + 6 * lam * torch.eye(2, dtype=X.dtype), X.T @ y)
    for actual, expected in zip(found, torch.autograd.grad(wavy(exact), args), strict=True):
        assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_a_leaf_that_the_objective_makes_is_nobodys():
    """It is made anew in each evaluation, and no gradient with respect to it is anyone's."""
    X, y, lam = normal(6, 2, seed=1), normal(6, seed=2), torch.tensor(0.3, dtype=torch.float64)
    solve = ig.implicit(NewtonCG(tol=1e-12), ig.argmin(smooth_fit), init=lambda *_: X[0].detach())
    certificate = ig.certify(solve, (X, y, lam.requires_grad_()), wavy)
    assert [t.shape for t in certificate.tensors] == [X.shape, y.shape, lam.shape]
    assert certificate.relative_error < 1e-9
