"""Problems with known minima, and minimisers of every kind to be held to them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
from problems import minimize as newton
from problems import normal, tensors
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import ExponentialLR

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOpt, TorchOptim

ARGUMENT, SOLUTION = ig.InvalidArgumentError, ig.InvalidSolutionError


NEEDS_SCIPY = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="no SciPy")


START = torch.tensor([1.0, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """An objective, a start, its minimum by other means, and its curvature around both."""

    objective: Callable[[Any], Tensor]
    init: Any
    minimum: Any
    L: float
    mu: float
    quadratic: bool = False


def flat(tree: Any) -> Tensor:
    """All numbers in a container."""
    return torch.cat([torch.zeros(0), *(t.detach().double().flatten() for t in tensors(tree))])


def slope_at(objective: Callable[[Any], Tensor], phi: Any) -> Tensor:
    """The objective's gradient, each distinct tensor once, by torch itself."""
    leaves, structure = optree.tree_flatten(phi)
    variables = {id(t): t.detach().clone().requires_grad_() for t in leaves}
    value = objective(optree.tree_unflatten(structure, [variables[id(t)] for t in leaves]))
    grads = torch.autograd.grad(value, list(variables.values()), allow_unused=True)
    return torch.cat([g.flatten().double() for g in grads if g is not None])


def shapes() -> Problem:
    """A quadratic of a nested container: a matrix, a vector, a 0-d and an empty tensor."""
    minimum = {"w": normal(2, 3, seed=1, grad=False), "rest": [normal(4, seed=2, grad=False)]}
    minimum["rest"] += [normal(seed=3, grad=False), torch.zeros(0, 2, dtype=torch.float64)]
    weights = [1.0, 2.0, 4.0, 3.0]

    def objective(phi):
        pairs = zip(tensors(phi), tensors(minimum), weights, strict=True)
        return sum(c * (p - m).square().sum() for p, m, c in pairs) / 2

    init = optree.tree_map(torch.zeros_like, minimum)
    return Problem(objective, init, minimum, 4.0, 1.0, quadratic=True)


def tied() -> Problem:
    """One tensor in two places: (p − 1)² + (p − 3)² + 2 (q + 1)², so p = 2 and q = −1."""

    def objective(phi):
        first, (second, q) = phi
        return ((first - 1) ** 2 + (second - 3) ** 2 + 2 * (q + 1) ** 2).sum()

    p, q = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return Problem(objective, (p, [p, q]), (p + 2, [p + 2, q - 1]), 4.0, 4.0, quadratic=True)


def logistic() -> Problem:
    """Ridge-penalised logistic regression."""
    X, y = normal(30, 3, seed=1, grad=False), normal(30, seed=2, grad=False).sign()

    def objective(w):
        return softplus(-y * (X @ w)).mean() + 0.05 * w.square().sum()

    init = torch.zeros(3, dtype=torch.float64)
    L = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 120 + 0.1
    return Problem(objective, init, newton(objective, init), L, 0.1)


def network() -> Problem:
    """A tanh network with weight decay, near enough to a minimum to know which it is."""
    X, y = normal(12, 2, seed=1, grad=False), normal(12, seed=2, grad=False)

    def objective(w):
        error = torch.tanh(X @ w["in"]) @ w["out"] - y
        return error.square().mean() / 2 + 0.05 * (w["in"].square().sum() + w["out"].square().sum())

    random = {"in": normal(2, 3, seed=3, grad=False), "out": normal(3, seed=4, grad=False)}
    descent = random
    for _ in range(500):
        slopes = torch.func.grad(objective)(descent)
        descent = {k: t - 0.5 * slopes[k] for k, t in descent.items()}
    minimum = newton(objective, descent)
    init = {k: t + 0.02 * random[k] for k, t in minimum.items()}
    return Problem(objective, init, minimum, 2.0, 0.02)


def rosenbrock() -> Problem:
    """The banana valley: κ = 2500 at its minimum (1, 1)."""

    def objective(x):
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    init = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    return Problem(objective, init, torch.ones_like(init), 2000.0, 0.4)


def single() -> Problem:
    """The quadratic of `shapes` in float32."""
    double = shapes()
    minimum, init = (optree.tree_map(Tensor.float, t) for t in (double.minimum, double.init))

    def objective(phi):
        pairs = zip(tensors(phi), tensors(minimum), strict=True)
        return sum((p - m).square().sum() for p, m in pairs) / 2

    return Problem(objective, init, minimum, 1.0, 1.0, quadratic=True)


PROBLEMS = {f.__name__: f for f in (shapes, tied, logistic, network, rosenbrock, single)}


def torchopt_sgd(problem: Problem, **stop: Any) -> TorchOpt:
    torchopt = pytest.importorskip("torchopt")
    return TorchOpt(transform=torchopt.sgd(lr=1 / problem.L, momentum=0.7, nesterov=True), **stop)


def sgd(problem: Problem, **stop: Any) -> TorchOptim:
    def factory(params):
        return torch.optim.SGD(params, lr=1 / problem.L, momentum=0.7, nesterov=True)

    return TorchOptim(factory=factory, **stop)


def adam(problem: Problem, **stop: Any) -> TorchOptim:
    return TorchOptim(
        factory=lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.8, 0.9)),
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.98),
        **stop,
    )


def lbfgs(problem: Problem, **stop: Any) -> TorchOptim:
    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    return TorchOptim(factory=lambda params: torch.optim.LBFGS(params, max_iter=5, **exact), **stop)


DESCENTS: dict[str, Callable[..., Any]] = {
    "GradientDescent": lambda p, **stop: GradientDescent(lr=1 / p.L, **stop),
    "Nesterov": lambda p, **stop: Nesterov(lr=1 / p.L, kappa=p.L / p.mu, **stop),
    "Nesterov, adaptive": lambda p, **stop: Nesterov(lr=1 / p.L, **stop),
    "Nesterov, momentum": lambda p, **stop: Nesterov(lr=1 / p.L, momentum=0.6, **stop),
    "NewtonCG": lambda p, **stop: NewtonCG(maxiter=100, cg=15, **stop),
    "NewtonCG, short": lambda p, **stop: NewtonCG(maxiter=200, cg=2, **stop),
    "SGD": sgd,
    "Adam": adam,
    "LBFGS": lbfgs,
    "TorchOpt": torchopt_sgd,
}


def ill_conditioned(kappa: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A quadratic with curvatures from 1/κ to 1, and a start with all of them."""
    curvatures = torch.logspace(-math.log10(kappa), 0, 20, dtype=torch.float64)
    return lambda x: (curvatures * x * x).sum() / 2, torch.ones_like(curvatures)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.3, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
    "LBFGS strong_wolfe": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", max_iter=2),
}


def constrained_projection() -> tuple[Callable[[Tensor], Tensor], dict[str, Any], Tensor]:
    """The nearest point to y with sum 1, first element ≤ 0.3 and all ≥ 0, from the KKT conditions.

    y = (0.9, 0.5, 0.2, −1): x₄ = 0 and x₁ = 0.3 are active, so x₂ + x₃ = 0.7 and x₂ − x₃ = 0.3.
    """
    y = torch.tensor([0.9, 0.5, 0.2, -1.0], dtype=torch.float64)
    given = {
        "bounds": (0, None),
        "equality": lambda p: {"sum": p.sum() - 1},
        "inequality": lambda p: (p[:1] - 0.3, [p[1:2] - 2]),
    }
    minimum = torch.tensor([0.3, 0.5, 0.2, 0.0], dtype=torch.float64)
    return lambda p: (p - y).square().sum(), given, minimum


RIDGE = Problem(torch.sum, None, None, L=6.0, mu=0.7)
