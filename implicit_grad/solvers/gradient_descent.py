"""Gradient descent with a fixed step length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._ad import gradient
from implicit_grad._errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDescent:
    """φ ← φ − lr ∇objective(φ), for a number of steps or until ‖∇objective‖₂ ≤ tol.

    Args:
        lr: step length.
        steps: number of steps; with `tol`, the most to take (None: 10,000).
        tol: stop when the gradient's norm is at most this, in the objective's units.

    >>> half_square = lambda phi: (phi * phi).sum() / 2
    >>> GradientDescent(lr=0.5, steps=3).minimize(half_square, torch.tensor([8.0]))
    tensor([1.])
    """

    lr: float
    steps: int | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise InvalidArgumentError(f"GradientDescent(lr={self.lr!r}): expected a number > 0")
        if self.steps is None and self.tol is None:
            raise InvalidArgumentError("GradientDescent: give steps, tol or both")
        if self.steps is not None and self.steps < 0:
            raise InvalidArgumentError(
                f"GradientDescent(steps={self.steps!r}): expected an integer of at least 0"
            )

    def minimize(self, objective: Callable[[Any], Tensor], init: Any) -> Any:
        """Descend from init; phi has the form of init."""
        start, tree = _tree.flatten(init)
        phi = tuple(t.detach().clone() for t in start)
        for _ in range(10_000 if self.steps is None else self.steps):
            here = tuple(p.requires_grad_() for p in phi)
            with torch.enable_grad():
                value = objective(tree.rebuild(here))
            with torch.no_grad():
                slope = gradient(value, here)
                if self.tol is not None and _norm(slope) <= self.tol:
                    break
                phi = tuple(p.detach() - self.lr * g for p, g in zip(here, slope, strict=True))
        return tree.rebuild(tuple(p.detach() for p in phi))


def _norm(tensors: tuple[Tensor, ...]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
