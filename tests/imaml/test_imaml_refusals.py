"""What imaml refuses, and that a refusal or an exception changes nothing."""

import functools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from learners import adapt, data, error, gradients, network, newton, outer, same, wrapped
from torch import nn

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


# ---------------------------------------------------------------- after an exception


class Stop(Exception):
    """Raised by the functions below, not by anything else."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("when", ["before the forward", "inside it", "after it"])
def test_an_exception_in_the_function_leaves_the_learner_as_it_was(when, call, kind):
    """The 4th call is the evaluation at the solution, which leaves even the buffers alone."""

    class Interrupting(nn.Identity):
        armed = False

        def forward(self, x):
            if self.armed:
                raise kind()
            return x

    switch = Interrupting()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), switch, nn.Tanh(), nn.Linear(4, 2))
    maml, batch = wrapped(model, monitor=ig.Monitor()), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), "tensor")
    loss = outer(learner)
    expected = gradients(loss, maml) if loss is not None else None
    loss = outer(learner)
    weights = list(learner.parameters())
    values = [p.detach().clone() for p in weights]
    buffers = list(learner.buffers())
    calls, statistics = 0, None

    def function():
        nonlocal calls, statistics
        calls += 1
        if calls == call and when == "before the forward":
            raise kind()
        learner.module[2].armed = calls == call and when == "inside it"
        try:
            result = error(learner, batch)
        finally:
            learner.module[2].armed = False
        if calls < 4:
            statistics = [b.clone() for b in learner.buffers()]
        if calls == call:
            raise kind()
        return result

    with pytest.raises(kind):
        learner.adapt(function, steps=3)
    assert calls == call
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(weights, values)
    assert all(b is a for b, a in zip(learner.buffers(), buffers, strict=True))
    if call == 4:
        same(buffers, statistics)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.is_grad_enabled()
    same(gradients(loss, maml), expected)
    learner.adapt(function, steps=3)
    assert not torch.equal(next(learner.parameters()), weights[0])


@pytest.mark.parametrize("case", ["raises", "overwrites", "diverges", "forgets", "interrupts"])
def test_a_failing_solver_leaves_the_learner_as_it_was(case):
    def solver(objective, init):
        objective(tuple(p + 1 for p in init))
        if case == "raises":
            raise Stop
        if case == "interrupts":
            raise KeyboardInterrupt
        if case == "overwrites":
            for p in init:
                p.zero_()
            raise Stop
        return tuple(p / 0 for p in init) if case == "diverges" else None

    maml = wrapped(network(), solver=solver)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    weights = list(learner.parameters())
    values = [p.detach().clone() for p in weights]
    expected = gradients(outer(learner), maml)
    errors = {"diverges": ig.InvalidSolutionError, "forgets": ig.InvalidSolutionError}
    with pytest.raises(KeyboardInterrupt if case == "interrupts" else errors.get(case, Stop)):
        learner.adapt(lambda: error(learner, data()))
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(weights, values)
    same(gradients(outer(learner), maml), expected)


def test_a_refused_loss_leaves_the_learner_as_it_was():
    maml = wrapped(network())
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    weights = list(learner.parameters())
    expected = gradients(outer(learner), maml)
    foreign = torch.zeros((), requires_grad=True)
    for bad in (None, torch.zeros(2), foreign, lambda: None, lambda: foreign):
        with pytest.raises(ig.ImplicitGradError):
            learner.adapt(bad)
        assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(gradients(outer(learner), maml), expected)


# ---------------------------------------------------------------- bad input


def plain():
    """Something that is not wrapped."""
    return nn.Linear(3, 2)


imaml = functools.partial(ig.imaml, lr=0.1)


def lazy():
    """Without shapes."""
    return nn.Sequential(nn.LazyLinear(2))


class Scripted(torch.jit.ScriptModule):
    """What torch.jit.script makes of a module."""


NOT_POSITIVE = "lam must be a number .*finite and greater than 0, got "


WANTED = r"must be a model, an nn\.Module, or a learn2learn\.algorithms\.MAML, got {}$"


BAD_CALLS = {
    "no lr": (
        lambda: ig.imaml(nn.Linear(2, 2)),
        r"a Linear is no learn2learn\.algorithms\.MAML.*imaml\(model, lr=0\.5\)",
    ),
    "lr < 0": (lambda: ig.imaml(nn.Linear(2, 2), lr=-1.0), r"of at least 0, got -1\.0"),
    "lr NaN": (
        lambda: ig.imaml(plain(), lr=float("nan")),
        "lr must be a finite number of at least 0, got nan",
    ),
    "lr tensor": (lambda: ig.imaml(plain(), lr=torch.ones(())), "lr must be a number, got a float"),
    "lr string": (lambda: ig.imaml(plain(), lr="0.1"), "lr must be a number, got a str"),
    "lazy": (lambda: ig.imaml(lazy(), lr=0.1), "lazy layers.*call it once first"),
    "scripted": (lambda: ig.imaml(Scripted(), lr=0.1), "pass the module that was scripted"),
    "None": (lambda: ig.imaml(None), WANTED.format("None")),
    "a string": (lambda: ig.imaml("maml"), WANTED.format("a str")),
    "a look-alike": (
        lambda: ig.imaml(SimpleNamespace(**dict.fromkeys(dir(ig.imaml(plain(), lr=0.1))))),
        WANTED.format("a SimpleNamespace"),
    ),
    "a class": (lambda: ig.imaml(nn.Linear), WANTED.format("the class Linear")),
    "wrapped": (lambda: ig.imaml(ig.imaml(plain(), lr=0.1)), "is wrapped by imaml already"),
    "lam 0": (lambda: imaml(plain(), lam=0.0), NOT_POSITIVE + "0$"),
    "lam < 0": (lambda: imaml(plain(), lam=-1), NOT_POSITIVE + "-1$"),
    "lam NaN": (lambda: imaml(plain(), lam=float("nan")), NOT_POSITIVE + "nan$"),
    "lam inf": (lambda: imaml(plain(), lam=float("inf")), NOT_POSITIVE + "inf$"),
    "lam True": (lambda: imaml(plain(), lam=True), NOT_POSITIVE + "a bool$"),
    "lam string": (lambda: imaml(plain(), lam="2"), "lam"),
    "lam integer": (
        lambda: imaml(plain(), lam=torch.tensor(2)),
        NOT_POSITIVE + "an int64 tensor",
    ),
    "lam elements": (
        lambda: imaml(plain(), lam=[torch.tensor([[1.0], [0.0]]), 1.0]),
        NOT_POSITIVE + "a tensor with other values",
    ),
    "lam short": (lambda: imaml(plain(), lam=[1.0]), "each of the 2 parameters, got 1"),
    "lam long": (
        lambda: imaml(plain(), lam=(1.0,) * 3),
        "each of the 2 parameters, got 3",
    ),
    "lam names": (
        lambda: imaml(plain(), lam={"weight": 1.0, "bias_": 1.0}),
        r"\['weight', 'bias'\]; got \['weight', 'bias_'\]",
    ),
    "lam shape": (
        lambda: imaml(plain(), lam=[torch.ones(3, 2), 1.0]),
        r"lam of shape \(3, 2\) does not fit theta\[0\] of shape \(2, 3\)",
    ),
    "lam leaf": (
        lambda: imaml(plain(), lam=torch.tensor(2.0, requires_grad=True)),
        r"must be a torch\.nn\.Parameter, so that it appears in parameters\(\)",
    ),
    "lam computed": (
        lambda: imaml(plain(), lam=[nn.Parameter(torch.tensor(1.0)).exp(), 1.0]),
        r"must be a torch\.nn\.Parameter",
    ),
    "linear_solver": (
        lambda: imaml(plain(), linear_solver="cg"),
        r"linear_solver must be CG\(\), .*MINRES\(\).* or a function solve\(matvec, b\), got 'cg'",
    ),
    "linear_solver class": (
        lambda: imaml(plain(), linear_solver=ig.CG),
        r"linear_solver must be CG\(\).*got the class CG: write CG\(\)",
    ),
    "solver": (
        lambda: imaml(plain(), solver=3),
        r"solver must have minimize.*got an int",
    ),
    "curvature": (
        lambda: imaml(plain(), curvature="gauss-newton"),
        r'curvature=.gauss-newton.\): expected "auto", "hessian"',
    ),
    "monitor": (
        lambda: imaml(plain(), monitor=[]),
        r"must be an implicit_grad\.Monitor\(\)",
    ),
    "on_failure": (lambda: imaml(plain(), on_failure="no"), "on_failure='no': expected"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_at_once(case):
    call, sentence = BAD_CALLS[case]
    with pytest.raises(ig.InvalidArgumentError, match=sentence):
        call()


def test_misspelt_options_are_python_errors():
    with pytest.raises(TypeError, match="lamda"):
        imaml(plain(), lamda=2.0)
    with pytest.raises(TypeError, match="step"):
        ig.imaml(plain(), lr=0.1).clone().adapt(lambda: 0, step=3)


@pytest.mark.parametrize("form", ["one", "several"])
def test_a_lam_that_training_made_negative_is_refused_by_the_next_clone(form):
    lam = nn.Parameter(torch.tensor(0.1))
    maml = wrapped(nn.Linear(3, 2), lam if form == "one" else [lam, 1.0])
    maml.clone()
    lam.grad = torch.tensor(1.0)
    torch.optim.SGD([lam], 0.5).step()
    with pytest.raises(ig.InvalidArgumentError, match=NOT_POSITIVE + r"-0\.4$"):
        maml.clone()


def detached(learner):
    return error(learner, data()).detach()


def without_gradients(learner):
    with torch.no_grad():
        return error(learner, data())


@pytest.mark.parametrize("outside", [False, True])
def test_a_learner_that_was_cloned_without_gradients_says_so(outside):
    """Not that the loss was computed so; it may even have a graph, to features."""
    maml, features = wrapped(nn.Linear(3, 2)), torch.ones(6, 3, requires_grad=outside)
    with torch.no_grad():
        learner = maml.clone()
        with torch.enable_grad():
            loss = learner(2 * features).square().mean()
            with pytest.raises(ig.GraphError, match=r"cloned, or adapted, under torch\.no_grad"):
                learner.adapt(loss)
            learner.adapt(lambda: learner(2 * features).square().mean())


BAD_LOSSES = {
    "None": (lambda it: None, ig.InvalidArgumentError, r"or a function without.*got None"),
    "number": (lambda it: 3.0, ig.InvalidArgumentError, "got a float"),
    "vector": (lambda it: it(data()[0])[:, 0], ig.InvalidArgumentError, r"scalar.*shape \(6,\)"),
    "integer": (lambda it: torch.tensor(3), ig.InvalidArgumentError, "got an int64 tensor"),
    "detached": (detached, ig.GraphError, r"has no graph to the learner's weights"),
    "no_grad": (without_gradients, ig.GraphError, r"computed under torch\.no_grad\(\)"),
    "foreign": (
        lambda it: torch.zeros((), requires_grad=True).exp(),
        ig.InvalidArgumentError,
        "does not depend on the",
    ),
    "original's": (lambda it: it.root.square().sum(), ig.InvalidArgumentError, "does not depend"),
    "returns None": (lambda it: lambda: None, ig.InvalidArgumentError, "scalar .*got None"),
    "returns a vector": (lambda it: lambda: it(data()[0])[0], ig.InvalidArgumentError, "scalar"),
    "returns another": (
        lambda it: lambda: torch.zeros((), requires_grad=True).exp(),
        ig.InvalidArgumentError,
        "depend",
    ),
    "returns detached": (lambda it: lambda: detached(it), ig.GraphError, "has no graph"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_are_refused(case):
    make, kind, sentence = BAD_LOSSES[case]
    maml = wrapped(nn.Linear(3, 2))
    maml.module.root = maml.module.weight
    learner = maml.clone()
    learner.module.__dict__["root"] = maml.module.weight
    learner.module._parameters.pop("root", None)
    weights = list(learner.parameters())
    with pytest.raises(kind, match=sentence):
        learner.adapt(make(learner))
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))


def test_a_loss_serves_one_step():
    learner = wrapped(network()).clone()
    loss = error(learner, data())
    learner.adapt(loss)
    with pytest.raises(ig.InvalidArgumentError, match="compute it anew from this learner's output"):
        learner.adapt(loss)


def test_steps_are_for_functions_and_gradient_descent():
    learner = wrapped(network()).clone()
    with pytest.raises(ig.InvalidArgumentError, match="steps needs a function"):
        learner.adapt(error(learner, data()), steps=2)
    learner = wrapped(network(), solver=newton).clone()
    with pytest.raises(ig.InvalidArgumentError, match=r"steps is for the default.*newton"):
        learner.adapt(lambda: error(learner, data()), steps=2)


def test_learn2learn_is_not_needed():
    program = """
        import sys

        class Refusing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "learn2learn":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Refusing())
        import torch
        import implicit_grad as ig
        import implicit_grad.learn2learn

        maml = ig.imaml(torch.nn.Linear(2, 1), lr=0.1)
        learner = maml.clone()
        learner.adapt(learner(torch.ones(3, 2)).square().mean())
        learner.adapt(lambda: learner(torch.ones(3, 2)).square().mean(), steps=2)
        learner(torch.ones(3, 2)).sum().backward()
        assert all(p.grad is not None for p in maml.parameters())
        assert "learn2learn" not in sys.modules
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True)
