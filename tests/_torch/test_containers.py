"""Containers are also what torch's own trees know, and dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import mse_loss

import implicit_grad as ig
from implicit_grad._torch import pytree
from implicit_grad._torch.captured import captured_tensors


class Registered:
    def __init__(self, logits: Tensor, hidden: Any = None) -> None:
        self.logits, self.hidden = logits, hidden


torch.utils._pytree.register_pytree_node(
    Registered, lambda o: ([o.logits, o.hidden], None), lambda parts, _: Registered(*parts)
)


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    hidden: Any = None

    def __post_init__(self) -> None:
        assert isinstance(self.logits, Tensor)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("hidden", "logits")
    logits: Tensor
    hidden: Any


KINDS = [Registered, Frozen, lambda logits, hidden=None: Slotted(logits, hidden)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_taken_apart_and_put_together(kind):
    x, y = torch.ones(2), torch.zeros(3)
    whole = [kind(x, {"y": y, "name": "n"}), kind(x, None)]
    found, tree = pytree.flatten(whole)
    assert {id(t) for t in found} == {id(x), id(y)}
    other = tree.rebuild([t + 1 for t in found])
    assert type(other[0]) is type(whole[0]) and other[0].hidden["name"] == "n"
    assert torch.equal(other[0].logits, x + 1) and torch.equal(other[0].hidden["y"], y + 1)
    assert other[1].hidden is None
    assert pytree.structure(other) == pytree.structure(whole)
    assert pytree.structure(kind(x, {"z": y})) != pytree.structure(kind(x, {"y": y}))


def test_what_a_record_holds_besides_its_fields_comes_along():
    whole = Frozen(torch.ones(2))
    object.__setattr__(whole, "cached", torch.zeros(1))
    found, tree = pytree.flatten(whole)
    assert len(found) == 2 and torch.equal(tree.rebuild(found).cached, torch.zeros(1))
    assert pytree.names(Frozen(torch.ones(2), [torch.ones(1)]), "phi")[:2] == [
        "phi.logits",
        "phi.hidden[0]",
    ]


def test_modules_hold_what_trains_in_them_and_classes_are_not_looked_into():
    @dataclasses.dataclass(eq=False)
    class Model(nn.Module):
        width: int

        def __post_init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(self.width, 1)

    Model.__new__ = lambda cls, *_: (m := object.__new__(cls), nn.Module.__init__(m))[0]
    model = Model(2)
    model.layer.bias.requires_grad_(False)
    (weight,), tree = pytree.flatten([model, Frozen, print])
    assert weight is model.layer.weight
    copy, *others = tree.rebuild([torch.ones(1, 2)])
    assert type(copy) is Model and copy.width == 2 and copy.layer is not model.layer
    assert torch.equal(copy.layer.weight, torch.ones(1, 2))
    assert copy.layer.bias is model.layer.bias and others == [Frozen, print]
    assert pytree.names([model], "phi") == ["phi[0].layer.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_phi_may_be_an_object(kind):
    y = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    solve = ig.implicit(
        lambda y: kind(y / 2, [y.sum() / 3]),
        ig.argmin(
            lambda phi, y: (2 * phi.logits - y).square().sum() + (3 * phi.hidden[0] - y.sum()) ** 2
        ),
    )
    phi = solve(y)
    (found,) = grad(phi.logits[0] + 6 * phi.hidden[0], y)
    torch.testing.assert_close(found, torch.tensor([2.5, 2.0], dtype=torch.float64))


class Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.layers(x)
        return self.kind(logits, "no tensor") if self.kind else logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["tensor", "function"])
@pytest.mark.parametrize("tasks", [None, 3])
def test_a_learner_may_return_an_object(kind, style, tasks):
    torch.manual_seed(1)
    x = torch.randn(*(() if tasks is None else (tasks,)), 6, 4, dtype=torch.float64)
    y = torch.randn(*x.shape[:-1], 2, dtype=torch.float64)

    def gradients(kind: Any) -> tuple[Tensor, ...]:
        model = Net(kind)
        maml = ig.imaml(model, lr=0.1, lam=2.0, curvature="gauss_newton")
        learner = maml.clone(tasks=tasks)

        def loss() -> Tensor:
            output = learner(x)
            output = output.logits if kind else output
            return mse_loss(output, y) if tasks is None else torch.func.vmap(mse_loss)(output, y)

        learner.adapt(loss() if style == "tensor" else loss)
        return grad(loss().sum(), list(model.parameters()))

    for found, right in zip(gradients(kind), gradients(None), strict=True):
        torch.testing.assert_close(found, right)


def test_names_do_not_count_where_tensors_are_looked_for():
    leaf = torch.ones(2)
    held = {str(i): 0.0 for i in range(4_000)} | {"leaf": leaf}
    ((name, found),) = captured_tensors(held)
    assert name == "['leaf']" and found is leaf
    ((name, found),) = captured_tensors({leaf: 0.0})
    assert name == "[0]" and found is leaf


def test_a_class_that_another_thread_has_learned_meanwhile_is_learned_once():
    @dataclasses.dataclass
    class Record:
        weight: Tensor

    for found in ([Record(torch.ones(1))], [nn.ReLU()], [print]):
        pytree._learn(found)
        pytree._learn(found)
    both = [Record(torch.ones(1)), module := nn.ReLU()]
    assert pytree.modules(both) == [module] and len(pytree.leaves(both)) == 1


LOOKED_UP = torch.ones(1)


def test_what_functions_refer_to_is_looked_up_in_each_call(monkeypatch):
    inside, held = torch.ones(1), {"in": [torch.ones(1)]}

    def captures():
        return inside, later, held, LOOKED_UP

    def found():
        return {name: id(tensor) for name, tensor in captured_tensors(captures)}

    first = {"inside": inside, "held['in'][0]": held["in"][0], "LOOKED_UP": LOOKED_UP}
    assert found() == {name: id(t) for name, t in first.items()}  # later has no value yet
    inside, later, held["in"][0] = torch.zeros(3).unbind()
    monkeypatch.setitem(globals(), "LOOKED_UP", other := torch.zeros(1))
    then = {"inside": inside, "later": later, "held['in'][0]": held["in"][0], "LOOKED_UP": other}
    assert found() == {name: id(t) for name, t in then.items()}
