"""Faults of inner problems, models and training loops: a row each, and what the rows share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fingerprint import differences, fingerprint
from problems import minimize, normal, prox
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import mse_loss

import implicit_grad as ig

STYLES = ("tensor", "closure")
Status = ig.Status


class User:
    """The owner of tensors and modules, who compares them before and after."""

    def __init__(self) -> None:
        self.property: tuple[Any, ...] = ()
        self._before: dict[str, Any] | None = None

    def owns(self, *things: Any) -> None:
        """From here on, nothing about these things, or about torch's state, may change."""
        if self._before is not None:
            self.check()
        self.property = (*self.property, *things)
        self._before = fingerprint(*self.property)

    @contextlib.contextmanager
    def acts(self) -> Iterator[None]:
        """What the body changes is the user's doing, such as a model's forward in train mode."""
        self.owns()
        yield
        self._before = fingerprint(*self.property)

    def check(self) -> None:
        """Compare."""
        assert self._before is not None, "the row does not say what the user owns"
        changed = differences(self._before, fingerprint(*self.property))
        assert not changed, f"changed: {changed}"


Row = Callable[[User], None]
ROWS: dict[int, tuple[str, Row]] = {}
ON_GPU: dict[int, tuple[str, Row]] = {}


def row(number: int, name: str, table: dict[int, tuple[str, Row]] = ROWS) -> Callable[[Row], Row]:
    """Enter a function as a row of the table."""

    def enter(function: Row) -> Row:
        assert number not in table
        table[number] = name, function
        return function

    return enter


def ids(table: dict[int, tuple[str, Row]]) -> list[Any]:
    return [pytest.param(f, id=f"{n:02d} {name}") for n, (name, f) in sorted(table.items())]


def quadratic(matrix: Tensor, **options: Any) -> ig.ImplicitSolver:
    """b ↦ argmin φᵀMφ/2 − bᵀφ, so that the gradient is M⁻¹v."""

    def objective(phi: Tensor, b: Tensor) -> Tensor:
        return phi @ (matrix.to(phi) @ phi) / 2 - b @ phi

    def solver(b: Tensor) -> Tensor:
        return torch.linalg.solve(matrix.double(), b.double()).to(b)

    return ig.implicit(solver, ig.argmin(objective), **options)


def pulled(solve_for: Callable[..., Tensor], b: Tensor, v: Tensor) -> Tensor:
    """The gradient for a cotangent that is given outright."""
    return grad(solve_for(b), b, v)[0]


def diagonal(*entries: float) -> Tensor:
    return torch.diag(torch.tensor(entries))


LAM = 0.5


def loss(phi: Tensor, X: Tensor) -> Tensor:
    return (X @ phi).square().sum() / 2 + (phi**4).sum() / 4


def good(theta: Tensor, X: Tensor) -> Tensor:
    return minimize(lambda phi: loss(phi, X) + prox(phi, theta, LAM), theta)


CONDITION = ig.proximal(loss, LAM)


def problem() -> tuple[Tensor, Tensor]:
    return normal(3, seed=1), normal(4, 3, seed=2, grad=False)


def expected_at(theta: Tensor, X: Tensor) -> Tensor:
    """(H + λ)⁻¹ λ 1, by a dense solve."""
    phi = good(theta.detach(), X)
    hessian = torch.autograd.functional.hessian(lambda p: loss(p, X), phi)
    return torch.linalg.solve(hessian + LAM * torch.eye(3), LAM * torch.ones(3))


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual, expected)


def made(build: Callable[[], Any]) -> Any:
    """A module with the same weights every time, and no trace on torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build()


def network(*extra: nn.Module) -> nn.Sequential:
    return made(lambda: nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1)))


def learner_of(model: nn.Module, lam: Any = 20.0, lr: float = 0.01, **options: Any) -> Any:
    """A clone, ready to adapt, with a linear solve to rounding error."""
    options = {"linear_solver": ig.CG(rtol=1e-13), "on_failure": "raise", **options}
    theirs = {k: options.pop(k) for k in ("allow_unused", "allow_nograd") if k in options}
    return ig.imaml(model, lr=lr, lam=lam, **options).clone(**theirs)


def adapt(learner: Any, criterion: Callable[[], Tensor], style: str, steps: int = 1) -> None:
    if style == "closure":
        learner.adapt(criterion, steps=steps)
        return
    for _ in range(steps):
        learner.adapt(criterion())


def batch(seed: int = 5, inputs: int = 3) -> tuple[Tensor, Tensor]:
    return normal(6, inputs, seed=seed, grad=False), normal(6, 1, seed=seed + 50, grad=False)


def in_module(module: nn.Module, X: Tensor, criterion: Callable[[Tensor], Tensor]) -> Any:
    """phi ↦ a loss of the module's output under the parameters phi."""
    return lambda phi: criterion(functional_call(module, phi, (X,)))


def cotangents(parameters: Any) -> list[Tensor]:
    return [normal(*p.shape, seed=i, grad=False).to(p) for i, p in enumerate(parameters)]


def wavy(output: Tensor) -> Tensor:
    return output.sin().sum() + output.square().sum() / 4


def gradients_in(
    module: nn.Module, X: Tensor, curvature: Any = "auto", lam: float = 30.0
) -> tuple[tuple[Tensor, ...], str]:
    """Gradients with respect to a module's parameters around 0.9 θ, and what A was made of."""
    monitor = ig.Monitor()
    theta = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    solve = ig.implicit(
        lambda theta: {k: 0.9 * t for k, t in theta.items()},
        ig.proximal(in_module(module, X, wavy), lam),
        linear_solver=ig.CG(rtol=1e-13),
        curvature=curvature,
        monitor=monitor,
        on_failure="ignore",
    )
    phi = solve(theta)
    found = grad(list(phi.values()), list(theta.values()), cotangents(phi.values()))
    assert monitor.last is not None and monitor.last.status in (
        Status.CONVERGED,
        Status.STAGNATED,
        Status.INNER_NOT_STATIONARY,
    )
    return found, monitor.last.curvature


def differences_in(module: nn.Module, X: Tensor, lam: float = 30.0) -> list[Tensor]:
    """The gradients by a dense Hessian of differences, each with the buffers as they are now."""
    names, values = zip(*module.named_parameters(), strict=True)
    sizes = [p.numel() for p in values]

    def split(vector: Tensor) -> list[Tensor]:
        parts = vector.split(sizes)
        return [part.view_as(p) for part, p in zip(parts, values, strict=True)]

    def slope(vector: Tensor) -> Tensor:
        at = vector.detach().requires_grad_()
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        weights = dict(zip(names, split(at), strict=True))
        return grad(wavy(functional_call(module, {**weights, **buffers}, (X,))), at)[0]

    phi = torch.cat([0.9 * p.detach().flatten() for p in values])
    v = torch.cat([t.flatten() for t in cotangents(values)])
    steps = 1e-5 * torch.eye(len(phi))
    hessian = torch.stack([(slope(phi + e) - slope(phi - e)) / 2e-5 for e in steps])
    return split(torch.linalg.solve(hessian + lam * torch.eye(len(phi)), lam * v))


def all_near(actual: Any, expected: Any, tolerance: float) -> None:
    actual, expected = (torch.cat([t.flatten() for t in ts]) for ts in (actual, expected))
    near(actual, expected, tolerance)


def adapted_loss(
    user: User, model: nn.Module, style: str, **options: Any
) -> tuple[Any, Tensor, list[Tensor]]:
    """A learner after a step, its outer loss, and θ; from here on the model is owned."""
    user.owns(model)
    with user.acts():
        (x, y), learner = batch(), learner_of(model, **options)
        adapt(learner, lambda: mse_loss(learner(x), y), style)
        outer = mse_loss(learner(x + 1), y)
    user.owns(learner.module)
    return learner, outer, list(model.parameters())
