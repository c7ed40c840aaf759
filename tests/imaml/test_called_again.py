"""The check of `adapt(loss)` of a tensor: the learner's call is made again, and leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import implicit_grad as ig

DTYPES = (torch.float32, torch.float64)
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class InNumPy(torch.autograd.Function):
    """x sin x, whose backward is no operation of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy((x * x.cos() + x.sin()).detach().numpy())


class Held(InNumPy):
    """The same, in any dtype: its backward holds x constant."""

    @staticmethod
    def backward(ctx, g):
        (x,) = (t.detach() for t in ctx.saved_tensors)
        return g * (x * x.cos() + x.sin())


class Through(nn.Module):
    """A layer of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class InADict(nn.Linear):
    """A head whose output is a dict, with a tensor that the loss does not use."""

    def forward(self, x):
        return {"hidden": x, "logits": super().forward(x)}


class Counted(nn.Module):
    """The mean over its calls: another function each time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def layers():
    torch.manual_seed(2)
    return {
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "dropout": nn.Dropout(0.5),
        "batch norm": nn.BatchNorm1d(8),
        "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
        "of a dict": nn.Identity(),
        "counts its calls": Counted(),
    }


def network(layer, head=nn.Linear, dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), layer, head(8, 3)).to(dtype)


def loss(output):
    output = output["logits"] if isinstance(output, dict) else output
    return cross_entropy(output, Y)


def adapted(net, steps=2, **options):
    """The learner and what its solve's report says; gradients are in the net."""
    monitor = ig.Monitor()
    learner = ig.imaml(net, lr=0.1, monitor=monitor, on_failure="ignore", **options).clone()
    x = X.to(next(net.parameters()).dtype)
    for _ in range(steps):
        learner.adapt(loss(learner(x)))
    loss(learner(x)).backward()
    return learner, monitor.last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", layers())
def test_no_alarm_and_no_trace(kind, dtype):
    head = InADict if kind == "of a dict" else nn.Linear
    nets = [network(layers()[kind], head, dtype) for _ in range(2)]
    left = []
    for net, check in zip(nets, ("once", "never"), strict=True):
        torch.manual_seed(3)
        if kind == "counts its calls":  # the check's call counts too, and finds that it differs
            net[1].calls = -1 if check == "once" else 0
        _, report = adapted(net, steps=1 if kind == "counts its calls" else 2, check=check)
        assert report.check is None
        left.append(([p.grad for p in net.parameters()], dict(net.state_dict()), torch.rand(2)))
    if kind != "counts its calls":
        torch.testing.assert_close(*left, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("curvature", ["auto", "hessian", "gauss_newton"])
def test_a_wrong_product_is_told_and_named(curvature, dtype):
    """Gauss-Newton takes first derivatives only, by a graph whose second ones it needs."""
    net = network(Through(InNumPy.apply), dtype=dtype)
    _, report = adapted(net, curvature=curvature)
    flagged = report.status is ig.Status.WRONG_PRODUCT
    assert flagged == (curvature != "gauss_newton")
    if flagged:
        assert "InNumPy" in report.check


def test_spectral_norm_in_training_holds_its_directions_constant():
    net = network(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    _, report = adapted(net)
    assert report.status is ig.Status.WRONG_PRODUCT


def test_what_is_held_constant_in_the_model_is_told():
    rounded = Through(lambda x: x + (x.round() - x).detach())
    _, report = adapted(network(rounded))
    assert report.status is ig.Status.WRONG_PRODUCT and "held constant" in report.check


def test_once_for_all_clones():
    calls = []
    net = network(Through(lambda x: calls.append(1) or x.tanh()))
    maml = ig.imaml(net, lr=0.1)
    taken = []
    for _ in range(2):
        learner, before = maml.clone(), len(calls)
        for _ in range(2):
            learner.adapt(loss(learner(X)))
        taken.append(len(calls) - before)
    assert taken[0] > 2 and taken[1] == 2
    learner = maml.clone(first_order=True)
    learner(X)
    assert not learner._weights.noted


def test_tasks_are_checked_together():
    def losses(learner):
        return torch.func.vmap(cross_entropy)(learner(X.expand(2, 6, 4)), Y.expand(2, 6))

    for function, flagged in ((torch.tanh, False), (InNumPy.apply, True)):
        monitor = ig.Monitor()
        net = network(Through(function))
        maml = ig.imaml(net, lr=0.1, monitor=monitor, on_failure="ignore")
        learner = maml.clone(tasks=2)
        try:
            learner.adapt(losses(learner))
        except RuntimeError:  # vmap of a Function that has no rule for it
            assert flagged
            continue
        losses(learner).sum().backward()
        assert (monitor.last.status is ig.Status.WRONG_PRODUCT) == flagged


def test_forward_hooks_are_not_run_again():
    net, seen = network(nn.Tanh()), []
    net[1].register_forward_hook(lambda module, x, y: seen.append(y))
    adapted(net, steps=2)
    assert len(seen) == 3


@pytest.mark.parametrize("between", ["another call", "autocast"])
def test_the_call_behind_the_loss_is_the_one_that_is_checked(between):
    net, monitor = network(Through(Held.apply), dtype=torch.float32), ig.Monitor()
    learner = ig.imaml(net, lr=0.1, monitor=monitor, on_failure="ignore").clone()
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=between == "autocast"):
        output = learner(x).float()
    learner(x[:3])  # to log an accuracy, say
    learner.adapt(loss(output))
    loss(learner(x)).backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT


class Remembering(nn.Module):
    """What it computes depends on its last call, on a generator, and on a count in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.last, self.count = torch.zeros(8), torch.zeros(())
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.features = self.layer(x).tanh() + 0.1 * self.last + self.count
        self.last = self.features.detach().mean(0)
        self.count += torch.rand((), generator=self.random)
        return self.features


def test_what_the_model_remembers_is_put_back():
    left = []
    for check in ("once", "never"):
        torch.manual_seed(2)
        net = network(Remembering())
        learner = ig.imaml(net, lr=0.1, check=check).clone()
        learner.adapt(loss(learner(X)))
        kept = learner.module[1]
        features = kept.features.sum()
        back = torch.autograd.grad(features, net[1].layer.weight, retain_graph=True)
        loss(learner(X)).backward()
        gradients = [p.grad for p in net.parameters()]
        left.append((kept.last, kept.count, kept.random.get_state(), *back, gradients))
    torch.testing.assert_close(*left, rtol=0, atol=0)


def test_learners_that_adapt_by_closure_keep_no_call():
    learner = ig.imaml(network(nn.Tanh()), lr=0.1).clone()
    learner.adapt(lambda: loss(learner(X)))
    learner(X)
    assert not learner._weights.noted
