"""An adaptation that does not adapt is told: once, in numbers, and nothing else is."""

import warnings

import pytest
import torch
from learners import adapt, data, error, flat, network, wrapped
from torch import nn

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
FREEZES = r"lam \(its least value is 100\) freezes.*lr \* lam is 50,.*than 2 % of.*at most 10 "


def quietly(call):
    """Whatever is told is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# ---------------------------------------------------------------- a λ that freezes


LAMS = {
    "number": lambda: 100.0,
    "tensor": lambda: torch.tensor(100.0),
    "parameter": lambda: nn.Parameter(torch.tensor(100.0)),
    "per tensor": lambda: [100.0, 200.0, torch.tensor(300.0), 1e6],
    "learned": lambda: ig.LearnedLam(network(), 100.0),
}


@pytest.mark.parametrize("style", ["tensor", "closure"])
@pytest.mark.parametrize("form", LAMS)
def test_a_lam_that_freezes_is_told_once(form, style):
    maml, support = wrapped(network(), LAMS[form](), lr=0.5), data()
    learner = quietly(maml.clone)
    with pytest.warns(ig.ImplicitGradWarning, match=FREEZES) as caught:
        adapt(learner, lambda it: error(it, support), style, steps=2)
    assert len(caught) == 1
    for other in (maml.clone(), learner.clone()):
        quietly(lambda it=other: adapt(it, lambda it: error(it, support), style))


def test_what_it_says_is_so():
    """The way after many steps, in units of a single free one: at most 1/(lr lam)."""
    model, support = nn.Linear(3, 2), data()
    free = wrapped(model, lam=None, lr=0.5).clone()
    adapt(free, lambda it: error(it, support), "tensor")
    held = wrapped(model, 100.0, lr=0.5, on_failure="ignore").clone()
    adapt(held, lambda it: error(it, support), "tensor", steps=30)
    ways = [(flat(it.parameters()) - flat(model.parameters())).norm() for it in (held, free)]
    assert 0 < ways[0] <= 0.02 * ways[1]


@pytest.mark.parametrize("lam", [10.0, 0.1, None, [1e4, 1e4, 10.0, 10.0]])
def test_others_are_not(lam):
    """That some layers are held is what a λ for each of them is for."""
    learner = wrapped(network(), lam, lr=0.5).clone()
    for style in ("tensor", "closure"):
        quietly(lambda style=style: adapt(learner, lambda it: error(it, data()), style))


def test_a_step_length_that_was_raised_is_seen():
    maml = wrapped(network(), 10.0, lr=0.5)
    learner = maml.clone()
    quietly(lambda: adapt(learner, lambda it: error(it, data()), "tensor"))
    learner.lr = 5.0
    with pytest.warns(ig.ImplicitGradWarning, match=r"lr \* lam is 50"):
        adapt(learner, lambda it: error(it, data()), "tensor")


def test_a_solver_of_its_own_takes_no_steps_of_that_length():
    maml = wrapped(network(), 1e3, lr=0.5, solver=ig.solvers.NewtonCG())
    learner = maml.clone()
    quietly(lambda: learner.adapt(lambda: error(learner, data())))


# ---------------------------------------------------------------- losses


def test_a_loss_that_grows_is_told_once():
    maml, support = wrapped(nn.Linear(3, 2), lam=None, lr=20.0), data()
    learner = maml.clone()
    start = error(learner, support).item()
    with pytest.warns(ig.ImplicitGradWarning, match=f"loss went from {start:.3g} to .*lower lr"):
        adapt(learner, lambda it: error(it, support), "closure", steps=3)
    assert error(learner, support) > 10 * start
    quietly(lambda: adapt(maml.clone(), lambda it: error(it, support), "closure", steps=3))


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
def test_a_loss_that_falls_is_not(shift):
    learner = wrapped(network(), lam=None, lr=0.1).clone()
    adapt_it = lambda: learner.adapt(lambda: error(learner, data()) + shift, steps=5)  # noqa: E731
    quietly(adapt_it)


def test_rounding_of_a_loss_of_zero_is_not_growth():
    model, X = nn.Linear(3, 2), data()[0]
    labels = model(X).detach()
    learner = wrapped(model, lam=None, lr=0.3).clone()
    quietly(lambda: learner.adapt(lambda: error(learner, (X, labels)), steps=9))


def test_a_last_loss_that_is_no_number_is_told():
    learner = wrapped(nn.Linear(3, 2), lam=None, lr=0.1).clone()
    factors = iter([1.0, float("nan")])
    with pytest.warns(ig.ImplicitGradWarning, match=r"loss went from [\d.]+ to nan"):
        learner.adapt(lambda: error(learner, data()) * next(factors))


def test_a_loss_of_a_step_that_is_no_number_is_told_once():
    maml = wrapped(nn.Linear(3, 2), lam=None, lr=0.1)
    learner = maml.clone()
    with pytest.warns(ig.ImplicitGradWarning, match=r"the loss is nan"):
        learner.adapt(error(learner, data()) * float("nan"))
    quietly(lambda: learner.adapt(error(learner, data())))


@pytest.mark.parametrize("on_failure", ["raise", "ignore"])
def test_on_failure_decides(on_failure):
    learner = wrapped(network(), 100.0, lr=0.5, on_failure=on_failure).clone()
    if on_failure == "ignore":
        quietly(lambda: adapt(learner, lambda it: error(it, data()), "tensor"))
    else:
        with pytest.raises(ig.LinearSolveError, match="freezes adaptation"):
            adapt(learner, lambda it: error(it, data()), "tensor")
