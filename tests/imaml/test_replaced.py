"""Weights that are put into a learner after it was cloned: adapted rightly, or named."""

import copy

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
    gradients,
    learn2learn,
    network,
    outer,
    same,
    weights_of,
    wrapped,
)
from problems import normal
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


def put(layer, **tensors):
    """Tensors with a graph in the place of a layer's parameters, which torch lets nobody assign."""
    layer._parameters.update(tensors)


HEADS = {
    "a new layer": lambda learner: setattr(learner.module, "2", nn.Linear(4, 2)),
    "one of its parameters": lambda learner: setattr(
        learner.module[2], "weight", nn.Parameter(normal(2, 4, seed=7, grad=False))
    ),
    "tensors with a graph": lambda learner: put(
        learner.module[2],
        weight=nn.Parameter(normal(2, 4, seed=7, grad=False)).exp(),
        bias=nn.Parameter(normal(2, seed=8, grad=False)) * 2,
    ),
    "one more layer": lambda learner: learner.module.append(nn.Linear(2, 2)),
    "one layer less": lambda learner: learner.module.__delitem__(2),
    "another model": lambda learner: setattr(learner, "module", network()),
}


def targets(learner):
    """A batch for as many outputs as there are."""
    x, _ = data()
    return x, torch.ones_like(learner(x))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lam", [20.0, None])
def test_a_learner_goes_on_as_a_clone_of_it_would(lam, head, steps_before, first_order, style):
    """Which has right gradients with respect to whatever stands in its model."""
    outcomes = []
    for cloned in (False, True):
        torch.manual_seed(2)
        maml = wrapped(network(), lam, 0.02, first_order=first_order, **EXACT)
        learner = maml.clone()
        adapt(learner, lambda it: error(it, data()), style, steps=steps_before)
        torch.manual_seed(3)
        HEADS[head](learner)
        found = [p for p in learner.module.parameters() if p.is_leaf]
        if cloned:
            learner = learner.clone()
        batch = targets(learner)
        adapt(learner, lambda it: error(it, batch), style, steps=3)  # noqa: B023
        wanted = [*maml.parameters(), *found]
        loss = outer(learner)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        outcomes.append([*learner.module.parameters(), *(g for g in grads if g is not None)])
    same(*outcomes)


@pytest.mark.parametrize("style", STYLES)
def test_a_new_head_has_the_gradient_of_its_own_starting_point(style):
    maml, support = wrapped(network(), 2.0, **EXACT), data(1)
    learner, head = maml.clone(), nn.Linear(4, 2)
    theta = [*maml.module[0].parameters(), *head.parameters()]
    learner.module[2] = head
    twin = nn.Sequential(maml.module[0], nn.Tanh(), copy.deepcopy(head))
    adapt(learner, lambda it: error(it, support), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: error(it, support), style)
    point = point if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected, _ = dense(twin, point, lambda call: error(call, support), v, 2.0)
    close(torch.autograd.grad(outer(learner), theta), expected, 1e-11)


def prototypes(features, labels):
    """Proto-MAML's first head: scores are 2 c·z − |c|², c the mean of a class's features."""
    means = torch.stack([features[labels == k].mean(0) for k in range(2)])
    return 2 * means, -means.square().sum(1)


@pytest.mark.parametrize("style", STYLES)
def test_proto_maml_has_the_gradient_of_its_unrolled_adaptation(style):
    """The head starts at prototypes of the body's features, and both adapt from there."""
    body, lam, lr, (x, y), (far, away) = nn.Linear(3, 4), 3.0, 0.1, data(1), data(2)
    labels = torch.arange(6) % 2
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(4, 2))

    theta = [*body.parameters()]
    head = prototypes(torch.tanh(body(x)), labels)
    start, phi = [*theta, *head], [*theta, *head]

    def loss_at(phi, x, y):
        return mse_loss(torch.tanh(x @ phi[0].T + phi[1]) @ phi[2].T + phi[3], y)

    for _ in range(200):
        independent = [p.view_as(p) for p in phi]  # the head's path to the body is not the loss's
        slope = torch.autograd.grad(loss_at(independent, x, y), independent, create_graph=True)
        phi = [p - lr * (g + lam * (p - t)) for p, g, t in zip(phi, slope, start, strict=True)]
    expected = torch.autograd.grad(loss_at(phi, far, away), theta)

    learner = wrapped(model, lam, lr, **EXACT).clone()
    weight, bias = prototypes(learner.module[:2](x), labels)
    put(learner.module[2], weight=weight, bias=bias)
    adapt(learner, lambda it: error(it, (x, y)), style, steps=200)
    close(list(learner.module.parameters()), phi)
    close(torch.autograd.grad(error(learner, (far, away)), theta), expected)


@pytest.mark.parametrize("style", STYLES)
def test_weights_after_learn2learns_update_are_adapted_from_where_they_are(style):
    """An unrolled step of the user's, and then implicit ones."""
    update, support = learn2learn().algorithms.maml.maml_update, data(1)
    outcomes = []
    for cloned in (False, True):
        torch.manual_seed(2)
        maml = wrapped(network(), 2.0, **EXACT)
        learner = maml.clone()
        slope = torch.autograd.grad(
            error(learner, support), list(learner.module.parameters()), create_graph=True
        )
        update(learner.module, 0.1, slope)
        learner = learner.clone() if cloned else learner
        adapt(learner, lambda it: error(it, support), style, steps=2)
        outcomes.append([*learner.module.parameters(), *gradients(outer(learner), maml)])
    same(*outcomes)


def test_functional_call_lends_weights_only():
    """Called with others, a learner goes on from its own afterwards, under transforms too."""
    maml, (x, _) = wrapped(network(), 2.0, **EXACT), data()
    outcomes = []
    for lent in (False, True):
        learner = maml.clone()
        adapt(learner, lambda it: error(it, data()), "tensor", steps=2)
        own = dict(learner.named_parameters())
        if lent:
            others = {n: nn.Parameter(p.detach() + 1) for n, p in own.items()}
            with torch.no_grad():
                expected = functional_call(maml.module, named(others), x)
            assert torch.equal(functional_call(learner, others, x), expected)
            stacked = {n: p.detach().expand(2, *p.shape) for n, p in own.items()}
            vmap(lambda w: functional_call(learner, w, x))(stacked)  # noqa: B023
        assert all(p is own[n] for n, p in learner.named_parameters())
        adapt(learner, lambda it: error(it, data()), "tensor")
        outcomes.append([*learner.parameters(), *gradients(outer(learner), maml)])
    same(*outcomes)


def named(tensors):
    """Without the learner's prefix."""
    return {name.removeprefix("module."): t for name, t in tensors.items()}


def test_without_gradients_nothing_is_taken_in():
    learner = wrapped(network()).clone()
    learner.module[2] = head = nn.Linear(4, 2)
    with torch.no_grad():
        learner(data()[0])
    assert isinstance(head.weight, nn.Parameter)
    adapt(learner, lambda it: error(it, data()), "tensor")
    assert not isinstance(learner.module[2].weight, nn.Parameter)


# ---------------------------------------------------------------- what is named


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_loss_that_was_computed_past_the_learner_is_named():
    x, y = data()
    found = r"head\.weight, head\.bias were put .*clone"
    for compute in (lambda it: it.module(x), lambda it: it.head(it.body(x))):
        learner = wrapped(Two()).clone()
        learner.module.head = nn.Linear(4, 2)
        loss = mse_loss(compute(learner), y)
        with pytest.raises(ig.InvalidArgumentError, match=found):
            learner.adapt(loss)
        learner = learner.clone()
        learner.adapt(mse_loss(compute(learner), y))


@pytest.mark.parametrize("style", STYLES)
def test_a_layer_that_was_assigned_to_the_learner_is_named(style):
    learner = wrapped(Two()).clone()
    learner.head = nn.Linear(4, 2)
    with pytest.raises(ig.InvalidArgumentError, match=r"learner\.module\.head = "):
        adapt(learner, lambda it: error(it, data()), style)
    learner = wrapped(Two()).clone()
    learner.note = nn.Linear(4, 2)  # nothing that the model has
    adapt(learner, lambda it: error(it, data()), style)


@pytest.mark.parametrize("style", STYLES)
def test_the_models_own_layer_is_not_to_be_overwritten(style):
    maml = wrapped(Two())
    learner = maml.clone()
    learner.module.head = maml.module.head
    with pytest.raises(ig.InvalidArgumentError, match=r"the model's own head\.weight"):
        adapt(learner, lambda it: error(it, data()), style)
    assert isinstance(maml.module.head.weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it when it converts
@pytest.mark.parametrize("style", STYLES)
def test_another_dtype_after_clone_is_named(style):
    learner = wrapped(network()).clone().float()
    x, y = (t.float() for t in data())
    with pytest.raises(ig.InvalidArgumentError, match=r"0\.weight is torch\.float32 on cpu now"):
        adapt(learner, lambda it: mse_loss(it(x), y), style)
    learner = wrapped(network()).clone()
    learner.module[2] = nn.Linear(4, 2).float()
    with pytest.raises(ig.InvalidArgumentError, match=r"2\.weight is torch\.float32 on cpu now"):
        learner(data()[0])


def test_tasks_have_weights_of_their_own():
    learner = wrapped(network()).clone(tasks=2)
    learner.module[2] = nn.Linear(4, 2)
    with pytest.raises(ig.InvalidArgumentError, match=r"before clone\(tasks=\.\.\.\)"):
        learner(torch.ones(2, 6, 3))


@pytest.mark.parametrize("per", ["list", "learned", "low rank"])
def test_a_lam_for_each_parameter_does_not_fit_others(per):
    model = network()
    lam = {
        "list": [1.0] * 4,
        "learned": ig.LearnedLam(model, per="tensor"),
        "low rank": ig.LearnedLam(model, rank=1),
    }[per]
    learner = wrapped(model, lam).clone()
    learner.module[2] = nn.Linear(4, 2)  # of the same names and shapes
    adapt(learner, lambda it: error(it, data()), "tensor")
    learner.module.append(nn.Linear(2, 2))
    for call in (lambda: learner(data()[0]), learner.clone):
        with pytest.raises(ig.InvalidArgumentError, match=r"lam has an entry for each.*'3\.bias'"):
            call()


def test_frozen_layers_that_are_put_in_need_allow_nograd():
    learner = wrapped(network()).clone()
    learner.module[2] = nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(ig.InvalidArgumentError, match=r"2\.weight.* has requires_grad=False"):
        adapt(learner, lambda it: error(it, data()), "tensor")
    adapt(learner, lambda it: error(it, data()), "tensor", allow_nograd=True)
