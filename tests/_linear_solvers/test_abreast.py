"""MINRES for many systems at once against MINRES alone: the same runs, but for their products."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cg_batched import SCALES, SPECTRA, TROUBLE, Systems

import implicit_grad as ig
from implicit_grad import Status

F32, F64 = torch.float32, torch.float64


def compared(systems, solver, verify=True):
    x, found = solver.solve_tasks(systems.operator(), systems.rhs, verify)
    for task, solution in enumerate(found):
        alone = solver.solve(systems.operator(task), systems.rhs[task], verify)
        assert solution.status is alone.status
        assert solution.iterations == alone.iterations
        torch.testing.assert_close(x[task], alone.x, rtol=1e-6, atol=0.0, equal_nan=True)
        assert (solution.residual is None) == (alone.residual is None)
    return found


@given(
    sorts=st.lists(st.sampled_from([*SPECTRA, *TROUBLE]), min_size=1, max_size=5),
    scale=st.sampled_from(SCALES),
    maxiter=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("verify", [False, True])
def test_a_budget_gives_each_task_what_it_would_get_alone(verify, sorts, scale, maxiter, seed):
    compared(Systems(sorts, 12, F64, seed, scale), ig.MINRES(maxiter=maxiter), verify)


@pytest.mark.parametrize("solver", [ig.MINRES(), ig.MINRES(rtol=1e-9), ig.MINRES(damping=0.1)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_tolerance_is_reached_by_each(solver, dtype):
    systems = Systems(["definite", "indefinite", "negative", "no rhs"], 10, dtype, 3)
    _, found = solver.solve_tasks(systems.operator(), systems.rhs, True)
    statuses = [solution.status for solution in found]
    assert statuses == [Status.CONVERGED] * 3 + [Status.ZERO_RHS]
    assert all(solution.residual < 1e-4 for solution in found)


def test_one_product_serves_all_that_still_want_one():
    systems, products = Systems(["definite", "indefinite"], 30, F64, 1), 0
    operator = systems.operator()

    def counted(x):
        nonlocal products
        products += 1
        return operator.matvec(x)

    x, _ = ig.MINRES(maxiter=4).solve_tasks(
        type(operator)(counted, counted), systems.rhs, verify=False
    )
    assert products == 4
    assert math.isfinite(float(x.sum()))
