"""PositivePart: λ + H without H's negative curvature, against eigenvectors and first-order MAML."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import normal
from systems import F32, F64, operator, symmetric
from torch import nn

import implicit_grad as ig
from implicit_grad._errors import Status

# curvatures of a loss under λ = 2: a singular system, one of the opposite sign, and steep ones
_CURVATURES = torch.tensor([-9.0, -2.0, -1.9, -0.3, 0.0, 0.4, 1.0, 7.0], dtype=F64)


def system(lam, seed=0):
    """H, A = H + λ with λ as the operator's scale, and a right-hand side."""
    random = torch.Generator().manual_seed(seed)
    H = symmetric(_CURVATURES, random)
    scale = torch.full((8,), lam, dtype=F64) if isinstance(lam, float) else lam
    A = dataclasses.replace(operator(H + scale.diag()), scale=lam)
    return H, scale, A, torch.randn(8, dtype=F64, generator=random)


def expected(H, lam, v):
    """By eigenvectors: in units of λ, H's curvatures below 0 are 0."""
    root = lam.sqrt()
    values, vectors = torch.linalg.eigh(H / root / root[:, None])
    positive = vectors @ values.clamp(min=0).diag() @ vectors.T
    return torch.linalg.solve(positive * root * root[:, None] + lam.diag(), v)


@pytest.mark.parametrize("lam", [2.0, torch.linspace(0.5, 3, 8, dtype=F64)])
def test_negative_curvature_counts_as_none(lam):
    H, scale, A, v = system(lam)
    found = ig.PositivePart().solve(A, v)
    assert found.status == Status.CONVERGED and found.iterations <= 8
    torch.testing.assert_close(found.x, expected(H, scale, v), rtol=1e-10, atol=1e-12)
    direct = torch.linalg.solve(H + scale.diag(), v)
    assert float((found.x - direct).norm()) > float(v.norm())  # A is near singular


def test_each_task_has_its_own():
    systems = [system(2.0, seed) for seed in range(3)]
    A = torch.stack([H + scale.diag() for H, scale, _, _ in systems])
    v = torch.stack([v for *_, v in systems])
    batch = dataclasses.replace(systems[0][2], matvec=lambda x: (A @ x[..., None])[..., 0])
    x, solutions = ig.PositivePart().solve_tasks(batch, v, verify=False)
    assert [s.status for s in solutions] == [Status.CONVERGED] * 3
    for row, (H, scale, _, v) in zip(x, systems, strict=True):
        torch.testing.assert_close(row, expected(H, scale, v), rtol=1e-10, atol=1e-12)


def test_vectors_stay_orthogonal_in_a_batch_where_curvatures_differ_a_lot():
    """A product along the steepest has so little of the others that one projection leaves noise."""
    steep, rest = torch.tensor([3e5, 1e6], dtype=F64), torch.linspace(0.01, 3, 40, dtype=F64)
    random = torch.Generator().manual_seed(0)
    A = torch.stack([symmetric(torch.cat([steep, rest]) + 1, random) for _ in range(2)])
    v = torch.randn(2, 42, dtype=F64, generator=random)
    batch = dataclasses.replace(
        operator(A[0]), scale=1.0, matvec=lambda x: (A @ x[..., None])[..., 0]
    )
    x, solutions = ig.PositivePart(maxiter=100, rtol=1e-12).solve_tasks(batch, v, verify=False)
    for row, s, of_one, rhs in zip(x, solutions, A, v, strict=True):
        exact = torch.linalg.solve(of_one, rhs)
        assert float((row - exact).norm() / exact.norm()) < 20 * s.filter_error < 1e-8


@pytest.mark.parametrize("maxiter", [1, 2, 5])
def test_however_few_products_no_gradient_is_longer_than_what_arrives(maxiter):
    for seed in range(20):
        _, _, A, v = system(2.0, seed)
        found = ig.PositivePart(maxiter=maxiter).solve(A, v)
        assert found.status == Status.TRUNCATED and found.iterations == maxiter
        assert 2.0 * float(found.x.norm()) <= float(v.norm()) * (1 + 1e-12)
        assert float(found.x @ v) > 0


def loss(phi, weights):
    """Its Hessian is diag(weights), of both signs."""
    return (weights * phi.square()).sum() / 2 + phi.sum()


def test_in_proximal_and_in_imaml_it_is_the_formula():
    """dφ/dθ = λ/(λ + max(h, 0)), and dφ/da = −(∂F/∂a)/(λ + max(h, 0))."""
    weights = torch.tensor([-5.0, -2.0, -0.1, 3.0], dtype=F64, requires_grad=True)
    theta, v, lam = normal(4), torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=F64), 2.0
    inverse = 1 / (lam + weights.detach().clamp(min=0))

    condition = ig.proximal(loss, lam)
    options = {"linear_solver": ig.PositivePart(), "on_failure": "ignore"}
    solve = ig.implicit(lambda theta, weights: theta - 0.5, condition, **options)
    phi = solve(theta, weights)
    gradients = torch.autograd.grad(phi @ v, [theta, weights])
    torch.testing.assert_close(gradients[0], lam * v * inverse)
    torch.testing.assert_close(gradients[1], -phi.detach() * v * inverse)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = nn.Parameter(theta.detach().clone())

        def forward(self):
            return self.phi

    model = Point()
    solver = ig.PositivePart(maxiter=4)  # the default, with a product for each curvature
    learner = ig.imaml(model, lr=0.25, linear_solver=solver, on_failure="raise").clone()
    learner.adapt(lambda: loss(learner(), weights), steps=2)  # so λ is 2, without a word
    (learner() @ v).backward()
    torch.testing.assert_close(model.phi.grad, lam * v * inverse)


def test_second_derivatives_are_those_of_the_solution():
    weights = torch.tensor([-0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    solve = ig.implicit(
        lambda theta, weights: ((2 * theta - 1) / (2 + weights)).detach(),
        ig.proximal(loss, 2.0),
        linear_solver=ig.PositivePart(),
    )
    theta = normal(3)
    phi = solve(theta, weights)
    (first,) = torch.autograd.grad(phi.sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weights)
    by_hand = (2 * theta.detach() - 1) / (2 + weights.detach()) ** 3
    torch.testing.assert_close(second, 2 * by_hand)


@pytest.mark.parametrize("lam", [2.0, torch.tensor([1.0, 2.0, 3.0], dtype=F64)])
def test_a_phi_that_is_no_solution_is_told_of(lam):
    """It stands for a solution, whatever the curvature there; not so a training that stopped."""
    weights = torch.tensor([-0.5, 1.0, 2.0], dtype=F64)

    def gradient(offset):
        solve = ig.implicit(
            lambda theta: (lam * theta - 1) / (lam + weights) + offset,
            ig.proximal(lambda phi: loss(phi, weights), lam),
            linear_solver=ig.PositivePart(),
        )
        theta = normal(3)
        return torch.autograd.grad(solve(theta).sum(), theta)[0]

    expected = lam / (lam + weights.clamp(min=0))
    torch.testing.assert_close(gradient(0.0), expected)
    with pytest.warns(ig.ImplicitGradWarning, match="phi does not solve the inner problem"):
        torch.testing.assert_close(gradient(3.0), expected)


def test_a_matrix_for_a_lam_is_refused():
    """With φ between H = −8 and UUᵀ = 4, their sum's positive part would make dθ longer than v."""
    lam = ig.LowRank(torch.tensor(1.0, dtype=F64), torch.tensor([[2.0], [0.0]], dtype=F64))
    solve = ig.implicit(
        lambda theta: theta.detach(),
        ig.proximal(lambda phi: -4 * phi.square().sum(), lam),
        linear_solver=ig.PositivePart(),
    )
    with pytest.raises(ig.GraphError, match=r"PositivePart is for a lam .* not for a LowRank"):
        solve(normal(2)).sum().backward()


def spread(most):
    return torch.logspace(-2, math.log10(most), 20, dtype=F64)


@pytest.mark.parametrize(
    ("dtype", "steep", "status"),
    [
        (F64, spread(1e4), Status.CONVERGED),
        (F32, spread(1e2), Status.CONVERGED),
        (F32, spread(1e6), Status.STAGNATED),
        (F32, torch.tensor([-1e12, 1e8, 1e12], dtype=F64), Status.STAGNATED),
    ],
    ids=["double", "single", "steep", "far too steep"],
)
def test_what_rounding_costs_is_in_the_error_estimate(dtype, steep, status):
    """Where the steepest curvature is many times λ, small ones drown in the products' rounding."""
    values = torch.cat([steep, _CURVATURES])
    one = torch.ones(len(values), dtype=F64)
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        H, v = symmetric(values, random), torch.randn(len(values), dtype=F64, generator=random)
        A = dataclasses.replace(operator((H + one.diag()).to(dtype)), scale=1.0)
        found = ig.PositivePart(maxiter=100, rtol=1e-5).solve(A, v.to(dtype))
        exact = expected(H, one, v)
        assert found.status == status
        assert float((found.x - exact).norm() / exact.norm()) < 20 * found.filter_error


@pytest.mark.parametrize(
    "condition",
    [ig.argmin(lambda phi, w: (phi**2).sum()), ig.root(lambda phi, w: phi - w, symmetric=True)],
)
def test_there_has_to_be_a_lam(condition):
    with pytest.raises(ig.InvalidArgumentError, match="PositivePart is for proximal and imaml"):
        ig.implicit(lambda w: w, condition, linear_solver=ig.PositivePart())


def test_certify_and_influence_refuse_what_is_no_solution():
    solve = ig.implicit(
        lambda theta: theta,
        ig.proximal(lambda phi: (phi**2).sum(), 1.0),
        linear_solver=ig.PositivePart(),
    )
    with pytest.raises(ig.InvalidArgumentError, match="not what PositivePart is for"):
        ig.certify(solve, (normal(3),), outer_loss=lambda phi: phi.sum())
    with pytest.raises(ig.InvalidArgumentError, match="not what PositivePart is for"):
        ig.influence(solve, torch.ones(3), lambda phi: phi.sum(), args=(normal(3),))
