"""Bounds on φ in any of their forms, as two flat vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad.solvers._flat import Coordinates, Vector
from implicit_grad.solvers._objective import Variables


@dataclasses.dataclass(frozen=True)
class FlatBounds:
    """lower ≤ x ≤ upper, with infinities where there is no bound."""

    lower: Vector
    upper: Vector

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())

    def same(self, other: FlatBounds) -> bool:
        """Whether they are equal in every element."""
        return bool((self.lower == other.lower).all() and (self.upper == other.upper).all())

    def clip(self, x: Vector) -> Vector:
        """The nearest vector within the bounds."""
        return np.clip(x, self.lower, self.upper)


def flat_bounds(bounds: Any, variables: Variables, coordinates: Coordinates) -> FlatBounds:
    """`(lower, upper)`, each None, a number, a tensor, or a container in the form of φ."""
    name = variables.name
    if bounds is not None and not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise InvalidArgumentError(
            f"{name}: bounds must be a pair (lower, upper), got {describe(bounds)}"
        )
    lower, upper = (
        coordinates.vector(tuple(_spread(bound, side, infinity, variables)))
        for bound, side, infinity in zip(
            bounds or (None, None), ("lower", "upper"), (-np.inf, np.inf), strict=True
        )
    )
    if not (lower <= upper).all():
        raise InvalidArgumentError(
            f"{name}: bounds must not be NaN, and no lower bound greater than the upper; they are "
            f"for {int((~(lower <= upper)).sum())} of {len(lower)} elements"
        )
    return FlatBounds(lower, upper)


def _spread(bound: Any, side: str, infinity: float, variables: Variables) -> list[Tensor]:
    """One tensor of bounds for each variable."""
    like = optree.tree_leaves(variables.container, none_is_leaf=True, namespace=_tree.NAMESPACE)
    try:
        spread = optree.broadcast_prefix(
            bound, variables.container, none_is_leaf=True, namespace=_tree.NAMESPACE
        )
        found = {
            id(t): torch.as_tensor(infinity if b is None else b).to(t.device, t.dtype).expand_as(t)
            for b, t in zip(spread, like, strict=True)
            if torch.is_tensor(t)
        }
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"{variables.name}: the {side} bound must be None, a number, a tensor, or a container "
            f"in the form of phi: {error}"
        ) from None
    return list(found.values())
