"""Which MAMLs `imaml` takes: all that it leaves nothing out of; the others are told what to do."""

import learn2learn as l2l
import numpy as np
import pytest
import torch
from torch import nn

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
MAML = l2l.algorithms.MAML


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=g, dtype=torch.float64), torch.ones(6, 2).double()


def loss_of(learner):
    x, y = data()
    return ((learner(x) - y) ** 2).mean()


def meta_gradient(maml):
    learner = maml.clone()
    learner.adapt(lambda: loss_of(learner), steps=5)
    loss_of(learner).backward()
    return [p.grad.clone() for p in maml.module.parameters() if p.grad is not None]


class Halved(MAML):
    """A forward of its own, by way of a helper and of super()."""

    def scaled(self, x):
        return x / 2

    def forward(self, x):
        return super().forward(self.scaled(x))


class Described(MAML):
    """Helpers only, which see the model."""

    def size(self):
        return sum(p.norm() for p in self.module.parameters())


class Half(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x / 2)


def test_a_forward_of_its_own_is_called():
    layer = nn.Linear(3, 2)
    got = meta_gradient(ig.imaml(Halved(layer, lr=0.1)))
    layer.zero_grad()
    want = meta_gradient(ig.imaml(MAML(Half(layer), lr=0.1)))
    torch.testing.assert_close(got, want)


def test_helpers_see_the_adapted_weights():
    learner = ig.imaml(Described(nn.Linear(3, 2), lr=0.1)).clone()
    before = learner.size()
    learner.adapt(loss_of(learner))
    want = sum(p.norm() for p in learner.module.parameters())
    assert learner.size() == want != before


def test_a_forward_of_its_own_knows_one_task_at_a_time():
    with pytest.raises(ig.InvalidArgumentError, match="forward of its own"):
        ig.imaml(Halved(nn.Linear(3, 2), lr=0.1)).clone(tasks=2)


class OwnAdapt(MAML):
    def adapt(self, loss, **options):
        super().adapt(loss * 0.5, **options)


class AlsoMAML(OwnAdapt):
    """A name says nothing."""


AlsoMAML.__name__ = "MAML"


class OwnClone(OwnAdapt):
    def clone(self):
        return OwnClone(l2l.clone_module(self.module), self.lr)


class OwnParameters(MAML):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rate = nn.Parameter(torch.tensor(1.0))


def patched():
    maml = MAML(nn.Linear(3, 2), lr=0.1)
    maml.adapt = lambda loss: None
    return maml


REFUSED = {
    "OwnAdapt has adapt of its own": lambda: OwnAdapt(nn.Linear(3, 2), lr=0.1),
    "^imaml: MAML has adapt of its own": lambda: AlsoMAML(nn.Linear(3, 2), lr=0.1),
    "OwnClone has adapt and clone of its own": lambda: OwnClone(nn.Linear(3, 2), lr=0.1),
    "MAML has adapt of its own": patched,
    r"OwnParameters has parameters .*\(rate\).*LearnedLam": lambda: OwnParameters(
        nn.Linear(3, 2), lr=0.1
    ),
    "MetaSGD learns its step lengths.*LearnedLam": lambda: l2l.algorithms.MetaSGD(
        nn.Linear(3, 2), lr=0.1
    ),
    "GBML learns a transform.*LearnedLam": lambda: l2l.algorithms.GBML(
        nn.Linear(3, 2), transform=l2l.optim.MetaCurvatureTransform, lr=0.1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_left_out_is_refused(message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        ig.imaml(REFUSED[message]())


# ---------------------------------------------------------------- the step length, changed later


@pytest.mark.parametrize("lr", [0.2, 1, np.float32(0.2), np.float64(0.2)], ids=repr)
def test_a_number_assigned_later_is_the_step_length(lr):
    layer = nn.Linear(3, 2)
    learners = []
    for first in (0.1, lr):
        maml = ig.imaml(MAML(layer, lr=first))
        maml.lr = lr
        learner = maml.clone()
        learner.adapt(loss_of(learner))
        learners.append([p.detach() for p in learner.module.parameters()])
    torch.testing.assert_close(*learners)


@pytest.mark.parametrize("make", [torch.tensor, lambda v: nn.Parameter(torch.tensor(v)), str])
def test_anything_else_is_named_in_adapt(make):
    maml = ig.imaml(MAML(nn.Linear(3, 2), lr=0.1))
    maml.lr = make(0.1)
    learner = maml.clone()
    for loss in (loss_of(learner), lambda: loss_of(learner)):
        with pytest.raises(ig.InvalidArgumentError, match="adapt: lr must be a number"):
            learner.adapt(loss)


# ---------------------------------------------------------------- integer parameters


class Quantised(nn.Module):
    """A frozen base of integers, and an adapter that trains."""

    def __init__(self, integers):
        super().__init__()
        base = torch.tensor([[3, -2, 1], [0, 4, -1]])
        if integers:
            self.base = nn.Parameter(base.to(torch.int8), requires_grad=False)
        else:
            self.register_buffer("base", base.double())
        self.adapter = nn.Linear(3, 2)

    def forward(self, x):
        return self.adapter(x) + x @ self.base.to(x.dtype).T / 10


@pytest.mark.parametrize("lam", ["number", "dict", "sequence", "LearnedLam", "low rank"])
@pytest.mark.parametrize("form", ["tensor", "closure", "tasks"])
def test_integers_are_held_fixed(lam, form):
    """The gradients are those of a model whose base is a buffer."""
    grads = []
    for integers in (True, False):
        torch.manual_seed(0)
        model = Quantised(integers)
        names = ["adapter.weight", "adapter.bias"]
        given = {
            "number": 1.5,
            "dict": dict.fromkeys(names, 1.5),
            "sequence": [1.5, 2.5],
            "LearnedLam": ig.LearnedLam(model, per="element"),
            "low rank": ig.LearnedLam(model, rank=1),
        }[lam]
        if form == "tasks" and lam == "low rank":
            return
        maml = ig.imaml(MAML(model, lr=0.1, allow_nograd=True), lam=given)
        if form == "tasks":
            learner, (x, y) = maml.clone(tasks=2), data()
            x, y = torch.stack([x, x + 1]), torch.stack([y, y])
            learner.adapt(((learner(x) - y) ** 2).mean((1, 2)))
            ((learner(x) - y) ** 2).mean().backward()
        else:
            learner = maml.clone()
            learner.adapt(loss_of(learner) if form == "tensor" else lambda: loss_of(learner))  # noqa: B023
            loss_of(learner).backward()
        grads.append([p.grad for n, p in maml.named_parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


def test_integers_need_allow_nograd_as_in_learn2learn():
    learner = ig.imaml(MAML(Quantised(True), lr=0.1)).clone()
    with pytest.raises(ig.InvalidArgumentError, match="base has requires_grad=False"):
        learner.adapt(loss_of(learner))
