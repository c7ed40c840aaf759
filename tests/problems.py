"""A zoo of inner problems with known solutions: a new one joins as a function in `PROBLEMS`."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, softplus

import implicit_grad as ig

LINEAR_SOLVERS = {
    "default": None,
    "CG": ig.CG(rtol=1e-13),
    "CG+Jacobi": ig.CG(rtol=1e-13, preconditioner=ig.Jacobi()),
    "CG+Nystrom": ig.CG(rtol=1e-13, preconditioner=ig.Nystrom(rank=3)),
    "CG+Reuse": ig.CG(rtol=1e-13, preconditioner=ig.Reuse(ig.Cholesky(), solves=2)),
    "CG+warm": ig.CG(rtol=1e-13, warm_start=ig.WarmStart()),
    "MINRES": ig.MINRES(rtol=1e-13),
    "GMRES": ig.GMRES(rtol=1e-13),
    "NormalCG": ig.NormalCG(rtol=1e-13),
    "Exact": ig.Exact(),
}


@dataclass(frozen=True)
class Instance:
    """One inner problem at one point.

    `reference(*args)` is its solution as a differentiable function, found in another way than by
    the implicit function theorem; `outer(phi)` is a scalar that depends on all of it.
    """

    solver: Callable[..., Any]
    condition: Any
    args: tuple[Any, ...]
    reference: Callable[..., Any]
    outer: Callable[[Any], Tensor]
    captured: tuple[Tensor, ...] = ()

    @property
    def wanted(self) -> list[Tensor]:
        """The tensors to differentiate with respect to."""
        leaves = [*tensors(self.args), *self.captured]
        return [t for t in leaves if t.requires_grad]

    def gradients(self, solve: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The outer loss's gradients through `solve`."""
        return torch.autograd.grad(self.outer(solve(*self.args)), self.wanted)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a container."""
    return [t for t in optree.tree_leaves(tree) if torch.is_tensor(t)]


def normal(*shape: int, seed: int = 0, grad: bool = True, dtype=torch.float64) -> Tensor:
    """A leaf of standard normal numbers."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=random).requires_grad_(grad)


def wavy(phi: Any) -> Tensor:
    """An outer loss with no symmetry and no vanishing derivative."""
    values = torch.cat([t.double().flatten() for t in tensors(phi)])
    return (torch.sin(values + torch.arange(len(values)) / 3) + values.square() / 4).sum()


def newton(residual: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A root of a function of one vector, to rounding error; as differentiable as the residual."""
    x = start
    for _ in range(40):
        f = residual(x)
        if f.norm() < 1e-15 * (1 + x.norm()):
            break
        x = x - torch.linalg.solve(torch.func.jacrev(residual)(x), f)
    return x


def minimize(objective: Callable[[Any], Tensor], init: Any) -> Any:
    """Newton's method on a container of tensors (distinct ones), in float64."""
    leaves, structure = optree.tree_flatten(init)

    def unflat(vector: Tensor) -> Any:
        parts = vector.split([t.numel() for t in leaves])
        parts = [p.view(t.shape).to(t.dtype) for p, t in zip(parts, leaves, strict=True)]
        return optree.tree_unflatten(structure, parts)

    start = torch.cat([t.flatten().double() for t in leaves])
    slope = torch.func.grad(lambda vector: objective(unflat(vector)).double())
    return unflat(newton(slope, start))


def unrolled(objective: Callable[[Any], Tensor], init: Any, lr: float, steps: int) -> Any:
    """Gradient descent that keeps its whole graph: plain MAML's inner loop."""
    leaves, structure = optree.tree_flatten(init)
    for _ in range(steps):
        leaves = [t if t.requires_grad else t.requires_grad_() for t in leaves]
        value = objective(optree.tree_unflatten(structure, leaves))
        slope = torch.autograd.grad(value, leaves, create_graph=True)
        leaves = [t - lr * g for t, g in zip(leaves, slope, strict=True)]
    return optree.tree_unflatten(structure, leaves)


def prox(phi: Any, theta: Any, lam: Any) -> Tensor:
    """λ/2 ‖φ − θ‖², for one λ or as many as θ has tensors."""
    theta = tensors(theta)
    lams = lam if isinstance(lam, list) else [lam] * len(theta)
    pairs = zip(tensors(phi), theta, lams, strict=True)
    return sum((w * (p - t) ** 2).sum() for p, t, w in pairs) / 2


def ridge() -> Instance:
    """Ridge regression, in closed form."""

    def solver(X, y, lam):
        eye = torch.eye(X.shape[1], dtype=X.dtype)
        return torch.linalg.solve(X.T @ X + lam * eye, X.T @ y)

    def objective(w, X, y, lam):
        return (X @ w - y).square().sum() / 2 + lam / 2 * w.square().sum()

    lam = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    args = (normal(12, 4, seed=1), normal(12, seed=2), lam)
    return Instance(solver, ig.argmin(objective), args, solver, wavy)


def logistic() -> Instance:
    """Logistic regression near θ, with a λ that is learned; solved by Newton's method."""
    lam = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def loss(w, X, y):
        z = X @ w
        return (softplus(z) - y * z).mean()

    def reference(theta, X, y):
        return minimize(lambda w: loss(w, X, y) + prox(w, theta, lam), theta)

    def solver(theta, X, y):
        return minimize(lambda w: loss(w, X, y) + prox(w, theta, lam.detach()), theta)

    y = (normal(15, seed=3, grad=False) > 0).double()
    args = (normal(3, seed=1), normal(15, 3, seed=2), y)
    return Instance(solver, ig.proximal(loss, lam), args, reference, wavy, captured=(lam,))


def spectrum() -> Instance:
    """A quadratic with eigenvalues from 0.01 to 10."""
    basis, _ = torch.linalg.qr(normal(12, 12, seed=1, grad=False))
    logs = torch.linspace(-2, 1, 12, dtype=torch.float64)

    def matrix(logs):
        return basis @ torch.diag(10**logs) @ basis.T

    def solver(logs, b):
        return torch.linalg.solve(matrix(logs), b)

    def objective(x, logs, b):
        return x @ matrix(logs) @ x / 2 - x @ b

    args = (logs.requires_grad_(), normal(12, seed=2))
    return Instance(solver, ig.argmin(objective, strong_convexity=0.005), args, solver, wavy)


def deep_equilibrium() -> Instance:
    """A fixed point of x = tanh(W x + b) with a nonsymmetric W."""

    def image(x, W, b):
        return torch.tanh(W @ x + b)

    def solver(W, b):
        x = torch.zeros_like(b)
        for _ in range(200):
            x = image(x, W, b)
        return x

    W = (normal(5, 5, seed=1, grad=False) / 5).requires_grad_()
    args = (W, normal(5, seed=2))
    return Instance(solver, ig.fixed_point(image), args, solver, wavy)


def nonlinear_system() -> Instance:
    """A root of x + tanh(W x)/3 = b, with a nonsymmetric Jacobian."""

    def residual(x, W, b):
        return x + torch.tanh(W @ x) / 3 - b

    def solver(W, b):
        return newton(lambda x: residual(x, W, b), b)

    args = (normal(4, 4, seed=1), normal(4, seed=2))
    return Instance(solver, ig.root(residual), args, solver, wavy)


def convolutional() -> Instance:
    """Few-shot classification by a small network near θ; its reference is MAML to convergence."""
    lam, labels = 1.5, torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(w, images, labels):
        features = avg_pool2d(torch.tanh(conv2d(images, w["kernel"], w["bias"])), 4).flatten(1)
        return cross_entropy(features @ w["weight"], labels)

    def reference(theta, images, labels):
        return unrolled(lambda w: loss(w, images, labels) + prox(w, theta, lam), theta, 0.6, 60)

    def solver(theta, images, labels):
        theta = {k: t.detach() for k, t in theta.items()}
        phi = reference(theta, images.detach(), labels)
        return {k: t.detach() for k, t in phi.items()}

    theta = {"kernel": normal(2, 1, 3, 3, seed=1), "bias": normal(2, seed=2)}
    theta["weight"] = normal(2, 3, seed=3)
    args = (theta, normal(6, 1, 6, 6, seed=4), labels)
    return Instance(solver, ig.proximal(loss, lam), args, reference, wavy)


def lasso() -> Instance:
    """A lasso with some weights at 0, by proximal gradient steps that are differentiable."""

    def solver(X, y, lam):
        step, w = 1 / torch.linalg.matrix_norm(X.detach(), 2) ** 2, torch.zeros_like(X[0])
        for _ in range(300):
            ahead = w - step * (X.T @ (X @ w - y))
            w = ahead - ahead.clamp(-step * lam, step * lam)
        return w

    def objective(w, X, y, lam):
        return (X @ w - y).square().sum() / 2

    condition = ig.prox_gradient(objective, ig.prox.soft_threshold(lambda X, y, lam: lam))
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    args = (normal(12, 4, seed=1), normal(12, seed=2), lam)
    return Instance(solver, condition, args, solver, wavy)


PROBLEMS = (ridge, logistic, spectrum, deep_equilibrium, nonlinear_system, convolutional, lasso)


def count_tensors():
    """The tensors that Python knows."""
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@contextlib.contextmanager
def no_garbage_collector():
    """References alone decide what lives: a cycle would show."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Tied(nn.Module):
    """Encoder and decoder share their weight; another layer is not used."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.spare = nn.Linear(2, 1)

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


@contextlib.contextmanager
def errors_of_torch() -> Iterator[None]:
    """An exception that is torch's own, in whatever words, and none of this library's."""
    try:
        yield
    except RuntimeError as error:  # pytest.raises would keep its frames alive, and all in them
        assert not isinstance(error, ig.ImplicitGradError), error
    else:
        pytest.fail("torch raised nothing")


def in_threads(work: Callable[[int], Any], count: int = 8) -> list[Any]:
    """What the calls return, run at the same time and switched often."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
