"""The objective as minimisers see it: a function of a tuple of tensors, one variable each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._ad import Linearization, gradient
from implicit_grad._condition import scalar
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._proximal import ProximalObjective
from implicit_grad._tree import Tensors


@dataclasses.dataclass(frozen=True)
class Point:
    """The objective around one φ; `norm` is ‖slope‖₂ over all tensors."""

    phi: Tensors
    value: float
    slope: Tensors
    norm: float

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor Inf in the value and the slope."""
        return math.isfinite(self.value) and math.isfinite(self.norm)


class Variables:
    """The distinct tensors of a container, copied, and the way back to the container."""

    def __init__(self, owner: object, init: Any) -> None:
        self.name = type(owner).__name__
        found, self.tree = _tree.flatten(init)
        for tensor in found:
            if not tensor.is_floating_point():
                raise InvalidArgumentError(
                    f"{self.name}: init must hold floating-point tensors only; it holds "
                    f"{describe(tensor)}"
                )
        self.container = init
        self.start: Tensors = tuple(t.detach().clone() for t in found)

    def result(self, phi: Tensors) -> Any:
        """φ in the form of init, if it is made of numbers."""
        if not all(bool(torch.isfinite(t).all()) for t in phi):
            raise InvalidSolutionError(
                f"{self.name}: phi holds NaN or Inf after the last step: {_WHY}"
            )
        return self.tree.rebuild(tuple(t.detach() for t in phi))


class Objective(Variables):
    """A user's objective, to be evaluated where and as often as a minimiser likes."""

    def __init__(self, owner: object, objective: Callable[[Any], Tensor], init: Any) -> None:
        super().__init__(owner, init)
        self._objective = objective
        self._proximal: ProximalObjective | None = None
        if isinstance(objective, ProximalObjective) and len(objective.theta) == len(self.start):
            self._proximal = objective  # one variable for each leaf of θ: no weights are tied

    def __call__(self, phi: Tensors) -> Tensor:
        """The objective's own output."""
        return self._evaluated(self._objective, phi)

    def value(self, phi: Tensors) -> float:
        """The objective alone, without a graph."""
        with torch.no_grad():
            return float(self(phi))

    def at(self, phi: Tensors) -> Point:
        """Value and gradient; no graph is kept."""
        if self._proximal is None:
            here, value = self._recorded(self._objective, phi)
            with torch.no_grad():
                return _point(phi, value, gradient(value, here))
        here, loss = self._recorded(self._proximal.loss, phi)
        with torch.no_grad():
            term, slope = self._proximal.pull.at(phi, self._proximal.theta)
            torch._foreach_add_(slope, gradient(loss, here))
            return _point(phi, loss + term, slope)

    def curved_at(self, phi: Tensors) -> tuple[Point, Linearization]:
        """Value and gradient, and the gradient's graph for products with the Hessian."""
        here, value = self._recorded(self._objective, phi)
        with torch.enable_grad():
            around = Linearization(gradient(value, here), here)
        return _point(phi, value, tuple(g.detach() for g in around.residual)), around

    def check(self, here: Point, step: int) -> None:
        """Raise if there are NaN or Inf."""
        if not here.finite:
            raise InvalidSolutionError(
                f"{self.name}: at step {step} the objective is {here.value:g} and its gradient's "
                f"norm {here.norm:g}: {_WHY}"
            )

    def _evaluated(self, function: Callable[[Any], Tensor], phi: Tensors) -> Tensor:
        return scalar(f"{self.name}: objective", function(self.tree.rebuild(phi)))

    def _recorded(self, function: Callable[[Any], Tensor], phi: Tensors) -> tuple[Tensors, Tensor]:
        here = tuple(p.detach().requires_grad_() for p in phi)
        with torch.enable_grad():
            return here, self._evaluated(function, here)


_WHY = (
    "a step was too long for this objective (lower lr, or choose a minimiser with a line search), "
    "or it is not defined everywhere on the way (start elsewhere)"
)


def _point(phi: Tensors, value: Tensor, slope: Tensors) -> Point:
    """Both numbers come from the device at once: a step waits for it a single time."""
    value = value.detach().reshape(()).double()
    loss, size = torch.stack([value, _norm(slope).to(value)]).tolist()
    if not math.isfinite(size):  # squares may overflow where what they are summed for does not
        size = float(_norm(tuple(g.double() for g in slope)))
    return Point(phi, loss, slope, size)


def _norm(tensors: Tensors) -> Tensor:
    """‖·‖₂ over all of them."""
    if not tensors:
        return torch.zeros(())
    parts = torch._foreach_norm(tensors)
    together = torch.stack([p.to(parts[0].device).double() for p in parts])
    norm: Tensor = torch.linalg.vector_norm(together)
    return norm


def moved(phi: Tensors, direction: Tensors, length: float) -> Tensors:
    """φ + length · direction."""
    return tuple(torch._foreach_add(phi, direction, alpha=length)) if phi else ()


def inner(x: Tensors, y: Tensors) -> float:
    """xᵀy over all tensors."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(x, y, strict=True))
