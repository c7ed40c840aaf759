"""Any module as a learner: its copies share what it shares, and adapt as learn2learn's do."""

import functools
import types
import warnings

import pytest
import torch
from learners import STYLES, adapt, close, data, error, gradients, learn2learn, outer, same, wrapped
from problems import Tied, normal
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations

import implicit_grad as ig
from implicit_grad._torch.clone import cloned

pytestmark = pytest.mark.usefixtures("double_precision")


class TwoNames(nn.Module):
    """A submodule under two names, as in learn2learn's OmniglotCNN, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.base = self.features
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.base(self.features(x)))


class Attributes(nn.Module):
    """What copy.deepcopy refuses: a tensor with a graph, a generator, a hook of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.3)).exp()
        self.batches = iter(range(3))
        self.calls = []
        self.layer.register_forward_hook(lambda module, x, y: self.calls.append(module) or y * 2)
        self.register_buffer("shift", torch.ones(2, requires_grad=True))
        self.register_parameter("none", None)
        self.register_module("nothing", None)

    def forward(self, x):
        return self.layer(x) * self.scale.detach() + self.shift


class Sequence(nn.Module):
    """A recurrent layer, which keeps a second list of its weights."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(3, 4, num_layers=2, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x[:, None])[0][:, 0])


def weight_normed():
    """The old form, whose hook computes the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def listed():
    """Parameters in lists and dicts."""
    model = nn.Linear(3, 2)
    model.several = nn.ParameterList([torch.ones(2), torch.zeros(2)])
    model.named = nn.ParameterDict({"a": torch.ones(2)})
    return model


MODELS = {
    "linear": lambda: nn.Linear(3, 2),
    "two names": TwoNames,
    "tied": Tied,
    "LSTM": lambda: Sequence(nn.LSTM),
    "GRU": lambda: Sequence(nn.GRU),
    "weight_norm, old": weight_normed,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0),
    "lists": listed,
    "attributes": Attributes,
}


def total(learner, x):
    """A loss of every output."""
    return learner(x).square().sum()


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_computes_the_same_and_passes_its_gradients_on(name):
    model = MODELS[name]()
    twin, x = copied(model), data()[0]
    assert type(twin) is type(model)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(twin.state_dict()) == list(model.state_dict())
    before = [b.clone() for b in model.buffers()]
    wanted = [p for p in (*model.parameters(), *model.buffers()) if p.requires_grad]
    outcomes = []
    for one in (model, twin):
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)  # the running statistics, which both write
        loss = total(one, x)
        outcomes.append((loss, torch.autograd.grad(loss, wanted, allow_unused=True)))
    (expected, theirs), (actual, ours) = outcomes
    assert torch.equal(actual, expected)
    assert any(g is not None for g in theirs)
    for a, e in zip(ours, theirs, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def copied(model):
    """A copy with nothing of the model's but its buffers."""
    twin = cloned(model)
    own = {id(p) for p in twin.parameters()} | {id(m) for m in twin.modules()}
    assert not own & ({id(p) for p in model.parameters()} | {id(m) for m in model.modules()})
    shared = [(a, b) for a, b in zip(twin.buffers(), model.buffers(), strict=True)]
    assert all((a is b) != b.requires_grad for a, b in shared)
    return twin


HOLDERS = {
    "list": lambda part: [part, torch.tanh],
    "dict": lambda part: {"first": part},
    "function": lambda part: lambda x: part(x),
    "partial": lambda part: functools.partial(nn.Module.__call__, part),
    "method": lambda part: part.forward,
    "namespace": lambda part: types.SimpleNamespace(first=part),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_layers_that_are_held_otherwise_too_are_those_of_the_copy(kind):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.held, self.seen = HOLDERS[kind](self.first), []

        def forward(self, x):
            held = self.held
            if not callable(held):
                held = (
                    held.first
                    if hasattr(held, "first")
                    else next(iter(held.values() if isinstance(held, dict) else held))
                )
            self.seen.append(held(x))
            return self.last(self.seen[-1].tanh())

    torch.manual_seed(0)
    model, x = Held(), torch.randn(5, 3)
    model(x)
    maml = ig.imaml(model, lam=1.0, lr=0.1)
    learner = maml.clone()
    before = learner.module.first.weight
    for _ in range(2):
        learner.adapt(learner(x).square().mean())
    assert learner.module.first.weight is not before
    after = learner.module.first(x)
    learner(x).sum().backward()
    assert torch.equal(model.seen[-1], after)  # a list of tensors is shared, as ever
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_one_in_the_model_is_one_in_its_copy():
    twin = cloned(TwoNames())
    assert twin.features is twin.base
    twin = cloned(Tied())
    assert len(list(twin.parameters())) == len(list(Tied().parameters()))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    twin = cloned(model)
    assert twin[1].weight is twin[0].weight


def test_a_copy_leaves_its_model_alone():
    model = TwoNames()
    state, modules = model.state_dict(), list(model.modules())
    learner = ig.imaml(model, lr=0.1).clone()
    adapt(learner, lambda it: error(it, data()), "tensor", steps=2)
    learner.module.head = nn.Linear(3, 5)
    learner.module.extra = nn.Linear(1, 1)
    assert all(m is n for m, n in zip(model.modules(), modules, strict=True))
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["two names", "weight_norm, old", "weight_norm"])
def test_every_kind_of_module_meets_finite_differences(name, style):
    model = MODELS[name]().train(False)
    maml = wrapped(model, 3.0, 0.2, linear_solver=ig.CG(rtol=1e-12), on_failure="raise")

    def solved():
        learner = maml.clone()
        adapt(learner, lambda it: error(it, data()), style, steps=100)
        return outer(learner)

    actual = gradients(solved(), maml)
    named = dict(model.named_parameters())
    for name in list(named)[::3]:
        parameter = named[name]
        direction = normal(*parameter.shape, seed=3, grad=False)
        found = []
        for step in (1e-5, -2e-5):
            parameter.data.add_(direction, alpha=step)
            found.append(solved().item())
        parameter.data.add_(direction, alpha=1e-5)
        slope = (actual[list(named).index(name)] * direction).sum()
        assert abs(slope - (found[0] - found[1]) / 2e-5) <= 1e-5 * abs(slope)


@pytest.mark.parametrize("whole", [True, False])
def test_what_torch_compile_returns_adapts_eagerly(whole):
    """learn2learn's clone of it computes with the weights of the model."""
    torch._dynamo.reset()
    expected = None
    for compiled in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        if compiled and whole:
            model = torch.compile(model, backend="eager")
        elif compiled:
            model[0] = torch.compile(model[0], backend="eager")
        maml = ig.imaml(model, lr=0.1)
        learner = maml.clone()
        adapt(learner, lambda it: error(it, data()), "tensor", steps=3)
        actual = gradients(error(learner, data(2)), maml)
        expected = expected or actual
    same(actual, expected)
    torch._dynamo.reset()


def test_a_model_that_was_called_compiled_in_place_is_copied_without():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].compile(backend="eager")
    assert cloned(model)[0]._compiled_call_impl is None
    assert model[0]._compiled_call_impl is not None


def test_options_of_maml_are_attributes_and_options_of_clones():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    maml = ig.imaml(model, lr=0.1)
    assert (maml.first_order, maml.allow_unused, maml.allow_nograd) == (False, False, False)
    with pytest.raises(ig.InvalidArgumentError, match=r"allow_nograd=True to clone\(\) or"):
        adapt(maml.clone(), lambda it: error(it, data()), "tensor")
    adapt(maml.clone(allow_nograd=True), lambda it: error(it, data()), "tensor")
    maml.allow_nograd = maml.first_order = True
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    loss = outer(learner)
    weights = [p for p in learner.parameters() if p.requires_grad]
    same(gradients(loss, maml), torch.autograd.grad(loss, weights))


# ---------------------------------------------------------------- against learn2learn


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # learn2learn's clone_module looks at it
def test_a_copy_is_learn2learns_in_all_that_it_computes(name):
    l2l = learn2learn()
    torch.manual_seed(1)
    model, x = MODELS[name](), data()[0]
    found = []
    state = [b.detach().clone() for b in model.buffers()]
    for make in (cloned, l2l.clone_module):
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), state, strict=True):
                buffer.copy_(value)
        loss = total(make(model), x)
        wanted = [p for p in model.parameters() if p.requires_grad]
        used = [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]
        found.append([loss, *used, *(b.clone() for b in model.buffers())])
    same(*found)


NETWORKS = {
    "OmniglotCNN": (lambda m: m.OmniglotCNN(3, hidden_size=4), (28, 28)),
    "OmniglotFC": (lambda m: m.OmniglotFC(49, 3, sizes=[8, 6]), (1, 7, 7)),
    "MiniImagenetCNN": (lambda m: m.MiniImagenetCNN(3, hidden_size=4), (3, 84, 84)),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_and_its_maml_have_the_same_gradients(name, style):
    l2l = learn2learn()
    make, shape = NETWORKS[name]
    model = make(l2l.vision.models).train(False)
    images, labels = torch.rand(3, *shape), torch.arange(3)
    outcomes = []
    for maml in (
        ig.imaml(model, 1.0, lr=0.05, on_failure="ignore"),
        ig.imaml(l2l.algorithms.MAML(model, lr=0.05), 1.0, on_failure="ignore"),
    ):
        learner = maml.clone()
        adapt(learner, lambda it: cross_entropy(it(images), labels), style, steps=2)
        loss = cross_entropy(learner(images), labels)
        outcomes.append([loss, *learner.parameters(), *gradients(loss, maml)])
    same(*outcomes)


def test_first_order_steps_are_learn2learns():
    l2l, model = learn2learn(), nn.Linear(3, 2)
    outcomes = []
    for maml in (ig.imaml(model, lr=0.1), l2l.algorithms.MAML(model, lr=0.1, first_order=True)):
        learner = maml.clone(first_order=True)
        learner.adapt(mse_loss(learner(data()[0]), data()[1]))
        outcomes.append(torch.autograd.grad(error(learner, data(2)), list(maml.parameters())))
    close(*outcomes, 1e-14)


def test_the_step_length_of_a_maml_is_its_own():
    maml = learn2learn().algorithms.MAML(nn.Linear(3, 2), lr=0.1)
    with pytest.raises(ig.InvalidArgumentError, match=r"lr=0\.2 is for a model.*own, lr=0\.1"):
        ig.imaml(maml, lr=0.2)
