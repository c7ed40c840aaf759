"""Proximal operators, ready for `prox_gradient` and `solvers.ProximalGradient`.

`prox(x, step, *args)` is the φ that minimises g(φ) + ‖φ − x‖²/(2·step) for a convex g; where g is
0 on a set and infinite elsewhere, the point of the set that is nearest to x, whatever the step.
Here x is a tensor or any container of tensors, and the numbers that belong to g (a weight, bounds,
a radius) are numbers, tensors, containers in the form of x of both, or functions of the solver's
arguments that return one of these; those that are tensors may require grad.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.bounds import Limits, check_pair, spread
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import is_number
from implicit_grad._torch import pytree

__all__ = ["box", "l2_ball", "simplex", "soft_threshold"]


@dataclasses.dataclass(frozen=True, eq=False)
class soft_threshold:
    """g = Σ weight·|x|, the penalty of a lasso: sign(x)·max(|x| − step·weight, 0).

    Args:
        weight: at least 0; one for all elements, per tensor or per element.

    >>> soft_threshold(1.0)(torch.tensor([3.0, -0.5, -2.0]), step=1.0)
    tensor([ 2.,  0., -1.])
    """

    weight: Any = 1.0

    def __post_init__(self) -> None:
        if not callable(self.weight):
            check_pair("soft_threshold: weight", (0.0, self.weight))

    def __call__(self, x: Any, step: float, *args: Any, **kwargs: Any) -> Any:
        weight = _value(self.weight, args, kwargs)
        _, weights = spread("soft_threshold: weight", (0.0, weight), x)

        def shrunk(t: Tensor, w: Tensor | None) -> Tensor:
            return t if w is None else t - t.clamp(-step * w, step * w)

        return _each(shrunk, x, weights)


@dataclasses.dataclass(frozen=True, eq=False)
class box:
    """The nearest point with lower ≤ x ≤ upper; None is no bound.

    >>> box(0.0, 1.0)(torch.tensor([3.0, 0.5, -2.0]), step=1.0)
    tensor([1.0000, 0.5000, 0.0000])
    """

    lower: Any = None
    upper: Any = None

    def __post_init__(self) -> None:
        if not (callable(self.lower) or callable(self.upper)):
            check_pair("box", (self.lower, self.upper))

    def __call__(self, x: Any, step: float, *args: Any, **kwargs: Any) -> Any:
        pair = _value(self.lower, args, kwargs), _value(self.upper, args, kwargs)
        lower, upper = spread("box", pair, x)

        def clipped(t: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
            return t if low is None and up is None else t.clamp(low, up)

        return _each(clipped, x, lower, upper)


@dataclasses.dataclass(frozen=True, eq=False)
class simplex:
    """The nearest point with x ≥ 0 and Σ x = total, along the last dimension of each tensor.

    By sorting (Held, Wolfe and Crowder, 1974, Validation of subgradient optimization).

    Args:
        total: the sum, greater than 0; one for all.

    >>> simplex()(torch.tensor([[0.5, 0.9, -1.0], [0.0, 0.0, 0.0]]), step=1.0)
    tensor([[0.3000, 0.7000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """

    total: Any = 1.0

    def __post_init__(self) -> None:
        _check_positive("simplex", "total", self.total)

    def __call__(self, x: Any, step: float, *args: Any, **kwargs: Any) -> Any:
        total = _value(self.total, args, kwargs)

        def projected(t: Tensor) -> Tensor:
            if not t.dim() or not t.shape[-1]:
                raise InvalidArgumentError(
                    "simplex: a tensor of x needs a last dimension with elements, got one of shape "
                    f"{tuple(t.shape)}"
                )
            falling = t.sort(dim=-1, descending=True).values
            excess = falling.cumsum(-1) - total
            count = torch.arange(1, t.shape[-1] + 1, device=t.device)
            positive = (falling * count > excess).sum(-1, keepdim=True).clamp(min=1)
            inside: Tensor = (t - excess.gather(-1, positive - 1) / positive).relu()
            return inside

        return _each(projected, x)


@dataclasses.dataclass(frozen=True, eq=False)
class l2_ball:
    """The nearest point with ‖x‖₂ ≤ radius, over all of x.

    Args:
        radius: greater than 0.

    >>> l2_ball(1.0)(torch.tensor([3.0, 4.0]), step=1.0)
    tensor([0.6000, 0.8000])
    """

    radius: Any = 1.0

    def __post_init__(self) -> None:
        _check_positive("l2_ball", "radius", self.radius)

    def __call__(self, x: Any, step: float, *args: Any, **kwargs: Any) -> Any:
        radius = _value(self.radius, args, kwargs)
        tensors, _ = pytree.unknowns(x)
        squares = sum((t * t).sum() for t in tensors)
        if not bool(squares > radius**2):
            return x
        return _each(lambda t: t * (radius / squares**0.5), x)


def _value(given: Any, args: Any, kwargs: Any) -> Any:
    """What belongs to g, for these arguments."""
    return given(*args, **kwargs) if callable(given) else given


def _each(function: Callable[..., Tensor], x: Any, *others: Limits) -> Any:
    tensors, tree = pytree.flatten(x)
    return tree.rebuild([function(*row) for row in zip(tensors, *others, strict=True)])


def _check_positive(owner: str, name: str, value: Any) -> None:
    good = callable(value) or (torch.is_tensor(value) and value.numel() == 1)
    if not (good or (is_number(value) and 0 < value < math.inf)):
        raise InvalidArgumentError(
            f"{owner}({name}={value!r}): expected a number > 0, a tensor with one element, or a "
            "function of the solver's arguments that returns one"
        )
