"""CG where the curvature is negative: what it returns, and what may be solved instead."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from systems import F64, Counting, indefinite, operator, symmetric

import implicit_grad as ig
from implicit_grad._errors import Status


@pytest.mark.parametrize(
    "preconditioner",
    [
        None,
        ig.Jacobi(),
        ig.Jacobi(probes=20),
        ig.Nystrom(rank=5),
        ig.Cholesky(),
        ig.Reuse(ig.Cholesky(), solves=3),
        lambda r: r / 2,
    ],
)
@pytest.mark.parametrize("scale", [None, 0.4, "elements"])
def test_invariants_after_negative_curvature(preconditioner, scale):
    if scale == "elements":
        scale = torch.linspace(0.2, 3.0, 60, dtype=F64)
    for seed in range(40):
        matrix, rhs = indefinite(seed)
        known = operator(matrix, scale=scale)
        solution = ig.CG(preconditioner=preconditioner).solve(known, rhs)
        assert solution.status == Status.NEGATIVE_CURVATURE and solution.iterations <= 80
        assert solution.extremes[0] <= 0 and float(solution.x @ rhs) > 0
        if scale is None:  # no longer than a training of that time could make it
            assert solution.substitute == "early_stopped"
            longest = 200 / 3.1 * rhs.norm() * 1.1
            assert float(solution.x.norm()) <= longest
            continue
        first_order = known.over_scale(rhs)
        assert known.scaled_norm(solution.x) <= known.scaled_norm(first_order) * (1 + 1e-12)
        assert solution.substitute is None


def test_on_request_negative_curvature_raises():
    matrix, rhs = indefinite(0)
    with pytest.raises(ig.LinearSolveError, match="CG met negative curvature"):
        ig.CG(on_negative_curvature="raise").solve(operator(matrix), rhs)


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_on_request_minres_solves_the_same_system(damping):
    for seed in range(20):
        matrix, rhs = indefinite(seed)
        counting = Counting(matrix)
        solver = ig.CG(rtol=1e-10, maxiter=400, on_negative_curvature="minres", damping=damping)
        solution = solver.solve(counting.operator, rhs)
        shifted = matrix + damping * torch.eye(60, dtype=F64)
        assert solution.status == Status.CONVERGED and solution.substitute == "minres"
        assert float((shifted @ solution.x - rhs).norm() / rhs.norm()) <= 2e-10
        assert solution.extremes[0] < 0 < solution.extremes[1]
        assert counting.products == solution.iterations + 2  # and two residuals
    short = ig.CG(maxiter=5, on_negative_curvature="minres").solve(operator(matrix), rhs)
    assert short.status == Status.TRUNCATED


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_on_request_gauss_newton_takes_the_convex_matrix(damping):
    for seed in range(20):
        matrix, rhs = indefinite(seed)
        values, vectors = torch.linalg.eigh(matrix)
        convex = vectors @ torch.diag(values.clamp(min=0.1)) @ vectors.T
        known = operator(matrix, convex=lambda x, m=convex: m @ x)
        solver = ig.CG(rtol=1e-10, on_negative_curvature="gauss_newton", damping=damping)
        solution = solver.solve(known, rhs)
        if damping and solution.substitute is None:
            continue  # the damped matrix may be definite
        exact = torch.linalg.solve(convex + damping * torch.eye(60, dtype=F64), rhs)
        assert solution.status == Status.CONVERGED and solution.substitute == "gauss_newton"
        assert float((solution.x - exact).norm() / exact.norm()) < 1e-7
        assert solution.extremes[0] < 0
    fixed = ig.CG(maxiter=8, on_negative_curvature="gauss_newton")
    solution = fixed.solve(operator(matrix, convex=lambda x: convex @ x), rhs)
    assert solution.status == Status.TRUNCATED and 8 < solution.iterations <= 16
    plain = ig.CG(maxiter=8).solve(operator(convex), rhs)
    assert torch.equal(solution.x, plain.x)


@pytest.mark.parametrize("policy", ["minres", "gauss_newton"])
def test_what_is_solved_instead_keeps_the_options(policy):
    matrix, rhs = indefinite(0)
    convex = symmetric(
        torch.linspace(100.0, 120.0, 60, dtype=F64), torch.Generator().manual_seed(0)
    )
    coarse = ig.CG(on_negative_curvature=policy, atol=0.1 * float(rhs.norm()))
    known = operator(matrix, convex=lambda x: convex @ x)
    fine = dataclasses.replace(coarse, atol=0.0).solve(known, rhs)
    found = coarse.solve(known, rhs)
    assert found.status == fine.status == Status.CONVERGED
    assert 1e-3 < found.residual <= 0.1 and fine.residual < 1e-9
    if policy == "gauss_newton":  # the curvature of both matrices
        assert found.extremes[0] < 0 and found.extremes[1] >= 100


def test_what_is_solved_instead_starts_from_zero():
    """A store holds solutions of A, and the last one may have been of the matrix in its place."""
    matrix, rhs = indefinite(0)
    convex = symmetric(torch.linspace(1.0, 9.0, 60, dtype=F64), torch.Generator().manual_seed(0))
    known = operator(matrix, convex=lambda x: convex @ x)
    solver = ig.CG(on_negative_curvature="gauss_newton", warm_start=ig.WarmStart())
    once, again = (solver.solve(known, rhs) for _ in range(2))
    assert torch.equal(once.x, again.x) and again.iterations >= once.iterations


@pytest.mark.parametrize(
    ("value", "status"),
    [(0.0, Status.NEGATIVE_CURVATURE), (math.nan, Status.NONFINITE_OPERATOR)],
)
def test_a_matrix_in_as_place_may_fail_too(value, status):
    matrix, rhs = indefinite(0)
    found = ig.CG(on_negative_curvature="gauss_newton").solve(
        operator(matrix, convex=lambda x: value * x), rhs
    )
    assert found.status == status and found.extremes[0] < 0


def test_a_preconditioner_lasts_when_a_warm_start_is_given_up():
    matrix, rhs = indefinite(0)
    solver = ig.CG(preconditioner=lambda r: r / 2, warm_start=ig.WarmStart())
    solver.warm_start.slot().put(rhs / 10)
    seen = []
    cold = ig.CG(preconditioner=lambda r: seen.append(1) or r / 2).solve(operator(matrix), rhs)
    calls = len(seen)
    counted = dataclasses.replace(solver, preconditioner=lambda r: seen.append(1) or r / 2)
    found = counted.solve(operator(matrix), rhs)
    assert torch.equal(found.x, cold.x) and found.iterations > cold.iterations
    assert len(seen) > 2 * calls


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_gauss_newton_without_a_convex_matrix_says_what_to_do(damping):
    matrix, rhs = indefinite(0)
    solver = ig.CG(on_negative_curvature="gauss_newton", damping=damping)
    with pytest.raises(ig.LinearSolveError, match=r'model=.*curvature="gauss_newton"'):
        solver.solve(operator(matrix), rhs)
    definite = symmetric(torch.linspace(1.0, 2.0, 60, dtype=F64), torch.Generator())
    assert solver.solve(operator(definite), rhs).status == Status.CONVERGED
