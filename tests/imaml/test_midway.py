"""EarlyStopped() without numbers: the derivative of MAML's own steps, around the middle one."""

import learn2learn as l2l
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learners import (
    STYLES,
    adapt,
    close,
    data,
    error,
    gradients,
    network,
    outer,
    weights_of,
    wrapped,
)
from problems import count_tensors, no_garbage_collector
from torch import nn

import implicit_grad as ig

MIDDLE = {"linear_solver": ig.EarlyStopped(maxiter=40), "on_failure": "raise"}
pytestmark = pytest.mark.usefixtures("double_precision")


def learners_gradient(maml, support, query, style, steps):
    """That of a learner's outer loss; of its second one, since the first counts the steps."""
    for _ in range(2):
        learner = maml.clone()
        adapt(learner, lambda it: error(it, support), style, steps)
        found = gradients(error(learner, query), maml)
    return torch.cat([g.flatten() for g in found])


@given(steps=st.integers(1, 7), lr=st.floats(0.01, 0.4), seed=st.integers(0, 9))
@pytest.mark.parametrize("style", STYLES)
def test_where_the_loss_is_quadratic_it_is_mamls_gradient(style, steps, lr, seed):
    maml = l2l.algorithms.MAML(nn.Linear(3, 2), lr=lr)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data(seed)), "tensor", steps)
    expected = gradients(error(learner, data(seed + 20)), maml)
    mine = learners_gradient(ig.imaml(maml, **MIDDLE), data(seed), data(seed + 20), style, steps)
    close([mine], [torch.cat([g.flatten() for g in expected])], 1e-9)


@pytest.mark.parametrize("style", STYLES)
def test_it_is_mamls_gradient_but_for_the_step_lengths_cube(style):
    """(I + tH)⁻¹ is but for the square; an odd number of steps has one in the middle."""
    model, support, query = network(), data(1), data(2)

    def distance(lr):
        maml = l2l.algorithms.MAML(model, lr=lr)
        mine = learners_gradient(ig.imaml(maml, **MIDDLE), support, query, style, 3)
        exact = learners_gradient(maml, support, query, "tensor", 3)
        return float((mine - exact).norm() / exact.norm())

    assert 7 < distance(0.01) / distance(0.005) < 9


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_losses_one_by_one_and_a_function_have_the_same_middle(steps):
    maml, support, query = wrapped(network(), None, 0.3, **MIDDLE), data(1), data(2)
    one, other = (learners_gradient(maml, support, query, style, steps) for style in STYLES)
    close([one], [other], 1e-10)


def test_two_runs_are_one_and_the_middle_of_both_may_be_in_the_second():
    maml, support = wrapped(network(), None, 0.3, **MIDDLE), data()
    found = {}
    for runs in ((7,), (2, 5), (3, 4), (5, 2)):
        learner = maml.clone()
        for steps in runs:
            adapt(learner, lambda it: error(it, support), "closure", steps)
        found[runs] = torch.cat([g.flatten() for g in gradients(outer(learner), maml)])
    close([found[2, 5], found[3, 4]], [found[7,]] * 2, 1e-12)
    assert (found[5, 2] - found[7,]).norm() > 1e-6 * found[7,].norm()  # around its own start


def test_other_numbers_of_steps_are_taken_around_their_last_loss():
    maml, support = wrapped(network(), None, 0.3, **MIDDLE), data()
    found = []
    for before, steps in ((None, 4), (6, 4), (3, 4), (4, 4)):
        if before is not None:
            learners_gradient(maml, support, data(2), "tensor", before)
        learner = maml.clone()
        adapt(learner, lambda it: error(it, support), "tensor", steps)
        found.append(gradients(outer(learner), maml))
        maml._midway.steps = 0
    close(found[1], found[0], 1e-12)
    close(found[2], found[0], 1e-12)
    assert (found[3][0] - found[0][0]).norm() > 1e-3 * found[0][0].norm()


def test_one_graph_is_kept_besides_the_last_however_many_steps_there_are():
    maml, support = wrapped(network(), None, 0.01, **MIDDLE), data()
    held = []
    for steps in (4, 8):
        learners_gradient(maml, support, data(2), "tensor", steps)
        with no_garbage_collector():
            before = count_tensors()
            learner = maml.clone()
            adapt(learner, lambda it: error(it, support), "tensor", steps)
            held.append(count_tensors() - before)
            del learner
    assert held[0] == held[1]


def test_gauss_newton_and_a_batch_of_tasks_take_the_middle_too():
    for curvature in ("hessian", "gauss_newton"):
        maml = wrapped(network(), None, 0.2, curvature=curvature, **MIDDLE)
        tasks = [data(seed) for seed in range(3)]
        X, y = (torch.stack(t) for t in zip(*tasks, strict=True))
        for _ in range(2):
            learner, total = maml.clone(tasks=3), 0.0
            for _ in range(5):
                learner.adapt((learner(X) - y).square().mean((1, 2)))
            mine = gradients((learner(X) - y).square().mean((1, 2)).sum(), maml)
        for task in tasks:
            alone = maml.clone()
            adapt(alone, lambda it, task=task: error(it, task), "tensor", 5)
            total = total + error(alone, task)
        close(mine, gradients(total, maml), 1e-9)


def test_second_derivatives_and_a_lam_are_refused():
    maml = wrapped(network(), None, 0.2, **MIDDLE)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "closure", 3)
    with pytest.raises(ig.GraphError, match="EarlyStopped"):
        torch.autograd.grad(outer(learner), weights_of(maml), create_graph=True)
    with pytest.raises(ig.InvalidArgumentError, match="lam=None"):
        wrapped(network(), 2.0, **MIDDLE)
    with pytest.raises(ig.InvalidArgumentError, match="imaml, which counts its steps"):
        ig.implicit(lambda a: a, ig.argmin(lambda p, a: (p - a) ** 2), **MIDDLE)
