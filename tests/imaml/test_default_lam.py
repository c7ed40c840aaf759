"""imaml without lam: MAML's own steps to the bit, and backward under λ = 1/(their lengths' sum)."""

import learn2learn as l2l
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learners import (
    CURVATURES,
    EXACT,
    STYLES,
    adapt,
    close,
    data,
    dense,
    error,
    gradients,
    network,
    outer,
    same,
    weights_of,
    wrapped,
)
from problems import Tied
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import implicit_grad as ig


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    torch.manual_seed(0)
    yield request.param
    torch.set_default_dtype(before)


def batch(dtype, seed=1, outputs=2):
    return tuple(t.to(dtype) for t in data(seed, outputs=outputs))


# ---------------------------------------------------------------- steps: those of MAML


def half_frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    return model


MODELS = {
    "network": (network, {}, 2),
    "shared tensors, some unused": (Tied, {"allow_unused": True}, 3),
    "frozen": (half_frozen, {"allow_nograd": True}, 2),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
def test_adaptation_is_that_of_maml_to_the_bit(name, style, dtype):
    make, options, outputs = MODELS[name]
    maml = l2l.algorithms.MAML(make(), lr=0.3, **options)
    mine, theirs, support = ig.imaml(maml).clone(), maml.clone(), batch(dtype, outputs=outputs)
    adapt(mine, lambda it: error(it, support), style, steps=7)
    adapt(theirs, lambda it: error(it, support), "tensor", steps=7)
    same(mine.module.parameters(), theirs.module.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_so_it_is_with_features_outside(style, dtype):
    body, support = network(outputs=4), batch(dtype)
    maml = l2l.algorithms.MAML(nn.Linear(4, 2), lr=0.7)
    features, heads = body(support[0]), [ig.imaml(maml).clone(), maml.clone()]
    for head, how in zip(heads, (style, "tensor"), strict=True):
        adapt(head, lambda it: mse_loss(it(features), support[1]), how, steps=5)
    same(heads[0].parameters(), heads[1].parameters())


def test_a_batch_of_tasks_adapts_as_each_of_them(dtype):
    maml = l2l.algorithms.MAML(network(), lr=0.3)
    tasks = [batch(dtype, seed) for seed in range(3)]
    stacked, together = [torch.stack(t) for t in zip(*tasks, strict=True)], ig.imaml(maml)
    learner = together.clone(tasks=3)
    for _ in range(4):
        learner.adapt((learner(stacked[0]) - stacked[1]).square().mean((1, 2)))
    for i, task in enumerate(tasks):
        alone = maml.clone()
        adapt(alone, lambda it, task=task: error(it, task), "tensor", steps=4)
        for mine, theirs in zip(weights_of(learner), weights_of(alone), strict=True):
            torch.testing.assert_close(mine[i], theirs)


# ---------------------------------------------------------------- gradients


def hessian_of(support):
    """∇² of the mean squared error in a linear model's weight and bias, row by row."""
    Z = torch.cat([support[0], torch.ones(len(support[0]), 1)], 1)
    return Z.T @ Z / len(Z)


def damped(v, support, time):
    """(I + t H)⁻¹ v for a linear model with two outputs: v of its weight and bias."""
    rows = torch.cat([v[0], v[1][:, None]], 1)
    H = hessian_of(support)
    solved = torch.linalg.solve(torch.eye(len(H)) + time * H, rows.T).T
    return [solved[:, :-1], solved[:, -1]]


STEPS = st.lists(
    st.tuples(st.floats(0.01, 0.4), st.sampled_from(STYLES), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


@pytest.mark.usefixtures("double_precision")
@given(steps=STEPS, seed=st.integers(0, 10))
def test_the_gradient_is_that_of_a_ridge_of_strength_one_over_the_lengths_sum(steps, seed):
    maml, support = wrapped(nn.Linear(3, 2), lam=None, linear_solver=ig.CG(rtol=1e-13)), data(seed)
    learner = maml.clone()
    for lr, style, count in steps:
        learner.lr = lr
        adapt(learner, lambda it: error(it, support), style, steps=count)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    time = sum(lr * count for lr, _, count in steps)
    close(gradients(outer(learner), maml), damped(v, support, time), 1e-9)


@pytest.mark.parametrize("style", STYLES)
def test_with_the_number_of_steps_it_is_mamls_own_where_the_loss_is_quadratic(style, dtype):
    """Two outputs make three curvatures, each twice: three products say all."""
    stopped, support = ig.EarlyStopped(steps=6, lr=0.3), batch(dtype)
    maml = l2l.algorithms.MAML(nn.Linear(3, 2), lr=0.3)
    found = []
    for it, how in ((ig.imaml(maml, linear_solver=stopped), style), (maml, "tensor")):
        learner = it.clone()
        adapt(learner, lambda it: error(it, support), how, steps=6)
        found.append(gradients(outer(learner), it))
    close(*found, 50 * torch.finfo(dtype).eps ** (2 / 3))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("first", STYLES)
def test_each_generation_has_a_sum_of_its_own(first, curvature):
    maml, support = wrapped(nn.Linear(3, 2), None, 0.2, curvature=curvature, **EXACT), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, support), first, steps=2)
    losses, found = [], []
    for lr in (0.1, 0.3):
        learner.lr = lr
        adapt(learner, lambda it: error(it, support), "closure", steps=3)
        losses.append(outer(learner))
        found.append(torch.autograd.grad(losses[-1], weights_of(learner), retain_graph=True))
    again = learner.clone()  # from here on, time runs anew
    adapt(again, lambda it: error(it, support), "closure", steps=1)
    for loss, v, time in zip(losses, found, (0.7, 1.6), strict=True):
        close(gradients(loss, maml), damped(v, support, time))
    v = torch.autograd.grad(outer(again), weights_of(again), retain_graph=True)
    once = damped(v, support, 0.3)
    close(gradients(outer(again), maml), damped(once, support, 1.6))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("style", STYLES)
def test_the_hessian_is_where_it_is_with_a_lam(style):
    """At the last iterate but one for a tensor, at the end for a function."""
    maml, support = wrapped(network(), None, 0.2, **EXACT), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, support), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: error(it, support), style)
    point = point if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected, _ = dense(maml.module, point, lambda call: error(call, support), v, 1 / 0.6)
    close(gradients(outer(learner), maml), expected, 1e-11)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("style", STYLES)
def test_it_is_mamls_gradient_but_for_the_step_lengths_square(style):
    model, support, query = network(), data(1), data(2)

    def distance(lr):
        maml = l2l.algorithms.MAML(model, lr=lr)
        found = []
        for learner, how in ((ig.imaml(maml, **EXACT).clone(), style), (maml.clone(), "tensor")):
            adapt(learner, lambda it: error(it, support), how, steps=3)
            found.append(torch.cat([g.flatten() for g in gradients(error(learner, query), maml)]))
        return float((found[0] - found[1]).norm() / found[1].norm())

    assert 3.5 < distance(0.01) / distance(0.005) < 4.5


@pytest.mark.usefixtures("double_precision")
def test_a_batch_of_tasks_has_the_gradient_of_their_sum():
    maml = wrapped(network(), lam=None, linear_solver=ig.CG(rtol=1e-12))
    tasks = [data(seed) for seed in range(3)]
    stacked, total = [torch.stack(t) for t in zip(*tasks, strict=True)], 0.0
    learner = maml.clone(tasks=3)
    for _ in range(2):
        learner.adapt((learner(stacked[0]) - stacked[1]).square().mean((1, 2)))
    for task in tasks:
        alone = maml.clone()
        adapt(alone, lambda it, task=task: error(it, task), "tensor", steps=2)
        total = total + error(alone, task)
    mine = (learner(stacked[0]) - stacked[1]).square().mean((1, 2)).sum()
    close(gradients(mine, maml), gradients(total, maml))


@pytest.mark.usefixtures("double_precision")
def test_features_outside_get_the_cross_derivative_under_the_same_lam():
    body, support = network(outputs=4), data()
    maml = wrapped(nn.Linear(4, 2), None, 0.2, **EXACT)
    features = body(support[0]).detach().requires_grad_()
    learner = maml.clone()
    adapt(learner, lambda it: mse_loss(it(features), support[1]), "closure", steps=3)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    phi = tuple(w.detach().requires_grad_() for w in weights_of(learner))
    weights = {"weight": phi[0], "bias": phi[1]}
    loss = mse_loss(functional_call(maml.module, weights, features), support[1])
    slope = torch.autograd.grad(loss, phi, create_graph=True)
    u = [0.6 * x for x in damped(v, (features.detach(),), 0.6)]
    expected = torch.autograd.grad(slope, features, [-x for x in u])
    actual = torch.autograd.grad(outer(learner), features)
    close(actual, expected)


# ---------------------------------------------------------------- no steps, other steps, no lam


@pytest.mark.usefixtures("double_precision")
def test_steps_of_no_length_leave_everything_as_it_is():
    maml, support = ig.imaml(l2l.algorithms.MAML(network(), lr=0.0)), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, support), "tensor", steps=2)
    same(weights_of(learner), maml.parameters())
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    same(gradients(outer(learner), maml), v)


@pytest.mark.usefixtures("double_precision")
def test_a_failed_adapt_takes_no_time():
    maml, support = wrapped(nn.Linear(3, 2), None, 0.2, **EXACT), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, support), "closure", steps=2)
    losses = iter([error(learner, support)])
    with pytest.raises(ig.InvalidArgumentError, match="once more than there were steps"):
        learner.adapt(lambda: next(losses))
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    close(gradients(outer(learner), maml), damped(v, support, 0.4))


@pytest.mark.usefixtures("double_precision")
def test_gradient_descent_for_a_number_of_steps_counts_its_own_lengths():
    solver = ig.solvers.GradientDescent(lr=0.15, steps=4)
    maml, support = wrapped(nn.Linear(3, 2), None, 0.9, solver=solver, **EXACT), data()
    learner = maml.clone()
    learner.adapt(lambda: error(learner, support))
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    close(gradients(outer(learner), maml), damped(v, support, 0.6))


@pytest.mark.parametrize(
    "solver",
    [
        ig.solvers.GradientDescent(lr=0.1, tol=1e-3),
        ig.solvers.GradientDescent(lr=0.1, steps=9, tol=1e-3),
        ig.solvers.Nesterov(lr=0.1, steps=9),
        lambda objective, init: init,
    ],
)
def test_other_minimisers_need_a_lam(solver):
    with pytest.raises(ig.InvalidArgumentError, match="a lam is needed"):
        wrapped(network(), lam=None, solver=solver)


@pytest.mark.parametrize("lr", [-0.1, float("inf"), float("nan")])
def test_step_lengths_that_lead_nowhere_are_named(lr):
    with pytest.raises(ig.InvalidArgumentError, match="lr must be a finite number"):
        wrapped(network(), lam=None, lr=lr)
