"""What is evaluated again sees the state of the first evaluation, checkpoints included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import implicit_grad as ig


class Model(nn.Module):
    """Layers behind a checkpoint, or not."""

    def __init__(self, layer: Any, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.reentrant = layer(), nn.Linear(8, 3), reentrant
        self.double()

    def encode(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x).mean(1))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Tanh())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layer", [attention, normalised])
@pytest.mark.parametrize("style", ["tensor", "tensors", "function"])
def test_checkpoints_change_nothing(style, layer, reentrant):
    torch.manual_seed(1)
    x, xq, y = torch.randn(2, 6, 5, 8).double().unbind(), None, torch.randint(0, 3, (6,))
    x, xq = x

    def run(reentrant: bool | None) -> tuple[list[Tensor], list[Tensor]]:
        model = Model(layer, reentrant)
        torch.manual_seed(2)  # the masks of dropout
        maml = ig.imaml(model, lr=0.05, lam=5.0, on_failure="ignore")
        learner = maml.clone()
        if style == "function":
            learner.adapt(lambda: cross_entropy(learner(x), y), steps=2)
        for _ in range({"tensor": 1, "tensors": 2, "function": 0}[style]):
            learner.adapt(cross_entropy(learner(x), y))
        cross_entropy(learner(xq), y).backward()
        return [p.grad for p in model.parameters()], list(model.buffers())

    for found, right in zip(run(reentrant), run(None), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_under_functional_call_see_phi(reentrant):
    """Else they would compute with the module's own weights."""
    torch.manual_seed(1)
    x = torch.randn(6, 5, 8).double()

    def run(reentrant: bool | None) -> tuple[Tensor, ...]:
        model = Model(normalised, reentrant)
        theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        condition = ig.proximal(lambda p: functional_call(model, p, (x,)).square().sum(), 50.0)
        solve = ig.implicit(
            lambda t: {k: 0.9 * p for k, p in t.items()}, condition, on_failure="ignore"
        )
        phi = solve(theta)
        return grad(sum(p.sin().sum() for p in phi.values()), list(theta.values()))

    for found, right in zip(run(reentrant), run(None), strict=True):
        torch.testing.assert_close(found, right)


def test_checkpoints_are_checkpoints_again_outside():
    calls = []

    def layer(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    theta = torch.ones(2, requires_grad=True)
    solve = ig.implicit(
        lambda t: 0.9 * t,
        ig.proximal(lambda p: checkpoint(layer, p, use_reentrant=False).sum(), 2.0),
        on_failure="ignore",
    )
    solve(theta).sum().backward()
    inside = len(calls)
    checkpoint(layer, theta, use_reentrant=False).sum().backward()
    assert len(calls) == inside + 2


# Nodes of older torches do not tell their dtypes, and differences do not see what was cast.
TOLD = hasattr(torch.ones(1, requires_grad=True).exp().grad_fn, "_input_metadata")


@pytest.mark.parametrize("curvature", ["hessian", *["finite_difference"] * TOLD])
@pytest.mark.parametrize("style", ["closure", "argument", "captured"])
def test_features_under_autocast(style, curvature):
    """They come in bfloat16; the gradient is that of float32, to bfloat16's precision."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(10, 16), nn.ReLU()), nn.Linear(16, 3)
    x, xq = torch.randn(2, 15, 10).unbind()
    y = torch.randint(0, 3, (15,))
    monitor = ig.Monitor()
    options, seen = {"curvature": curvature, "monitor": monitor}, []

    def objective(w: Tensor, z: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(z @ w, y) + w.square().sum()

    def gradients(amp: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            z, zq = body(x), body(xq)
            if style == "closure":
                learner = ig.imaml(head, lr=0.1, lam=2.0, **options).clone()
                learner.adapt(lambda: cross_entropy(learner(z), y), steps=5)
                outer = cross_entropy(learner(zq), y)
            else:
                given = (z,) if style == "argument" else ()
                condition = ig.argmin(lambda w, *a: objective(w, *(a or (z,))))
                newton = ig.solvers.NewtonCG()
                start = {"init": lambda *_: torch.zeros(16, 3)}
                solve = ig.implicit(newton, condition, **start, **options)
                outer = cross_entropy(zq @ solve(*given), y)
        return torch.cat([g.flatten() for g in grad(outer, list(body.parameters()))])

    right, found = gradients(False), gradients(True)
    assert (found - right).norm() < 0.05 * right.norm()
    assert monitor.last.status in (ig.Status.CONVERGED, ig.Status.TRUNCATED)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert style == "closure" or seen[-1]


@pytest.mark.parametrize("error", [StopIteration, IndexError])
def test_the_call_after_the_last_step_is_named(error):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3) for _ in range(3)]
    learner = ig.imaml(nn.Linear(3, 1), lr=0.1).clone()
    before = [p.detach().clone() for p in learner.parameters()]
    step = iter(batches).__next__ if error is StopIteration else batches.pop
    with pytest.raises(ig.InvalidArgumentError, match=r"once more .* steps \+ 1"):
        learner.adapt(lambda: learner(step()).square().mean(), steps=3)
    assert all(map(torch.equal, before, learner.parameters()))


def test_a_solver_of_ones_own_leaves_no_gradient_in_what_the_loss_captured():
    torch.manual_seed(0)
    scale = nn.Parameter(torch.ones(3))
    x, y = torch.randn(5, 3), torch.randn(5, 1)

    def descend(objective: Any, init: Any) -> Any:
        w = [t.clone().requires_grad_() for t in init]
        optimizer = torch.optim.SGD(w, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            objective(tuple(w)).backward()
            optimizer.step()
        return tuple(w)

    model = nn.Linear(3, 1)
    maml = ig.imaml(model, lr=0.1, lam=2.0, solver=descend, on_failure="ignore")
    learner = maml.clone()
    learner.adapt(lambda: mse_loss(learner(x * scale), y))
    assert scale.grad is None and all(p.grad is None for p in model.parameters())
    mse_loss(learner(x), y).backward()
    assert scale.grad is not None


def test_a_model_compiled_in_place():
    torch.manual_seed(0)
    x, y = torch.randn(10, 3), torch.randn(10, 1)

    def gradients(compiled: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        if compiled:
            model.compile(backend="eager")
        learner = ig.imaml(model, lr=0.1).clone()
        learner.adapt(lambda: mse_loss(learner(x), y), steps=2)
        found = grad(mse_loss(learner(x), y), list(model.parameters()))
        assert (model._compiled_call_impl is not None) == compiled
        return found

    for found, right in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, right)


def test_attention_past_the_learner_is_told_how_to_be_reached():
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 8), torch.randint(0, 3, (6,))
    model = Model(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), None)
    learner = ig.imaml(model.float(), lr=0.1, lam=20.0).clone()
    learner.adapt(cross_entropy(learner.module(x), y))
    with pytest.raises(ig.GraphError, match=r"call the learner, learner\(x\)"):
        cross_entropy(learner(x), y).backward()
