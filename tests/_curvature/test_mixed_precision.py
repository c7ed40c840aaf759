"""Conditions that compute in a coarser precision than φ's: its gradients are as exact, and no more.

Autocast does that, and casts within a model. Tolerances, steps of differences and checks go by the
coarsest numbers; nothing is said of what is rounding.
"""

from __future__ import annotations

import pytest
import torch

import implicit_grad as ig
from implicit_grad._linear_solvers.base import Operator

A = torch.tensor([[3.0, 1, 0], [1, 2, 1], [0, 1, 2], [1, 0, 1]], dtype=torch.float64)
# Nodes of older torches do not tell in which precision they compute.
NODES_TELL = hasattr(torch.ones((), requires_grad=True).exp().grad_fn, "_input_metadata")
LOW = pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)


def fit(w, y, low):
    return ((A.to(low) @ w.to(low)).double() - y).square().sum()


def slope(w, y, low):
    return (A.to(low).T @ (A.to(low) @ w.to(low))).double() - A.T @ y


KINDS = {
    "argmin": (ig.argmin(fit), "auto"),
    "differences": (ig.argmin(fit), "finite_difference"),
    "batches": (
        ig.argmin(lambda w, share, y, low: share * fit(w, y, low), batches=[0.25, 0.75]),
        "auto",
    ),
    "prox_gradient": (ig.prox_gradient(fit, ig.prox.soft_threshold(0.0)), "auto"),
    "root": (ig.root(slope, symmetric=True), "auto"),
    "general root": (ig.root(slope), "auto"),
}


@LOW
@pytest.mark.parametrize("kind", KINDS)
def test_a_coarser_precision_inside(kind, low):
    condition, curvature = KINDS[kind]
    y = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    solve = ig.implicit(
        lambda y, low: torch.linalg.lstsq(A, y).solution,
        condition,
        curvature=curvature,
        on_failure="raise",
    )
    try:
        (solve(y, low) @ v).backward()
    except ig.LinearSolveError:
        assert not NODES_TELL
        return
    exact = torch.linalg.pinv(A).T @ v
    assert (y.grad - exact).norm() < (0.2 if low is torch.bfloat16 else 1e-3) * exact.norm()


def test_what_no_unknown_goes_through_may_be_coarse():
    """Frozen features in half precision leave all else as exact as it was."""
    y = torch.ones(4, dtype=torch.float64, requires_grad=True)
    features = A.bfloat16().requires_grad_()
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda y: torch.linalg.lstsq(A, y).solution,
        ig.argmin(lambda w, y: (features.double() @ w - y).square().sum()),
        monitor=monitor,
    )
    solve(y).sum().backward()
    assert monitor.last.linear_residual < 1e-10
    assert (y.grad - torch.linalg.pinv(A).sum(0)).abs().max() < 1e-9


def test_a_tolerance_that_is_asked_for_is_no_looser_than_the_default():
    products = Operator(matvec=lambda x: x, rmatvec=lambda x: x, eps=2.0**-7)
    asked, default = (
        solver.relative_budget(products, torch.ones(3), 3) for solver in (ig.CG(rtol=1e-6), ig.CG())
    )
    assert asked.target <= default.target
