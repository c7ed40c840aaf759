"""Warm starts: fewer products for the same answer, and whose solution is kept."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
from systems import F64, Counting, operator, orthogonal, symmetric
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status


def changing(step: int, task: int = 0) -> tuple[Tensor, Tensor]:
    """Systems that change by about a thousandth from step to step."""
    random = torch.Generator().manual_seed(task)
    matrix = symmetric(torch.logspace(0, 2, 50, dtype=F64), random)
    drift = symmetric(torch.rand(50, dtype=F64, generator=random), random)
    rhs = torch.randn(50, dtype=F64, generator=random)
    return matrix + 1e-3 * step * drift, rhs + 1e-3 * step * rhs.flip(0)


def test_a_warm_start_takes_fewer_products_for_the_same_answer():
    cold, warm = ig.CG(rtol=1e-6), ig.CG(rtol=1e-6, warm_start=ig.WarmStart())
    products = {cold: 0, warm: 0}
    for step in range(10):
        matrix, rhs = changing(step)
        for solver in products:
            counting = Counting(matrix)
            solution = solver.solve(counting.operator, rhs * 2.0**40)
            if step:
                products[solver] += counting.products
            assert counting.products == solution.iterations + 1  # the residual, recomputed
            assert solution.status == Status.CONVERGED
            exact = torch.linalg.solve(matrix, rhs) * 2.0**40
            assert float((solution.x - exact).norm() / exact.norm()) < 2e-6 * 100
    assert products[warm] <= 0.8 * products[cold]


def test_a_second_solve_of_the_same_system_takes_two_products():
    matrix, rhs = changing(0)
    solver = ig.CG(rtol=1e-6, warm_start=ig.WarmStart())
    first = solver.solve(Counting(matrix).operator, rhs)
    counting = Counting(matrix)
    second = solver.solve(counting.operator, rhs)
    assert counting.products == 2 and second.iterations == 1
    assert torch.equal(first.x, second.x) and second.status == Status.CONVERGED


@pytest.mark.parametrize(
    "spoilt", ["shape", "dtype", "farther than 0", "hardly farther than 0", "nan"]
)
def test_a_start_that_does_not_help_is_not_used(spoilt):
    matrix, rhs = changing(0)
    store = ig.WarmStart()
    x = {
        "shape": rhs[:-1],
        "dtype": rhs.float(),
        "farther than 0": -torch.linalg.solve(matrix, rhs),
        "hardly farther than 0": -torch.linalg.solve(matrix, rhs) / 1e4,
        "nan": rhs * math.nan,
    }[spoilt]
    store.slot().put(x)
    cold = ig.CG(rtol=1e-6).solve(operator(matrix), rhs)
    found = ig.CG(rtol=1e-6, warm_start=store).solve(operator(matrix), rhs)
    assert torch.equal(found.x, cold.x)
    assert found.iterations == cold.iterations + (spoilt not in ("shape", "dtype"))


def test_a_budget_holds_for_warm_starts_too():
    matrix, rhs = changing(0)
    solver = ig.CG(maxiter=4, warm_start=ig.WarmStart())
    residuals = []
    for _ in range(6):
        counting = Counting(matrix)
        solution = solver.solve(counting.operator, rhs)
        assert counting.products == 5 and solution.iterations == 4
        residuals.append(solution.residual)
    assert residuals[-1] < 0.25 * residuals[0]
    one = ig.CG(maxiter=1, warm_start=ig.WarmStart())
    one.solve(operator(matrix), rhs)  # its start would take the only product there is
    cold = ig.CG(maxiter=1).solve(operator(matrix), rhs.flip(0))
    assert torch.equal(one.solve(operator(matrix), rhs.flip(0)).x, cold.x)


def test_two_products_are_enough_for_a_start_and_a_step():
    matrix, rhs = changing(0)
    two = ig.CG(maxiter=2, warm_start=ig.WarmStart())
    cold = two.solve(operator(matrix), rhs)
    warm = two.solve(operator(matrix), rhs)
    assert cold.iterations == warm.iterations == 2 and warm.residual < cold.residual


def test_failed_solves_are_not_kept():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    solver.solve(operator(-torch.eye(3, dtype=F64)), torch.ones(3, dtype=F64))
    assert len(store) == 0
    solver.solve(operator(torch.eye(3, dtype=F64)), torch.ones(3, dtype=F64))
    assert len(store) == 1
    store.clear()
    assert len(store) == 0


def test_after_negative_curvature_a_warm_start_is_forgotten():
    found = 0
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        matrix = symmetric(torch.linspace(0.5, 3.0, 30, dtype=F64), random)
        rhs = torch.randn(30, dtype=F64, generator=random)
        solver = ig.CG(warm_start=ig.WarmStart())
        solver.solve(operator(matrix), rhs)
        vector = orthogonal(30, random)[0]
        bent = matrix - 3.5 * vector[:, None] * vector
        cold, warm = ig.CG().solve(operator(bent), rhs), solver.solve(operator(bent), rhs)
        assert torch.equal(warm.x, cold.x) and warm.status == cold.status
        assert warm.status == Status.NEGATIVE_CURVATURE and float(warm.x @ rhs) > 0
        found += warm.iterations > cold.iterations + 1
    assert found > 40  # the warm runs were under way when they met it


def test_keys_are_kept_apart_and_go_with_the_call():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    bound = {}
    for key in ("a", "b"):
        with store.at(key):
            bound[key] = solver.for_call()
            assert store.slot().key == key
            with store.at("inner"):
                assert store.slot().key == "inner"
            assert store.slot().key == key
    assert store.slot().key is None
    assert solver.for_call() != solver and ig.CG().for_call() == ig.CG()
    for round_ in range(2):
        for task, key in enumerate(("a", "b")):
            matrix, rhs = changing(0, task)
            solution = bound[key].solve(operator(matrix), rhs)
            assert (solution.iterations == 1) == (round_ == 1)
    assert len(store) == 2


def test_threads_have_keys_of_their_own():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    barrier, wrong = threading.Barrier(4), []

    def work(task: int) -> None:
        with store.at(task):
            barrier.wait()
            bound = solver.for_call()
            for round_ in range(5):
                solution = bound.solve(operator(changing(0, task)[0]), changing(0, task)[1])
                if (solution.iterations == 1) != (round_ > 0):
                    wrong.append((task, round_, solution.iterations))

    threads = [threading.Thread(target=work, args=(task,)) for task in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(store) == 4


def test_the_backward_pass_finds_the_key_of_its_forward_call():
    store = ig.WarmStart()
    matrix, rhs = changing(0)
    condition = ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(matrix, b),
        condition,
        linear_solver=ig.CG(rtol=1e-6, warm_start=store),
    )
    b = rhs.clone().requires_grad_()
    with store.at("first"):
        one = solve(b)
    with store.at("second"):
        two = solve(b)
    (one.square().sum() + two.sum()).backward()
    for key, v in (("first", 2 * one), ("second", torch.ones_like(two))):
        with store.at(key):
            kept = store.slot().get(rhs)
        torch.testing.assert_close(matrix @ kept, v.detach(), rtol=1e-4, atol=1e-4)
    assert len(store) == 2


@pytest.mark.parametrize("polish", [0, 1])
def test_newton_steps_neither_take_nor_leave_a_start(polish):
    """Their right-hand sides have nothing to do with those of gradients."""
    matrix, rhs = changing(0)
    monitor, store = ig.Monitor(), ig.WarmStart()
    solve = ig.implicit(
        lambda b: torch.linalg.solve(matrix, b) + 1e-3 * b.flip(0),  # not solved: there is a step
        ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w),
        linear_solver=ig.CG(rtol=1e-8, warm_start=store),
        polish=polish,
        monitor=monitor,
        on_failure="ignore",
    )
    b, towards = rhs.clone().requires_grad_(), rhs.flip(0)
    for _ in range(3):
        (solve(b) @ towards).backward()
    taken = [report.iterations for report in monitor.reports]
    assert taken[0] > 10 and taken[1:] == [1, 1]
    assert (monitor.last.inner_residual < 1e-6) == polish and len(store) == 1


def test_a_copy_of_a_store_is_empty():

    store = ig.WarmStart()
    store.slot().put(torch.ones(2))
    assert len(copy.deepcopy(store)) == 0 == len(pickle.loads(pickle.dumps(store)))
