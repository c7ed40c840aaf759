"""A root of a system, F given, and a fixed point of a map, F = φ − map(φ)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    like_phi,
    without_aux,
)
from implicit_grad._conditions.batching import batched, n_tasks_of
from implicit_grad._curvature.jacobian import Jacobian
from implicit_grad._options import require, require_flag
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class root(Condition):
    """φ solves residual(φ, *args) = 0, a system with as many equations as unknowns.

    Args:
        residual: `residual(phi, *args)` returns tensors in the form of φ.
        symmetric: whether ∂residual/∂φ is symmetric at φ, as in discretised diffusion or
            elasticity: then `MINRES` is the default, for one product an iteration and the root of
            the condition number. `CG`, with its preconditioners and warm starts, goes with it
            where the matrix is definite, positive or negative; where it is neither, CG stops and
            says so. If the matrix is not symmetric after all, a solve that fails or is truncated
            ends as NOT_SYMMETRIC; one that succeeds is right anyhow, for its residual is
            recomputed.
        has_aux: `residual` returns (value, aux), of which aux, which may be anything, is ignored.
    """

    residual: Callable[..., Any]
    symmetric: bool = dataclasses.field(default=False, kw_only=True)
    has_aux: bool = dataclasses.field(default=False, kw_only=True)
    tasks: bool = dataclasses.field(default=False, init=False, repr=False)
    is_minimum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("root", "residual", self.residual)
        require_flag(self, "has_aux")
        _check_symmetric(self)

    @property
    def _residual(self) -> Callable[..., Any]:
        return without_aux("root: residual", self.residual, self.has_aux)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "find_root":
            return super().problem_for(solver, call)
        return lambda phi: self._residual(phi, *call.args, **call.kwargs), {}

    def for_tasks(self) -> Condition | None:
        return _for_tasks(root(batched(self._residual), symmetric=self.symmetric))

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        residual = self._residual(phi, *call.args, **call.kwargs)
        outputs = like_phi("root: residual", residual, phi, variables)
        return _snapshot(outputs, variables, self.symmetric, n_tasks_of(self, phi))


@dataclasses.dataclass(frozen=True, eq=False)
class fixed_point(Condition):
    """φ = map(φ, *args): F = φ − map(φ), as in deep equilibrium models.

    Args:
        map: `map(phi, *args)` returns tensors in the form of φ.
        symmetric: whether ∂map/∂φ is symmetric at φ, as a gradient step's; see `root`.
        has_aux: `map` returns (value, aux), of which aux, which may be anything, is ignored.
    """

    map: Callable[..., Any]
    symmetric: bool = dataclasses.field(default=False, kw_only=True)
    has_aux: bool = dataclasses.field(default=False, kw_only=True)
    tasks: bool = dataclasses.field(default=False, init=False, repr=False)
    is_minimum: ClassVar[bool] = False
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("fixed_point", "map", self.map)
        require_flag(self, "has_aux")
        _check_symmetric(self)

    @property
    def _map(self) -> Callable[..., Any]:
        return without_aux("fixed_point: map", self.map, self.has_aux)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "find_root":
            return super().problem_for(solver, call)

        def residual(phi: Any) -> Any:
            tensors, tree = pytree.unknowns(phi)
            image = self._map(phi, *call.args, **call.kwargs)
            there = like_phi("fixed_point: map", image, phi, tensors)
            return tree.rebuild(tuple(map(torch.sub, tensors, there)))

        return residual, {}

    def for_tasks(self) -> Condition | None:
        return _for_tasks(fixed_point(batched(self._map), symmetric=self.symmetric))

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        image = self._map(phi, *call.args, **call.kwargs)
        outputs = like_phi("fixed_point: map", image, phi, variables)
        residual = tuple(p - t for t, p in zip(outputs, variables, strict=True))
        return _snapshot(residual, variables, self.symmetric, n_tasks_of(self, phi))


def _for_tasks(condition: root | fixed_point) -> Condition:
    """The condition, whose function is for a batch, as one for a batch."""
    object.__setattr__(condition, "tasks", True)
    return condition


def _snapshot(residual: Tensors, phi: Tensors, symmetric: bool, n_tasks: int | None) -> Snapshot:
    return Snapshot(
        residual,
        lambda _: Jacobian(residual, phi, said_symmetric=symmetric, n_tasks=n_tasks),
    )


def _check_symmetric(condition: root | fixed_point) -> None:
    require(condition, "symmetric", isinstance(condition.symmetric, bool), "True or False")
