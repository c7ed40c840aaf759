"""Tensors that a solver can reach and that are not its own stay as they are, or it is told."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.autograd import grad

import implicit_grad as ig

SETTINGS: dict[str, Any] = {}
RIGHT = torch.tensor([-2.0, 0.5])  # what `.grad` holds before


def parameter() -> nn.Parameter:
    tensor = nn.Parameter(torch.tensor([0.5, 1.5], dtype=torch.float64))
    tensor.grad = RIGHT.double()
    return tensor


def trained(objective: Any, *args: Any) -> Tensor:
    """An ordinary training loop."""
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        objective(w, *args).backward()
        optimizer.step()
    return w.detach()


def in_closure(lam: Tensor) -> Any:
    return lambda w, y: (w - y).square().sum() + (lam * w.square()).sum()


def in_global(lam: Tensor) -> Any:
    SETTINGS["lam"] = [lam]
    return lambda w, y: (w - y).square().sum() + (SETTINGS["lam"][0] * w.square()).sum()


def in_default(lam: Tensor) -> Any:
    def objective(w: Tensor, y: Tensor, *, lam: Tensor = lam) -> Tensor:
        return (w - y).square().sum() + (lam * w.square()).sum()

    return objective


class InObject:
    def __init__(self, lam: Tensor) -> None:
        self.held = SimpleNamespace(lam=lam)

    def __call__(self, w: Tensor, y: Tensor) -> Tensor:
        return (w - y).square().sum() + (self.held.lam * w.square()).sum()


class InModule(nn.Module):
    def __init__(self, lam: nn.Parameter) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.lam = lam

    def forward(self, w: Tensor, y: Tensor) -> Tensor:
        return (w - y).square().sum() + (self.inner.lam * w.square()).sum()


@pytest.mark.parametrize("holder", [in_closure, in_global, in_default, InObject, InModule])
def test_a_training_loop_leaves_no_gradient_in_what_was_captured(holder):
    lam, y = parameter(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    objective = holder(lam)
    solve = ig.implicit(lambda y: trained(objective, y), ig.argmin(objective))
    before = lam.grad
    phi = solve(y)
    assert lam.grad is before and torch.equal(before, RIGHT.double())
    phi.sum().backward()  # φ = y / (1 + λ)
    torch.testing.assert_close(lam.grad, RIGHT - y / (1 + lam.detach()) ** 2, rtol=1e-5, atol=0)


def test_nor_in_a_module_among_the_arguments():
    lam, y = parameter(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    lam.grad = None

    def objective(w, module, y):
        return module(w, y)

    solve = ig.implicit(lambda module, y: trained(objective, module, y), ig.argmin(objective))
    with torch.no_grad():
        solve(InModule(lam), y)
    assert lam.grad is None
    solve(InModule(lam), y).sum().backward()
    torch.testing.assert_close(lam.grad, -y / (1 + lam.detach()) ** 2, rtol=1e-5, atol=0)


def test_nor_if_the_solver_fails():
    lam, y = parameter(), torch.ones(2, dtype=torch.float64)

    def fails(y):
        in_closure(lam)(torch.ones_like(y), y).backward()
        lam.requires_grad_(False)
        raise ZeroDivisionError

    before = lam.grad
    with pytest.raises(ZeroDivisionError):
        ig.implicit(fails, ig.argmin(in_closure(lam)))(y)
    assert lam.grad is before and torch.equal(before, RIGHT.double()) and lam.requires_grad


def test_a_solver_may_train_a_module_of_its_own():
    model = nn.Linear(2, 1, bias=False).double()
    X, y = torch.randn(9, 2).double(), torch.randn(9, 1).double().requires_grad_()

    def fit(y):
        for _ in range(300):
            model.zero_grad()
            (model(X) - y).square().mean().backward()
            with torch.no_grad():
                model.weight -= 0.3 * model.weight.grad
        return {"weight": model.weight}

    def objective(phi, y):
        return (torch.func.functional_call(model, phi, X) - y).square().mean()

    phi = ig.implicit(fit, ig.argmin(objective))(y)
    (found,) = grad(phi["weight"].sum(), y)
    torch.testing.assert_close(found, torch.linalg.pinv(X).sum(0)[:, None], rtol=1e-4, atol=1e-6)
    assert model.weight.grad is None


def test_what_a_solver_changes_in_place_is_told():
    lam, y = parameter(), torch.ones(2, dtype=torch.float64)
    objective = in_closure(lam)

    def careless(y):
        with torch.no_grad():
            lam.mul_(2)
        return y / (1 + lam)

    with pytest.raises(ig.ImplicitGradError, match="changed a tensor in place"):
        ig.implicit(careless, ig.argmin(objective))(y)


def test_a_tensor_that_cannot_be_found_beforehand_is_told():
    class Settings:  # classes are not looked into
        lam = parameter()

    def objective(w, y):
        return (w - y).square().sum() + (Settings.lam * w.square()).sum()

    y = torch.ones(2, dtype=torch.float64)
    with pytest.warns(ig.ImplicitGradWarning, match="could not be found"):
        ig.implicit(lambda y: y / torch.tensor([1.5, 2.5]), ig.argmin(objective))(y)


@pytest.mark.parametrize(
    ("kept", "find"),
    [
        (lambda lam: iter([lam] * 9), next),
        (lambda lam: {0: lam}.values(), lambda kept: next(iter(kept))),
        (lambda lam: (t for t in [lam] * 9), next),
        (lambda lam: {lam: "lam"}, lambda kept: next(iter(kept))),
        (lambda lam: lam.exp, lambda kept: kept().log()),
        (lambda lam: weakref.WeakSet([lam]), lambda kept: next(iter(kept))),
    ],
    ids=["iterator", "view", "generator", "key", "method in C", "weak set"],
)
def test_tensors_in_what_has_no_attributes_are_found_beforehand(kept, find):
    lam, y = parameter(), torch.ones(2, dtype=torch.float64)
    made, before = kept(lam), lam.grad.clone()

    def objective(w, y):
        return (w - y).square().sum() + (find(made) * w.square()).sum()

    def fit(y):
        objective(y.clone(), y).backward()  # not into the .grad of lam
        return y / (1 + lam.detach())

    phi = ig.implicit(fit, ig.argmin(objective), on_failure="raise")(y)
    assert torch.equal(lam.grad, before)
    torch.testing.assert_close(grad(phi.sum(), lam)[0], -y / (1 + lam.detach()).square())


def test_a_captured_history_is_told_with_its_name():
    body, y = parameter(), torch.ones(2, dtype=torch.float64)
    features = body.exp()

    def objective(w, y):
        return (w * features.sin() - y).square().sum()

    with pytest.raises(ig.ImplicitGradError, match=r"history of objective.features"):
        ig.implicit(lambda y: trained(objective, y), ig.argmin(objective))(y)


@dataclasses.dataclass(frozen=True)
class Batch:
    features: Tensor
    name: str = "train"


def test_dataclasses_among_the_arguments_are_looked_into():
    body = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)

    def objective(w, batch):
        assert batch.name == "train"
        return (w - batch.features.sin()).square().sum()

    solve = ig.implicit(lambda batch: trained(objective, batch), ig.argmin(objective))
    (found,) = grad(solve(Batch(body.exp())).sum(), body)
    assert body.grad is None
    torch.testing.assert_close(found, body.exp().cos() * body.exp())


class Plain:
    def __init__(self, features):
        self.features = features


def test_other_objects_with_a_history_are_refused():
    body = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)

    def objective(w, batch):
        return (w - batch.features).square().sum()

    def never(batch):
        raise AssertionError

    solve = ig.implicit(never, ig.argmin(objective))
    with pytest.raises(ig.InvalidArgumentError, match="history as features"):
        solve(Plain(body.exp()))


def quartic(w: Tensor, a: Tensor) -> Tensor:
    return (w**4).sum() / 4 + (w**2).sum() / 2 - (a * w).sum()


def newton(a: Tensor) -> Tensor:
    w = torch.zeros_like(a)
    for _ in range(40):
        slope = torch.func.grad(quartic)(w, a)
        w = w - torch.linalg.solve(torch.func.hessian(quartic)(w, a), slope)
    return w.detach()


def with_a_dual_level(a: Tensor) -> Tensor:
    """Newton's method with a derivative by dual numbers, for a Hessian that is diagonal."""
    w = torch.zeros_like(a)
    for _ in range(40):
        with fw.dual_level():
            dual = fw.make_dual(w, torch.ones_like(w))
            slope, curvature = fw.unpack_dual(dual**3 + dual - a)
        w = w - slope / curvature
    return w


def test_a_solver_may_use_forward_mode_within_forward_mode():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    t = torch.tensor([1.0, -1.0], dtype=torch.float64)
    solve = ig.implicit(newton, ig.argmin(quartic))
    right = t / (3 * solve(a) ** 2 + 1)
    for _ in range(2):
        with fw.dual_level():
            found = fw.unpack_dual(solve(fw.make_dual(a, t))).tangent
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.func.jvp(solve, (a,), (t,))[1], right)
    refused = ig.implicit(with_a_dual_level, ig.argmin(quartic))
    x = a.clone().requires_grad_()
    torch.testing.assert_close(grad(refused(x), x, t)[0], right)  # by itself it is right
    with fw.dual_level(), pytest.raises(ig.GraphError, match=r"torch\.func\.jvp"):
        refused(fw.make_dual(a, t))
    with fw.dual_level():  # and nothing is left behind
        torch.testing.assert_close(fw.unpack_dual(fw.make_dual(a, t)).tangent, t)
