"""EarlyStopped: a filter in the place of an inverse, against dense algebra and plain steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import F32, F64, Counting, indefinite, operator, symmetric

import implicit_grad as ig
from implicit_grad._errors import Status

_SPECTRUM = torch.tensor([0.0, 1e-9, 1e-3, 0.02, 0.3, 0.31, 1.0, 1.7, 1.9], dtype=F64)


def system(values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return symmetric(values, random), torch.randn(len(values), dtype=F64, generator=random)


def filtered(matrix: torch.Tensor, rhs: torch.Tensor, g) -> torch.Tensor:
    """g(|M|) rhs by eigenvectors; g is a function of one number."""
    values, vectors = torch.linalg.eigh(matrix)
    weights = torch.tensor([g(abs(float(h))) for h in values], dtype=F64)
    return vectors @ (weights * (vectors.T @ rhs))


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def trained(matrix, rhs, steps, lr, momentum=0.0, nesterov=False):
    """What torch's SGD, or Nesterov's iterates, make of xᵀMx/2 − rhsᵀx from x = 0."""
    x, v, before = torch.zeros_like(rhs), torch.zeros_like(rhs), torch.zeros_like(rhs)
    for _ in range(steps):
        if nesterov:
            y = x + momentum * (x - before)
            before, x = x, y - lr * (matrix @ y - rhs)
        else:
            v = momentum * v + matrix @ x - rhs
            x = x - lr * v
    return x


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 400])
def test_what_that_many_steps_find(steps, momentum, nesterov):
    matrix, rhs = system(_SPECTRUM / 2)
    solver = ig.EarlyStopped(steps=steps, lr=0.9, momentum=momentum, nesterov=nesterov)
    found = solver.solve(operator(matrix), rhs)
    expected = trained(matrix, rhs, steps, 0.9, momentum, nesterov)
    assert found.status == Status.CONVERGED
    assert float((found.x - expected).norm()) <= 1e-11 * (1 + float(expected.norm()))


@pytest.mark.parametrize("time", [1e-3, 1.0, 200.0, 1e6])
def test_the_exponential_filter(time):
    matrix, rhs = system(_SPECTRUM)
    found = ig.EarlyStopped(time=time).solve(operator(matrix), rhs)
    expected = filtered(matrix, rhs, lambda h: -math.expm1(-time * h) / h if h else time)
    assert found.status == Status.CONVERGED and relative(found.x, expected) < 1e-7


def test_many_short_steps_are_the_exponential_filter():
    matrix, rhs = system(_SPECTRUM)
    in_time = ig.EarlyStopped(time=10.0).solve(operator(matrix), rhs)
    plain = ig.EarlyStopped(steps=10**6, lr=1e-5).solve(operator(matrix), rhs)
    heavy = ig.EarlyStopped(steps=10**6, lr=1e-6, momentum=0.9).solve(operator(matrix), rhs)
    assert relative(plain.x, in_time.x) < 1e-4 and relative(heavy.x, in_time.x) < 1e-3


def test_negative_curvature_counts_as_its_size():
    for seed in range(10):
        matrix, rhs = indefinite(seed)
        found = ig.EarlyStopped(time=5.0, maxiter=60).solve(operator(matrix), rhs)
        expected = filtered(matrix, rhs, lambda h: -math.expm1(-5.0 * h) / h)
        assert found.status == Status.CONVERGED and relative(found.x, expected) < 1e-9
        assert found.extremes[0] < 0 < found.extremes[1] and float(found.x @ rhs) > 0


@pytest.mark.parametrize(
    ("momentum", "nesterov", "longest"), [(0.0, False, 2.0), (0.9, False, 3.8), (0.5, True, 1.5)]
)
def test_steps_too_long_for_a_curvature_do_not_blow_up(momentum, nesterov, longest):
    """Where such steps would grow without end, training counts as settled; below, they settle."""
    solver = ig.EarlyStopped(steps=2000, lr=1.0, momentum=momentum, nesterov=nesterov)
    values = torch.tensor([0.1, 0.97 * longest, 1.03 * longest, 50.0], dtype=F64)
    found = solver.solve(operator(torch.diag(values)), torch.ones(4, dtype=F64))
    assert torch.allclose(found.x, 1 / values, rtol=1e-6)
    three = torch.diag(values[:3])  # and 50 would overflow
    grown = trained(three, torch.ones(3, dtype=F64), 2000, 1.0, momentum, nesterov)
    assert torch.allclose(grown[:2], found.x[:2]) and float(grown[2].abs()) > 1e6


@settings(max_examples=50, deadline=None)
@given(
    power=st.integers(-40, 40),
    of_rhs=st.integers(-60, 60),
    seed=st.integers(0, 1000),
)
def test_other_units_change_nothing_else(power, of_rhs, seed):
    """The objective times c: time over c, and the result over c. The outer loss times c: linear."""
    matrix, rhs = indefinite(seed, n=12)
    c, d = 2.0**power, 2.0**of_rhs
    one = ig.EarlyStopped(time=30.0, maxiter=8).solve(operator(matrix), rhs)
    other = ig.EarlyStopped(time=30.0 / c, maxiter=8).solve(operator(c * matrix), d * rhs)
    assert other.status == one.status
    assert relative(other.x * (c / d), one.x) < 1e-10
    assert other.filter_error == pytest.approx(one.filter_error, rel=1e-5, abs=1e-12)


def test_a_budget_is_a_choice_and_a_tolerance_a_promise():
    values = torch.logspace(-4, 0, 300, dtype=F64)
    matrix, rhs = system(values)
    counting = Counting(matrix)
    few = ig.EarlyStopped(time=1e4, maxiter=5).solve(counting.operator, rhs)
    assert few.status == Status.TRUNCATED and few.iterations == counting.products == 5
    missed = ig.EarlyStopped(time=1e4, maxiter=5, rtol=1e-3).solve(operator(matrix), rhs)
    assert missed.status == Status.MAX_ITER and torch.equal(missed.x, few.x)
    kept = ig.EarlyStopped(time=1e4, maxiter=300, rtol=1e-3).solve(operator(matrix), rhs)
    exact = filtered(matrix, rhs, lambda h: -math.expm1(-1e4 * h) / h)
    assert kept.status == Status.CONVERGED and kept.iterations < 150
    assert kept.filter_error <= 1e-3 and relative(kept.x, exact) < 1e-2


def test_the_error_estimate_is_near_the_error():
    values = torch.logspace(-3, 0, 200, dtype=F64)
    ratios = []
    for seed in range(5):
        matrix, rhs = system(values, seed)
        exact = filtered(matrix, rhs, lambda h: -math.expm1(-1e3 * h) / h)
        for maxiter in (10, 20, 30):
            found = ig.EarlyStopped(time=1e3, maxiter=maxiter).solve(operator(matrix), rhs)
            ratios.append(relative(found.x, exact) / found.filter_error)
    assert 0.05 < min(ratios) and max(ratios) < 20


def test_it_ends_with_the_space_that_the_right_hand_side_sees():
    matrix = torch.diag(torch.tensor([2.0, 2.0, 3.0, 5.0], dtype=F64))
    rhs = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64)
    found = ig.EarlyStopped(time=1.0).solve(operator(matrix), rhs)
    assert found.status == Status.CONVERGED and found.iterations == 1
    assert torch.allclose(found.x, -math.expm1(-2.0) / 2 * rhs)
    nothing = ig.EarlyStopped(time=7.0).solve(operator(torch.zeros(4, 4, dtype=F64)), rhs)
    assert nothing.status == Status.CONVERGED and torch.allclose(nothing.x, 7.0 * rhs)


def test_a_batch_is_solved_as_each_alone():
    pairs = [indefinite(seed, n=20) for seed in range(4)]
    matrices, rhs = (torch.stack(x) for x in zip(*pairs, strict=True))
    rhs[1] = 0.0
    rhs[2] *= 1e-200
    matrices[3] = torch.eye(20)  # this one ends at once
    both = operator(torch.eye(20, dtype=F64))
    both = ig._linear_solvers.base.Operator(
        lambda x: torch.einsum("tij,tj->ti", matrices, x), both.rmatvec
    )
    solver = ig.EarlyStopped(time=3.0, maxiter=12)
    x, found = solver.solve_tasks(both, rhs, False)
    for task, (matrix, b) in enumerate(zip(matrices, rhs, strict=True)):
        alone = solver.solve(operator(matrix), b)
        assert found[task].status == alone.status
        assert found[task].iterations == alone.iterations
        assert torch.allclose(x[task], alone.x, rtol=1e-10, atol=0)
    rhs[0, 3] = math.nan
    x, found = solver.solve_tasks(both, rhs, False)
    assert found[0].status == Status.NONFINITE_RHS and bool(x[0].isnan().all())
    assert torch.allclose(x[2:], torch.stack([s.x for s in found[2:]])) and x[2:].isfinite().all()


def test_a_matrix_that_is_not_finite():
    found = ig.EarlyStopped(time=1.0).solve(
        operator(torch.full((3, 3), math.nan, dtype=F64)), torch.ones(3, dtype=F64)
    )
    assert found.status == Status.NONFINITE_OPERATOR and bool(found.x.isnan().all())


def test_single_precision():
    matrix, rhs = system(torch.logspace(-3, 0, 100, dtype=F64))
    exact = filtered(matrix, rhs, lambda h: -math.expm1(-50.0 * h) / h)
    found = ig.EarlyStopped(time=50.0, maxiter=60).solve(operator(matrix.to(F32)), rhs.to(F32))
    assert found.status == Status.CONVERGED and relative(found.x.double(), exact) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"time": 1.0, "steps": 3},
        {"steps": 3},
        {"lr": 0.1},
        {"time": 0.0},
        {"time": math.inf},
        {"time": "long"},
        {"steps": -1, "lr": 0.1},
        {"steps": 2.5, "lr": 0.1},
        {"steps": 3, "lr": 0.0},
        {"steps": 3, "lr": 0.1, "momentum": 1.0},
        {"steps": 3, "lr": 0.1, "nesterov": 1},
        {"time": 1.0, "momentum": 0.5},
        {"momentum": 0.5},
        {"time": 1.0, "maxiter": 0},
        {"time": 1.0, "rtol": 2.0},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ig.InvalidArgumentError, match="EarlyStopped"):
        ig.EarlyStopped(**options)
