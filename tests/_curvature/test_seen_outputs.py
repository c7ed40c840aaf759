"""Gauss-Newton where phi is a module: the outputs of its calls are seen."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import implicit_grad as ig
from implicit_grad._torch.seen_calls import SeenCalls

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, dtype=torch.float64, generator=RANDOM)
LABELS = torch.randint(0, 3, (12,), generator=RANDOM)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def penalty(net, decay):
    return decay * sum(p.pow(4).sum() + p.square().sum() for p in net.parameters())


def objective(net, decay):
    return nn.functional.cross_entropy(net(X), LABELS) + penalty(net, decay)


def as_it_is(net, decay):
    """A solver that leaves the weights: Gauss-Newton products need no minimum."""
    return net


def dense(net, decay):
    """−vᵀA⁻¹ ∂²penalty/∂φ∂decay with A = JᵀHJ + ∂²penalty, by torch, for v all ones."""
    weights = {name: p.detach() for name, p in net.named_parameters()}
    shapes = [(name, p.shape, p.numel()) for name, p in weights.items()]
    flat = torch.cat([p.flatten() for p in weights.values()])

    def unflat(vector):
        parts = vector.split([size for *_, size in shapes])
        return {n: part.view(s) for (n, s, _), part in zip(shapes, parts, strict=True)}

    copy = deepcopy(net)  # batch norm writes to it
    outputs = functional_call(copy, weights, (X,))
    J = jacobian(lambda v: functional_call(copy, unflat(v), (X,)), flat).flatten(0, -2)
    loss = lambda o: nn.functional.cross_entropy(o.view_as(outputs), LABELS)  # noqa: E731
    A = J.T @ hessian(loss, outputs.flatten()) @ J + torch.diag(decay * (12 * flat**2 + 2))
    return -torch.linalg.solve(A, torch.ones_like(flat)) @ (4 * flat**3 + 2 * flat)


def by_library(condition, net=None, **options):
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    monitor = ig.Monitor()
    solve = ig.implicit(
        as_it_is,
        condition,
        monitor=monitor,
        on_failure="ignore",
        **{"curvature": "gauss_newton", **options},
    )
    trained = solve(network() if net is None else net, decay)
    sum(p.sum() for p in trained.parameters()).backward()
    return decay.grad, monitor.last


def test_outputs_and_penalties_are_told_apart():
    found, report = by_library(ig.argmin(objective))
    assert report.curvature == "gauss_newton" and report.min_curvature > 0
    torch.testing.assert_close(found, dense(network(), 0.1))
    exact, _ = by_library(ig.argmin(objective), curvature="hessian", linear_solver=ig.Exact())
    assert (exact - found).abs() > 1e-3 * found.abs()  # the two differ


def test_calls_of_parts_and_several_calls():
    def parts(net, decay):
        return nn.functional.cross_entropy(net[2](net[:2](X)), LABELS) + penalty(net, decay)

    def twice(net, decay):
        loss = nn.functional.cross_entropy
        return (
            (loss(net(X[:5]), LABELS[:5], reduction="sum")) / 12
            + (loss(net(X[5:]), LABELS[5:], reduction="sum")) / 12
            + penalty(net, decay)
        )

    for function in (parts, twice):
        found, _ = by_library(ig.argmin(function))
        torch.testing.assert_close(found, dense(network(), 0.1))


def test_proximal_terms_and_batches():
    pull = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    net = network()
    solve = ig.implicit(
        lambda net: net,
        ig.proximal(lambda net: nn.functional.cross_entropy(net(X), LABELS), pull),
        curvature="gauss_newton",
        on_failure="ignore",
    )
    sum(p.sum() for p in solve(net).parameters()).backward()
    by_hand = ig.implicit(
        lambda net: net,
        ig.proximal(
            lambda o: nn.functional.cross_entropy(o, LABELS), pull, model=lambda net: net(X)
        ),
        curvature="gauss_newton",
        on_failure="ignore",
    )
    other = network()
    sum(p.sum() for p in by_hand(other).parameters()).backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

    summed = ig.argmin(
        lambda net, batch, decay: (
            nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="sum") / 12
        ),
        batches=[(X[:5], LABELS[:5]), (X[5:], LABELS[5:])],
        regularizer=penalty,
    )
    torch.testing.assert_close(by_library(summed)[0], dense(network(), 0.1))


def test_minimisers_and_negative_curvature():
    start = network()
    solve = ig.implicit(
        ig.solvers.NewtonCG(tol=1e-9), ig.argmin(objective), curvature="gauss_newton"
    )
    decay = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    trained = solve(start, decay)
    sum(p.sum() for p in trained.parameters()).backward()
    start.load_state_dict(trained.state_dict())
    torch.testing.assert_close(decay.grad, dense(start, 0.02), rtol=1e-5, atol=1e-7)

    fallback = ig.CG(on_negative_curvature="gauss_newton")
    found, report = by_library(ig.argmin(objective), curvature="auto", linear_solver=fallback)
    assert report.substitute == "gauss_newton"
    torch.testing.assert_close(found, dense(network(), 0.1))


class Twofold(nn.Module):
    """Layers of the kinds that hold more than plain parameters."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.norm = nn.BatchNorm1d(4)
        self.recurrent = nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return self.recurrent(self.norm(self.normed(x))[:, None])[0][:, 0]


def test_modules_of_other_kinds_and_what_is_left_of_them():
    torch.manual_seed(2)
    net = Twofold().double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found, _ = by_library(ig.argmin(objective), net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not net._forward_hooks and not net._forward_pre_hooks
    torch.testing.assert_close(found, dense(net, 0.1))


def test_functional_calls_inside_keep_their_own_weights():
    def stepped(net, decay):
        fast = {name: 0.5 * p for name, p in net.named_parameters()}
        return nn.functional.cross_entropy(functional_call(net, fast, (X,)), LABELS) + 0 * decay

    value = []

    def noted(net, decay):
        value.append(stepped(net, decay).detach())
        return stepped(net, decay) + penalty(net, decay)

    with pytest.raises(ig.ImplicitGradError, match="in two ways"):
        by_library(ig.argmin(noted))  # its weights are read as well
    torch.testing.assert_close(value[0], stepped(network(), 0).detach())


class Leaky(nn.Linear):
    def forward(self, x):
        self.bent = self.weight.square().sum()
        return super().forward(x)


@pytest.mark.parametrize(
    ("function", "net", "sentence"),
    [
        (lambda net, decay: penalty(net, decay), None, "does not depend on the output"),
        (
            lambda net, decay: nn.functional.linear(X, net[0].weight).square().sum(),
            None,
            "does not depend on the output",
        ),
        (
            lambda net, decay: net(X).square().sum() + net.bent,
            lambda: Leaky(3, 3).double(),
            "otherwise than through outputs",
        ),
        (
            lambda net, decay: net[1:](net[0](X)).sum() + net[0](X).sum(),
            None,
            None,
        ),
        (
            lambda net, decay: (lambda h: net[1:](h).square().sum() + h.sum())(net[0](X)),
            None,
            "in two ways",
        ),
    ],
)
def test_what_is_no_function_of_outputs_is_refused(function, net, sentence):
    condition = ig.argmin(lambda net, decay: function(net, decay) + 0 * decay)
    made = network() if net is None else net()
    if sentence is None:
        by_library(condition, made)
        return
    with pytest.raises(ig.InvalidSolutionError, match=sentence):
        by_library(condition, made)


def test_tensors_are_refused_with_what_to_do():
    solve = ig.implicit(
        lambda a: a.detach() + 1, ig.argmin(lambda w, a: (w - a) ** 2), curvature="gauss_newton"
    )
    a = torch.tensor(1.0, requires_grad=True)
    many = torch.func.vmap(torch.func.grad(solve))
    for call, at in ((solve, a), (torch.func.grad(solve), a), (many, a[None])):
        with pytest.raises(ig.InvalidArgumentError, match=r"no module.*model=model"):
            call(at)


def test_recurrent_layers_compute_with_phi_in_calls_and_are_read_as_views():
    seen = SeenCalls(nn.GRU(4, 3, batch_first=True))
    output, _ = seen.container(torch.ones(2, 1, 4))
    outputs, read = seen.behind(output.sum() + seen.container.bias_hh_l0.sum())
    assert len(outputs) == 1 and outputs[0] is output
    assert len(read) == 1 and read[0] is seen.container.bias_hh_l0
