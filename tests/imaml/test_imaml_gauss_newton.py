"""imaml with Gauss-Newton products: the dense matrix, and the losses it refuses."""

import weakref

import pytest
import torch
from learners import (
    EXACT,
    STYLES,
    adapt,
    close,
    data,
    dense,
    error,
    gauss_newton,
    gradients,
    network,
    outer,
    same,
    weights_of,
    wrapped,
)
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def far_off(output):
    """A squared error with a target so far away that the Hessian is indefinite."""
    return mse_loss(output, torch.full_like(output, 20.0))


def on_labels(output):
    """A cross-entropy."""
    return 5 * cross_entropy(output, LABELS)


@pytest.mark.parametrize("criterion", [on_labels, far_off])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.CG(rtol=1e-13)], ids=["Exact", "CG"])
def test_gauss_newton_is_the_dense_matrix(linear_solver, style, criterion):
    inputs, lam, monitor = data()[0], 0.3, ig.Monitor()
    options = {"linear_solver": linear_solver, "monitor": monitor, "on_failure": "raise"}
    maml = wrapped(network(), lam, 0.01, curvature="gauss_newton", **options)
    learner = maml.clone()
    adapt(learner, lambda it: criterion(it(inputs)), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: criterion(it(inputs)), style)
    point = point if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    formed = gauss_newton(inputs, criterion)
    expected, matrix = dense(maml.module, point, None, v, lam, formed)
    close(gradients(outer(learner), maml), expected)
    assert monitor.last.curvature == "gauss_newton"
    assert monitor.last.min_curvature >= lam * (1 - 1e-9)
    least = float(torch.linalg.eigvalsh(matrix)[0])
    if isinstance(linear_solver, ig.Exact):
        assert abs(monitor.last.min_curvature - lam - least) < 1e-8
    _, full = dense(maml.module, point, lambda call: criterion(call(inputs)), v, lam)
    assert torch.linalg.eigvalsh(full)[0] < -0.05, "here the Hessian itself is indefinite"
    assert not torch.allclose(full, matrix)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", ["penalty", "two calls", "module", "weights only"])
def test_gauss_newton_refuses_losses_that_are_not_of_one_output(case, style):
    maml, (X, y) = wrapped(network(), curvature="gauss_newton"), data()
    losses = {
        "penalty": lambda it: mse_loss(it(X), y) + sum(p.square().sum() for p in it.parameters()),
        "two calls": lambda it: mse_loss(it(X), y) + mse_loss(it(X[:2]), y[:2]),
        "module": lambda it: mse_loss(it.module(X), y),
        "weights only": lambda it: sum(p.square().sum() for p in it.parameters()),
    }
    learner = maml.clone()
    with pytest.raises(ig.GraphError, match=r"function of the output of one.*curvature=\"hessian"):
        adapt(learner, losses[case], style)
    same(learner.parameters(), maml.parameters())
    adapt(learner, lambda it: error(it, (X, y)), style)
    assert all(g.norm() > 0 for g in gradients(outer(learner), maml))


class Several(nn.Module):
    """A network that returns a container."""

    def __init__(self, net, container):
        super().__init__()
        self.net, self.container = net, container

    def forward(self, x):
        first, second = self.net(x).unbind(1)
        return {
            dict: {"first": first, "second": second, "mask": None, "sizes": torch.arange(2)},
            tuple: (first, [second]),
        }[self.container]


@pytest.mark.parametrize("container", [dict, tuple])
def test_gauss_newton_through_containers_of_outputs(container):
    net, (X, y) = network(), data()

    def loss(output):
        if isinstance(output, dict):
            output = output["first"], [output["second"]]
        if isinstance(output, tuple):
            output = torch.stack([output[0], output[1][0]], 1)
        return mse_loss(output, y) + (output[:, 0] * output[:, 1]).exp().mean()

    outcomes = []
    for model in (net, Several(net, container)):
        maml = wrapped(model, curvature="gauss_newton", **EXACT)
        learner = maml.clone()
        adapt(learner, lambda it: loss(it(X)), "tensor", steps=3)
        outcomes.append(gradients(outer(learner), maml))
    close(*outcomes, 1e-12)


def test_gauss_newton_finds_the_call_that_the_loss_came_from():
    outcomes = []
    for spectators in (False, True):
        torch.manual_seed(1)
        maml = wrapped(network(), curvature="gauss_newton", **EXACT)
        learner, loss = maml.clone(), None
        if spectators:
            learner(data(7)[0])
        loss = error(learner, data(1))
        if spectators:
            learner(data(8)[0])
        learner.adapt(loss)
        outcomes.append(gradients(outer(learner), maml))
    same(*outcomes)


def test_gauss_newton_forgets_the_calls_of_former_steps():
    learner, batch = wrapped(network(), curvature="gauss_newton").clone(), data()
    outputs = []
    for _ in range(3):
        output = learner(batch[0])
        outputs.append(weakref.ref(output))
        learner.adapt(mse_loss(output, batch[1]))
        del output
    assert [w() is None for w in outputs] == [True, True, False]
