"""A root of a system, F given, and a fixed point of a map, F = φ − map(φ)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import optree
import torch

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    like_phi,
)
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class root(Condition):
    """φ solves residual(φ, *args) = 0, a system with as many equations as unknowns.

    Args:
        residual: `residual(phi, *args)` returns tensors in the form of φ.
    """

    residual: Callable[..., Any]
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("root", "residual", self.residual)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "find_root":
            return super().problem_for(solver, call)
        return lambda phi: self.residual(phi, *call.args, **call.kwargs), {}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        residual = self.residual(phi, *call.args, **call.kwargs)
        outputs = like_phi("root: residual", residual, phi, variables)
        return Snapshot(outputs, lambda _: Linearization(outputs, variables))


@dataclasses.dataclass(frozen=True, eq=False)
class fixed_point(Condition):
    """φ = map(φ, *args): F = φ − map(φ), as in deep equilibrium models.

    Args:
        map: `map(phi, *args)` returns tensors in the form of φ.
    """

    map: Callable[..., Any]
    symmetric: ClassVar[bool] = False
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("fixed_point", "map", self.map)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "find_root":
            return super().problem_for(solver, call)

        def residual(phi: Any) -> Any:
            image = self.map(phi, *call.args, **call.kwargs)
            return optree.tree_map(torch.sub, phi, image, namespace=pytree.NAMESPACE)

        return residual, {}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        image = self.map(phi, *call.args, **call.kwargs)
        outputs = like_phi("fixed_point: map", image, phi, variables)
        residual = tuple(p - t for t, p in zip(outputs, variables, strict=True))
        return Snapshot(residual, lambda _: Linearization(residual, variables))
