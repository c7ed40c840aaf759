"""imaml(adapts=...): a part of the model adapts, or a tensor that it holds, and the rest learns."""

import copy

import pytest
import torch
from learners import EXACT, STYLES, adapt, data, error
from problems import normal
from torch import nn
from torch.func import functional_call

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


class Contextual(nn.Module):
    """A network that sees a context beside its input (CAVIA)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.context = torch.zeros(2, requires_grad=True)

    def forward(self, x):
        seen = torch.cat([x, self.context.expand(len(x), 2)], 1)
        return self.head(self.body(seen))


def loss_at(model, phi, batch):
    """The loss with other tensors in the places of some; a context is no parameter."""
    other = copy.deepcopy(model)
    rest = {k: t for k, t in phi.items() if k != "context"}
    other.context = phi.get("context", model.context)
    everything = dict(model.named_parameters()) | rest
    return nn.functional.mse_loss(functional_call(other, everything, (batch[0],)), batch[1])


def expected(model, names, lam, lr, steps):
    """φ by the formula of proximal steps, and the meta-gradient by dense matrices."""
    inner, outer = data(), data(seed=2)
    held = dict(model.named_parameters()) | {"context": model.context}
    theta = [held[n] for n in names]
    phi = [t.detach() for t in theta]
    shapes = [t.shape for t in theta]

    def at(flat, batch, weights=None):
        parts = flat.split([s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return loss_at(model, named, batch)

    flat = torch.cat([t.flatten() for t in phi])
    start = flat
    for _ in range(steps):
        moving = flat.clone().requires_grad_()
        (slope,) = torch.autograd.grad(at(moving, inner), moving)
        flat = (flat - lr * slope + lr * lam * start) / (1 + lr * lam)
    flat = flat.requires_grad_()
    rest = [p for n, p in model.named_parameters() if n not in names]
    (v,) = torch.autograd.grad(at(flat, outer), flat, retain_graph=True)
    direct = torch.autograd.grad(at(flat, outer), rest)
    (slope,) = torch.autograd.grad(at(flat, inner), flat, create_graph=True)
    H = torch.stack([torch.autograd.grad(s, flat, retain_graph=True)[0] for s in slope])
    u = torch.linalg.solve(H + lam * torch.eye(len(v)), v)
    mixed = torch.autograd.grad(slope @ u, rest)
    of_theta = (lam * u).split([s.numel() for s in shapes])
    wanted = dict(zip(names, of_theta, strict=True))
    of_rest = [n for n, _ in model.named_parameters() if n not in names]
    pairs = zip(of_rest, direct, mixed, strict=True)
    return flat.detach(), wanted | {n: d - m for n, d, m in pairs}


@pytest.mark.parametrize(
    ("adapts", "names"),
    [
        ("context", ["context"]),
        ("head", ["head.weight", "head.bias"]),
        (("head.bias", "body.0"), ["body.0.weight", "body.0.bias", "head.bias"]),
        (["head", "context", "head.bias"], ["head.weight", "head.bias", "context"]),
    ],
)
@pytest.mark.parametrize("copied", [True, False])
def test_it_alone_adapts_and_the_rest_has_the_gradient_of_both_losses(adapts, names, copied):
    model = Contextual()
    before = {n: t.detach().clone() for n, t in model.named_parameters()}
    phi, gradients = expected(model, names, lam=1.5, lr=0.3, steps=4)
    maml = ig.imaml(model, 1.5, lr=0.3, adapts=adapts, **EXACT)
    learner = maml.clone() if copied else maml
    context, theta = model.context, dict(model.named_parameters())
    theta["context"] = context
    learner.adapt(lambda: error(learner, data()), steps=4)
    inside = dict(learner.module.named_parameters()) | {"context": learner.module.context}
    torch.testing.assert_close(torch.cat([inside[n].flatten() for n in names]), phi)
    assert all(torch.equal(inside[n], t) for n, t in before.items() if n not in names)
    assert model.context is context or not copied
    error(learner, data(seed=2)).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theta[name].grad.flatten(), gradient.flatten())


@pytest.mark.parametrize("style", STYLES)
def test_a_head_that_adapts_is_anil(style):
    """The same bits as a learner of the head alone, on features that are computed outside."""
    whole, parts = Contextual(), Contextual()
    learner = ig.imaml(whole, lr=0.3, adapts="head").clone()
    adapt(learner, lambda one: error(one, data()), style, steps=3)
    error(learner, data(seed=2)).backward()

    head = ig.imaml(parts.head, lr=0.3).clone()

    def features(X):
        return parts.body(torch.cat([X, parts.context.expand(len(X), 2)], 1))

    def loss(learner, seed=1):
        X, y = data(seed=seed)
        return nn.functional.mse_loss(learner(features(X)), y)

    adapt(head, loss, style, steps=3)
    loss(head, 2).backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_second_derivatives_reach_the_rest():
    """Of φ = θ − b/λ, for a loss that is linear in the context: all orders are known."""
    model, lam, weight = Contextual(), 2.0, torch.tensor([0.3, -0.5], requires_grad=True)
    model.weight = nn.Parameter(weight.detach())
    maml = ig.imaml(model, lam, lr=0.5, adapts="context", solver=ig.solvers.NewtonCG(), **EXACT)
    learner = maml.clone()
    learner.adapt(lambda: (learner.module.weight.square() * learner.module.context).sum())
    loss = learner.module.context.pow(3).sum()
    (first,) = torch.autograd.grad(loss, model.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), model.weight)
    w = model.weight.detach()
    torch.testing.assert_close(first.detach(), -6 * w**5 / lam**3)
    torch.testing.assert_close(second, -30 * w**4 / lam**3)


def test_a_batch_of_tasks_has_heads_of_its_own():
    model = Contextual()
    X, y = normal(3, 6, 3, grad=False), normal(3, 6, 2, seed=9, grad=False)
    maml = ig.imaml(model, 1.5, lr=0.3, adapts="head", linear_solver=ig.CG(rtol=1e-12))

    def both(learner, X, y):
        for _ in range(2):
            learner.adapt(mse(learner(X), y))
        mse(learner(X), y).sum().backward()

    mse = torch.func.vmap(nn.functional.mse_loss)
    both(maml.clone(tasks=3), X, y)
    together = [p.grad for p in model.parameters()]
    model.zero_grad()
    mse = nn.functional.mse_loss
    for i in range(3):
        both(maml.clone(), X[i], y[i])
    for one, p in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
    with pytest.raises(ig.InvalidArgumentError, match="context adapts and is no parameter"):
        ig.imaml(model, lr=0.3, adapts=["head", "context"]).clone(tasks=3)


def test_a_learned_lam_is_one_for_what_adapts():
    model = Contextual()
    lam = ig.LearnedLam(model.head, init=1.5, per="tensor")
    learner = ig.imaml(model, lam, lr=0.3, adapts="head", **EXACT).clone()
    learner.adapt(lambda: error(learner, data()), steps=4)
    error(learner, data(seed=2)).backward()
    wanted = expected(model, ["head.weight", "head.bias"], lam=1.5, lr=0.3, steps=4)[1]
    torch.testing.assert_close(model.head.bias.grad, wanted["head.bias"])
    assert all(p.grad is not None for p in lam.parameters())


def test_a_context_that_is_reset_is_adapted_anew():
    """As CAVIA does between tasks, in the learner or in the model."""
    model = Contextual()
    maml = ig.imaml(model, lr=0.3, adapts="context")
    learner = maml.clone()
    learner.adapt(error(learner, data()))
    first = learner.module.context.detach()
    learner.module.context = torch.zeros(2, requires_grad=True)
    learner.adapt(error(learner, data()))
    assert torch.equal(learner.module.context, first)
    model.context = torch.ones(2, requires_grad=True)
    other = maml.clone()
    assert torch.equal(other.module.context, torch.ones(2))


def test_what_is_frozen_among_it_is_named_and_the_rest_may_be_frozen():
    model = Contextual()
    model.body.requires_grad_(False)
    learner = ig.imaml(model, lr=0.3, adapts="head").clone()
    learner.adapt(error(learner, data()))
    model.head.bias.requires_grad_(False)
    learner = ig.imaml(model, lr=0.3, adapts="head").clone()
    with pytest.raises(ig.InvalidArgumentError, match=r"adapt: head.bias has requires_grad=False"):
        learner.adapt(error(learner, data()))
    learner.adapt(error(learner, data()), allow_nograd=True)


@pytest.mark.parametrize(
    ("adapts", "sentence"),
    [
        ("contxt", "nothing of that name. Among its parts and parameters are body, head, body.0.w"),
        ("body.1", "or a part of the model with parameters"),
        ("training", "expected a floating-point tensor.*found"),
        ([], "or a list of such names"),
        (3, "or a list of such names"),
        ([nn.Linear(1, 1)], "or a list of such names"),
    ],
)
def test_names_that_lead_nowhere_are_refused(adapts, sentence):
    with pytest.raises(ig.InvalidArgumentError, match=sentence):
        ig.imaml(Contextual(), lr=0.3, adapts=adapts)


def test_what_cannot_adapt_is_refused():
    model = Contextual()
    model.plain = torch.zeros(2)
    with pytest.raises(ig.InvalidArgumentError, match=r"adapts='plain'.* does not require grad"):
        ig.imaml(model, lr=0.3, adapts=["head", "plain"])
    model.made = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ig.InvalidArgumentError, match=r"adapts='made.weight'.* computed anew"):
        ig.imaml(model, lr=0.3, adapts="made.weight")
