"""Warnings point to the line that they are about, and Python's default filter shows them there."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import pytest
import torch

import implicit_grad as ig

HERE = inspect.currentframe().f_code.co_filename


def line() -> int:
    """That on which this is called."""
    return inspect.currentframe().f_back.f_lineno


@contextlib.contextmanager
def shown(action: str = "default"):
    """What a filter lets through: by default once for a text and place, as Python has it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        yield said


def a_parameter() -> torch.Tensor:
    return torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


def saddle(w, a):
    return (w * w * torch.tensor([1.0, -1.0], dtype=w.dtype)).sum() / 2 - (a * w).sum()


def quartic(w, a):
    return (w - a).pow(4).sum() + w.square().sum()


def of_a_saddle(**options) -> ig.ImplicitSolver:
    return ig.implicit(lambda a: a * a.new_tensor([1.0, -1.0]), ig.argmin(saddle), **options)


SHORT = ig.solvers.NewtonCG(tol=1e-12, maxiter=1)


def test_each_solve_of_a_backward_pass_is_told_at_its_own_line():
    a, solve = a_parameter(), of_a_saddle()
    with shown() as said:
        for _ in range(3):
            one, first = solve(a), line()
            other, second = solve(a + 1), line()
            (one + other).sum().backward()
    assert sorted((w.filename, w.lineno) for w in said) == [(HERE, first), (HERE, second)]


def test_so_it_is_for_a_learner():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    maml = ig.imaml(model, lam=0.01, lr=0.1, linear_solver=ig.CG(maxiter=1, rtol=1e-9))
    x = torch.randn(5, 3)
    with shown() as said:
        for _ in range(2):
            first, second = maml.clone(), maml.clone()
            first.adapt(first(x).square().mean())
            line_of_first = line() - 1
            second.adapt(second(x).sin().mean())
            (first(x).sum() + second(x).sum()).backward()
    assert sorted((w.filename, w.lineno) for w in said if w.category is ig.ImplicitGradWarning) == [
        (HERE, line_of_first),
        (HERE, line_of_first + 2),
    ]


@pytest.mark.parametrize("through", ["implicit", "alone"])
def test_a_missed_tolerance_is_told_once_for_a_line_whatever_its_figures(through):
    def missed(a):
        if through == "alone":
            return SHORT.minimize(lambda w: quartic(w, a.detach()), a.detach())
        return ig.implicit(SHORT, ig.argmin(quartic))(a)

    def run():
        for scale in (1.0, 2.0, 3.0):
            missed(a_parameter() * scale)

    with shown() as said:
        run()
    assert len(said) == 1 and "after 1 step the gradient's norm is" in str(said[0].message)
    with shown() as said:  # another filter: Python begins anew
        run()
        assert len(said) == 1
        run()
    assert len(said) == 1
    with shown("always") as said:
        run()
    assert len({str(w.message) for w in said}) == len(said) == 3
    assert {w.filename for w in said} == {HERE}


def test_other_lines_and_other_minimisers_are_told_too():
    descent = ig.solvers.GradientDescent(lr=0.01, tol=1e-12, steps=2)
    with shown() as said:
        for minimiser in (SHORT, descent, SHORT):
            minimiser.minimize(lambda w: quartic(w, 3.0), torch.ones(2))
        SHORT.minimize(lambda w: quartic(w, 3.0), torch.ones(2))
    assert len(said) == 3


def test_a_missed_tolerance_is_raised_or_ignored_where_that_was_asked_for():
    a = a_parameter()
    raising = ig.implicit(SHORT, ig.argmin(quartic), on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match="after 1 step the gradient's norm is"):
        raising(a)
    with shown("always") as said:
        ig.implicit(SHORT, ig.argmin(quartic), on_failure="ignore")(a)
    assert not said


def test_and_so_it_is_in_a_learner():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
    for on_failure in ("raise", "ignore"):
        maml = ig.imaml(model, lam=0.1, lr=0.1, solver=SHORT, on_failure=on_failure)
        learner = maml.clone()
        expected = (
            pytest.raises(ig.LinearSolveError, match="NewtonCG: tol=1e-12")
            if on_failure == "raise"
            else contextlib.nullcontext()
        )
        with shown("error"), expected:
            learner.adapt(lambda: (learner(x) - 1).cosh().log().sum())  # noqa: B023


def test_a_call_within_a_call_speaks_for_itself():
    inner = ig.implicit(SHORT, ig.argmin(quartic))

    def objective(w, a):
        return (w - inner(a)).square().sum()

    outer = ig.implicit(lambda a: inner(a).detach(), ig.argmin(objective), on_failure="raise")
    with shown() as said:
        outer(a_parameter())
    assert {w.category for w in said} == {ig.ImplicitGradWarning}
