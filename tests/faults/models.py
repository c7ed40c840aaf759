"""Faults by models and losses: modes, random numbers, kinds of parameters, autocast, compilers."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from problems import normal
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import implicit_grad as ig
from faults import (
    LAM,
    STYLES,
    User,
    adapt,
    adapted_loss,
    all_near,
    batch,
    cotangents,
    differences_in,
    expected_at,
    good,
    gradients_in,
    in_module,
    learner_of,
    loss,
    made,
    near,
    network,
    problem,
    row,
)


@row(15, "BatchNorm in train mode")
def batch_norm(user: User) -> None:
    model = network(nn.BatchNorm1d(4)).train()
    for style in STYLES:
        _, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
        grad(outer, parameters, retain_graph=True)
    user.check()
    statistics = model[1].running_mean.clone()
    gradients_in(model, batch()[0], lam=300.0)  # F leaves them alone in forward, too
    assert torch.equal(model[1].running_mean, statistics)


@row(16, "eval() between forward and backward")
def other_mode(user: User) -> None:
    for style in STYLES:
        found, before = [], torch.get_rng_state()
        for flip in (False, True):
            model = network(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
            if flip:
                with user.acts():
                    torch.set_rng_state(before)
            learner, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
            with user.acts():
                learner.train(not flip), model.train(not flip)
            found.append(grad(outer, parameters))
        assert all(map(torch.equal, *found))
        user.owns()


@row(17, "dropout")
def dropout(user: User) -> None:
    theta = normal(30, seed=1)
    user.owns(theta)
    masks: list[Tensor] = []

    def masked(phi: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(30), 0.5))
        return (masks[-1] * phi**4).sum()

    for maxiter, tolerance in ((5, 5e-2), (20, 1e-7), (60, 1e-13)):
        masks.clear()
        solve = ig.implicit(
            torch.clone,
            ig.proximal(masked, 20.0),
            linear_solver=ig.CG(maxiter=maxiter),
            on_failure="ignore",
        )
        (found,) = grad(solve(theta).sum(), theta)
        # F is evaluated once for all products, and by the check of the first: with one mask
        assert len(masks) == 3 and all(torch.equal(mask, masks[0]) for mask in masks)
        near(found, 20 / (20 + 12 * masks[0] * theta.detach() ** 2), tolerance)


@row(18, "random numbers")
def random_numbers(user: User) -> None:
    theta = normal(3, seed=1)

    def solver(theta: Tensor) -> Tensor:
        return theta + torch.rand(3)

    def noisy(phi: Tensor) -> Tensor:
        return nn.functional.dropout(phi, 0.5).square().sum()

    solve = ig.implicit(solver, ig.proximal(noisy, 1.0), on_failure="ignore")
    torch.manual_seed(7)
    solver(theta)
    drawn_by_the_solver = torch.get_rng_state()
    torch.manual_seed(7)
    phi = solve(theta)
    assert torch.equal(torch.get_rng_state(), drawn_by_the_solver)
    user.owns(theta)
    grad(phi.sum(), theta, create_graph=True)[0].sum().backward(inputs=[phi])
    for style in STYLES:
        model = network(nn.Dropout(0.5))
        _, outer, parameters = adapted_loss(user, model, style, on_failure="ignore")
        grad(outer, parameters)


@row(19, "spectral_norm")
def power_iteration(user: User) -> None:
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = made(lambda: nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))  # noqa: B023
        model.train()
        with torch.no_grad():
            for _ in range(200):  # until the iteration has found the norm
                model(batch()[0])
        user.owns(model)
        x, _ = batch()
        # torch holds the iteration's vectors constant, so its second derivative is not that of the
        # norm; differences take over, and see as much of it as one iteration does, which is not
        # quite symmetric
        found, curvature = gradients_in(model, x)
        assert curvature == "finite_difference"
        all_near(found, differences_in(model, x), 1e-4)


@row(20, "forward hooks")
def forward_hooks(user: User) -> None:
    """F is evaluated, and so the hooks run, once in forward; backward runs none.

    And twice more where products are checked, at the first call.
    """
    model, calls = network(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    user.owns(model)
    x, y = batch()
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    condition = ig.proximal(in_module(model, x, lambda out: mse_loss(out, y)), 2.0)
    solve = ig.implicit(lambda t: t, condition, on_failure="ignore")
    solve(theta)
    assert len(calls) == 3
    calls.clear()
    phi = solve(theta)
    assert len(calls) == 1
    grad(phi["0.weight"].sum(), list(theta.values()), retain_graph=True)
    assert len(calls) == 1
    # with a closure F is evaluated once more, at the solution, and by the check
    for style, expected in (("tensor", 1), ("closure", 4)):
        calls.clear()
        learner = learner_of(model)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        assert len(calls) == expected
        grad(sum(p.sum() for p in learner.parameters()), list(model.parameters()))
        assert len(calls) == expected


@row(21, "an unused parameter")
def unused(user: User) -> None:
    theta = {"used": normal(3, seed=1), "unused": normal(2, seed=2)}
    v = [normal(3, seed=3, grad=False), normal(2, seed=4, grad=False)]
    user.owns(theta, v)
    condition = ig.proximal(lambda phi: phi["used"].square().sum(), 2.0)
    solve = ig.implicit(
        lambda t: {"used": t["used"] / 2, "unused": t["unused"]}, condition, on_failure="raise"
    )
    phi = solve(theta)
    found = grad(list(phi.values()), list(theta.values()), [v[0], v[1]])
    near(found[0], v[0] / 2, 1e-14), near(found[1], v[1], 1e-14)
    model = made(lambda: nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(2, 1)}))
    user.owns(model)
    x, y = batch()
    for style in STYLES:
        learner = learner_of(model)
        with pytest.raises(ig.InvalidArgumentError, match=r"unused\.weight.*allow_unused=True"):
            adapt(learner, lambda: mse_loss(learner.used(x), y), style)  # noqa: B023
        learner = learner_of(model, allow_unused=True)
        adapt(learner, lambda: mse_loss(learner.used(x), y), style)  # noqa: B023
        outer = (learner.unused.weight * v[1]).sum()  # moved by nothing but its pull
        near(grad(outer, model["unused"].weight)[0], v[1][None], 1e-14)


@row(22, "a frozen parameter")
def frozen(user: User) -> None:
    """With `imaml` the solve is over the others; with `implicit`, θ is what the caller makes it."""
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    user.owns(model)
    (x, y), lam = batch(inputs=2), 0.7
    for style in STYLES:
        learner = learner_of(model)
        with pytest.raises(ig.InvalidArgumentError, match=r"bias.*allow_nograd=True"):
            adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        learner = learner_of(model, lam=lam, allow_nograd=True)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        assert torch.equal(learner.bias, model.bias)
        found = grad(learner.weight.sum(), [model.weight, *()])[0]
        hessian = 2 * x.T @ x / len(x)  # over the weight alone
        expected = torch.linalg.solve(hessian + lam * torch.eye(2), lam * torch.ones(2))
        near(found[0], expected, 1e-12)
    theta = {"free": normal(2, seed=1), "held": normal(2, seed=2, grad=False)}
    user.owns(theta)
    coupled = ig.proximal(lambda p: (p["free"] + p["held"]).square().sum() / 2, 1.0)

    def both(t: Any) -> Any:
        s = (t["free"] + t["held"]) / 3
        return {"free": t["free"] - s, "held": t["held"] - s}

    phi = ig.implicit(both, coupled, on_failure="raise")(theta)
    near(grad(phi["free"].sum(), theta["free"])[0], torch.full((2,), 2 / 3), 1e-12)
    assert not theta["held"].requires_grad


class Tied(nn.Module):
    """One weight under two names: wᵀ tanh(W x) with W the encoder's and the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


@row(23, "tied weights")
def tied(user: User) -> None:
    model, lam = made(Tied), 3.0
    x = normal(5, 3, seed=1, grad=False)
    user.owns(model, x)
    assert len(list(model.parameters())) == 1 and len(model.state_dict()) == 2

    def value(w: Tensor) -> Tensor:
        return (torch.tanh(x @ w.T) @ w.T - x).square().mean()

    v = normal(3, 3, seed=7, grad=False)

    def expected(at: Tensor) -> Tensor:
        hessian = torch.autograd.functional.hessian(value, at).reshape(9, 9)
        return torch.linalg.solve(hessian + lam * torch.eye(9), lam * v.flatten()).view(3, 3)

    w = model.encoder.weight.detach()
    for style in STYLES:
        learner = learner_of(model, lam=lam)
        adapt(learner, lambda: (learner(x) - x).square().mean(), style)  # noqa: B023
        assert learner.encoder.weight is learner.decoder.weight
        found = grad(learner.encoder.weight, model.encoder.weight, v)[0]
        at = w if style == "tensor" else learner.encoder.weight.detach()
        near(found, expected(at), 1e-10)
    # by functional_call, either one name or both
    theta = w.clone().requires_grad_()
    for names in (("encoder.weight",), ("encoder.weight", "decoder.weight")):
        condition = ig.proximal(
            in_module(model, x, lambda out: (out - x).square().mean()), lam / len(names)
        )
        solve = ig.implicit(
            lambda t: dict.fromkeys(t, next(iter(t.values())) * 1), condition, on_failure="ignore"
        )
        phi = solve(dict.fromkeys(names, theta))
        near(grad(phi["encoder.weight"], theta, v)[0], expected(w), 1e-9)


@row(24, "a parameter without elements")
def without_elements(user: User) -> None:
    theta = {"a": normal(3, seed=1), "empty": torch.zeros(0, 2, requires_grad=True)}
    user.owns(theta)
    condition = ig.proximal(lambda p: p["a"].square().sum() / 2 + p["empty"].sum(), 1.0)
    for linear_solver in (ig.CG(), ig.NormalCG(), ig.Exact()):
        solve = ig.implicit(
            lambda t: {"a": t["a"] / 2, "empty": t["empty"]},
            condition,
            linear_solver=linear_solver,
            on_failure="raise",
        )
        found = grad(solve(theta)["a"].sum(), list(theta.values()))
        near(found[0], torch.full((3,), 0.5), 1e-14)
        assert found[1].shape == (0, 2)


@row(25, "two dtypes in one tree")
def mixed_dtypes(user: User) -> None:
    theta = {"a": normal(3, seed=1), "b": normal(2, seed=2, dtype=torch.float32)}
    user.owns(theta)
    condition = ig.proximal(lambda p: (p["a"].sum() + p["b"].double().sum()).square() / 2, 1.0)

    def solver(t: Any) -> Any:
        s = (t["a"].sum() + t["b"].double().sum()) / 6
        return {"a": t["a"] - s, "b": (t["b"].double() - s).float()}

    phi = ig.implicit(solver, condition, on_failure="raise")(theta)
    found = grad(phi["a"].sum() + phi["b"].sum().double(), list(theta.values()))
    assert [g.dtype for g in found] == [torch.float64, torch.float32]
    near(found[0], torch.full((3,), 1 / 6), 1e-6)
    near(found[1], torch.full((2,), 1 / 6).float(), 1e-6)


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        if kind == "MultiheadAttention":
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        if kind == "TransformerEncoderLayer":
            self.inner = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.kind == "scaled_dot_product_attention":
            return nn.functional.scaled_dot_product_attention(x, x, x)
        return self.inner(x, x, x)[0] if "Multi" in self.kind else self.inner(x)


@row(26, "fused attention")
def attention(user: User) -> None:
    x = normal(2, 3, 4, seed=1, grad=False)
    for kind in ("scaled_dot_product_attention", "MultiheadAttention", "TransformerEncoderLayer"):
        model = made(lambda: Attention(kind))  # noqa: B023
        user.owns(model)
        (exact, curvature), (rough, _) = (
            gradients_in(model, x, c, lam=300.0) for c in ("auto", "finite_difference")
        )
        assert curvature == "hessian", kind
        all_near(rough, exact, 1e-8)
        learner = learner_of(model, lam=50.0, on_failure="ignore")
        learner.adapt(learner(x).square().mean())
        grad(learner(x).sum(), list(model.parameters()))


class Bag(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(5, 3, seed=1).detach())
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "EmbeddingBag":
            return nn.functional.embedding_bag(x, self.weight)
        sparse = self.kind == "Embedding(sparse=True)"
        return nn.functional.embedding(x, self.weight, sparse=sparse).mean(1)


@row(27, "embeddings")
def embeddings(user: User) -> None:
    """EmbeddingBag takes finite differences, and the report says so.

    Deviation: Embedding(sparse=True) works as well; its gradients are made dense.
    """
    index = torch.tensor([[0, 1], [3, 1], [4, 4]])
    expected, _ = gradients_in(Bag("Embedding"), index)
    for kind, curvature in (
        ("EmbeddingBag", "finite_difference"),
        ("Embedding(sparse=True)", "hessian"),
    ):
        model = Bag(kind)
        user.owns(model)
        found, how = gradients_in(model, index)
        assert how == curvature
        all_near(found, expected, 1e-8)
        for style in STYLES:
            learner = learner_of(model, on_failure="ignore")
            if (kind, style) == ("EmbeddingBag", "tensor"):
                learner.adapt(learner(index).square().mean())
                with pytest.raises(ig.GraphError, match=r"no second derivative.*adapt\(lambda"):
                    grad(learner(index).sum(), model.weight)
                continue
            adapt(learner, lambda: learner(index).square().mean(), style)  # noqa: B023
            assert grad(learner(index).sum(), model.weight)[0].layout == torch.strided


class GridSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2)
        self.shift = nn.Parameter(torch.tensor([0.03, -0.05]))

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x.view(1, 1, 4, -1))
        where = torch.tensor([[0.1, 0.2], [-0.4, 0.3]]).view(1, 2, 1, 2) + self.shift
        return nn.functional.grid_sample(image, where, align_corners=False)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(2, -1, 3))[0]


def differentiable_twice(model: nn.Module, x: Tensor) -> bool:
    """Whether torch itself has second derivatives of the model."""
    weights = list(model.parameters())
    slopes = grad(model(x).square().sum(), weights, create_graph=True)
    try:
        grad(sum(slope.sum() for slope in slopes), weights)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def recurrent(user: User, device: str) -> None:
    kinds = [lambda kind=kind: Recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)]
    for build in (*kinds, GridSample):
        model = made(build).to(device)
        x = normal(4, 3, seed=1, grad=False).to(device)
        user.owns(model)
        (exact, curvature), (rough, _) = (
            gradients_in(model, x, c) for c in ("auto", "finite_difference")
        )
        twice = differentiable_twice(model, x)  # grid_sample is not, in an older torch
        assert curvature == ("hessian" if twice else "finite_difference") or device == "cuda"
        all_near(rough, exact, 1e-7)
        for style in STYLES:
            learner = learner_of(model, lam=50.0, on_failure="ignore")
            adapt(learner, lambda: learner(x).square().mean(), style)  # noqa: B023
            weights = dict(learner.module.named_parameters())  # cuDNN's flat ones must be these
            near(learner(x), functional_call(model, weights, (x,)), 1e-12)
            told = pytest.raises(ig.GraphError, match=r"no second derivative.*adapt\(lambda")
            missing = device == "cpu" and not twice and style == "tensor"
            with told if missing else contextlib.nullcontext():
                grad(learner(x).sum(), list(model.parameters()))


@row(28, "recurrent layers, convolutions, grid_sample")
def on_cpu(user: User) -> None:
    recurrent(user, "cpu")


@row(29, "an inner model that is compiled")
def compiled(user: User) -> None:
    X, matrix = normal(5, 2, seed=1, grad=False), normal(2, 2, seed=2, grad=False)
    theta, v = normal(2, seed=3), torch.tensor([1.0, -2.0])
    user.owns(X, matrix, theta)

    def inner(phi: Tensor, X: Tensor) -> Tensor:
        return torch.tanh(X @ (matrix @ phi)).square().sum()

    # torch gives it a second derivative of 0, without a word; from 2.6 on it can run as written
    eagerly = hasattr(torch.compiler, "set_stance")
    found, in_one_piece = {}, torch.compile(inner, backend="aot_eager")
    for name, function in (("eager", inner), ("compiled", in_one_piece)):
        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda t, X: 0.9 * t, ig.proximal(function, 5.0), monitor=monitor, on_failure="ignore"
        )
        found[name] = grad(solve(theta, X), theta, v)[0], monitor.last.curvature
    assert found["compiled"][1] == ("hessian" if eagerly else "finite_difference")
    near(found["compiled"][0], found["eager"][0], 1e-8)
    refused = pytest.raises(ig.GraphError, match=r"compiled \(torch\.compile\)")
    phi = ig.implicit(lambda t, X: 0.9 * t, ig.proximal(in_one_piece, 5.0), on_failure="ignore")
    with contextlib.nullcontext() if eagerly else refused:
        grad(phi(theta, X), theta, v, create_graph=True)


@row(30, "a reentrant checkpoint in the inner problem")
def reentrant_checkpoint(user: User) -> None:
    theta, X = problem()
    user.owns(theta, X)

    def through(reentrant: bool) -> ig.ImplicitSolver:
        return ig.implicit(
            good,
            ig.proximal(lambda p, X: checkpoint(loss, p, X, use_reentrant=reentrant), LAM),
            on_failure="raise",
        )

    for reentrant in (True, False):
        near(grad(through(reentrant)(theta, X).sum(), theta)[0], expected_at(theta, X))


def autocast_case(where: str, style: str) -> list[Tensor]:
    """Gradients in float32 with autocast nowhere, around forward or around backward."""
    model = network().float()
    x, y = (t.float() for t in batch())
    if style == "implicit":
        theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        condition = ig.proximal(in_module(model, x, lambda out: mse_loss(out, y)), 1.5)
        solve = ig.implicit(
            lambda t: {k: 0.9 * p for k, p in t.items()}, condition, on_failure="ignore"
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
            phi = list(solve(theta).values())
        leaves = list(theta.values())
    else:
        learner = learner_of(model, linear_solver=ig.CG(maxiter=5))
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
            adapt(learner, lambda: mse_loss(learner(x), y), style)
        phi, leaves = list(learner.parameters()), list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "backward"):
        return list(grad(phi, leaves, cotangents(phi)))


@row(31, "autocast around forward")
def autocast_forward(user: User) -> None:
    """F is evaluated in float32 by `implicit`; a loss handed to `adapt` is what was made."""
    user.owns(normal(1))
    plain = autocast_case("nowhere", "implicit")
    assert all(map(torch.equal, plain, autocast_case("forward", "implicit")))
    plain = autocast_case("nowhere", "tensor")
    assert not all(map(torch.equal, plain, autocast_case("forward", "tensor")))
    all_near(autocast_case("forward", "tensor"), plain, 2e-2)


@row(32, "autocast around backward")
def autocast_backward(user: User) -> None:
    user.owns(normal(1))
    for style in ("implicit", *STYLES):
        plain, ambient = (autocast_case(where, style) for where in ("nowhere", "backward"))
        assert all(map(torch.equal, plain, ambient)), style


@row(33, "products by finite differences")
def differences_of_gradients(user: User) -> None:
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 5e-4)):
        theta = normal(3, seed=1, dtype=dtype)
        X = normal(4, 3, seed=2, grad=False, dtype=dtype)
        user.owns(theta, X)
        calls, found = [], {}

        def counted(phi: Tensor, X: Tensor) -> Tensor:
            calls.append(1)  # noqa: B023
            return loss(phi, X)

        def solver(theta: Tensor, X: Tensor) -> Tensor:
            return good(theta.double(), X.double()).to(theta)

        for curvature in ("hessian", "finite_difference"):
            calls.clear()
            monitor = ig.Monitor()
            solve = ig.implicit(
                solver,
                ig.proximal(counted, LAM),
                curvature=curvature,
                linear_solver=ig.CG(maxiter=3),
                monitor=monitor,
                on_failure="ignore",
            )
            found[curvature] = grad(solve(theta, X).sum(), theta)[0]
            assert monitor.last.curvature == curvature
            products = monitor.last.products
        # in forward, to see whether it still is what it was, two a product and for ∂F/∂a
        assert len(calls) == 1 + 1 + 2 * products + 2
        near(found["finite_difference"], found["hessian"], tolerance)
