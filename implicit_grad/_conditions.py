"""What it means to be the solution: the four forms of F(φ, a) = 0.

A condition evaluates the user's function at a solution (`at`) and says how to linearise it. `phi`
is always the function's first argument.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._ad import Linearization, gradient
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._proximal import add_proximal, check_lam, proximal_term, spread_lam
from implicit_grad._tree import Tensors


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The user's function as evaluated at φ: its outputs with their graph, and F from them."""

    outputs: Tensors
    linearize: Callable[[], Linearization]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a wrapped solver."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Condition(abc.ABC):
    """F(φ, a) = 0. `symmetric` says whether ∂F/∂φ is, so that CG applies."""

    symmetric: ClassVar[bool]
    must_depend_on_phi: ClassVar[bool] = True

    @property
    def parameters(self) -> Any:
        """Tensors that the condition itself holds, such as λ: arguments like the others."""
        return ()

    def check_call(self, call: Call) -> None:  # noqa: B027  (most conditions accept any call)
        """Raise if the arguments cannot work, before the solver runs."""

    def template(self, call: Call) -> Any:
        """What φ has to look like, if the arguments tell; else None."""
        return None

    def objective_of(self, call: Call, parameters: Any) -> Callable[[Any], Tensor]:
        """phi ↦ what a minimiser has to minimise."""
        raise InvalidArgumentError(
            f"{type(self).__name__} has no objective for a minimiser to minimise; use argmin or "
            "proximal, or pass a solver function"
        )

    @abc.abstractmethod
    def at(self, phi: Any, variables: Tensors, call: Call, parameters: Any) -> Snapshot:
        """Evaluate at the container `phi`, whose distinct tensors are `variables`."""


@dataclasses.dataclass(frozen=True, eq=False)
class argmin(Condition):
    """φ minimises a scalar objective: F = ∇_φ objective(φ, *args).

    Args:
        objective: `objective(phi, *args)` returns a 0-d (or one-element) tensor, twice
            differentiable around the solution.
        strong_convexity: a known μ > 0 with ∂²objective ⪰ μ·I, which turns the linear solver's
            coefficients into a bound on its error (`Report.solve_error_bound`).
    """

    objective: Callable[..., Tensor]
    strong_convexity: float | None = None
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_callable("argmin", "objective", self.objective)
        mu = self.strong_convexity
        if mu is not None and not 0 < mu < math.inf:
            raise InvalidArgumentError(f"argmin(strong_convexity={mu!r}): expected a number > 0")

    def objective_of(self, call: Call, parameters: Any) -> Callable[[Any], Tensor]:
        return lambda phi: self.objective(phi, *call.args, **call.kwargs)

    def at(self, phi: Any, variables: Tensors, call: Call, parameters: Any) -> Snapshot:
        value = scalar("argmin: objective", self.objective(phi, *call.args, **call.kwargs))
        return Snapshot((value,), lambda: Linearization(gradient(value, variables), variables))


@dataclasses.dataclass(frozen=True, eq=False)
class proximal(Condition):
    """φ minimises loss(φ, *args) + λ/2 ‖φ − θ‖², θ the first argument of the solver (iMAML).

    F = ∇loss(φ) + λ(φ − θ), so with (∇²loss + λ) u = v the gradients are
    dθ = λu = (I + ∇²loss/λ)⁻¹v and dλ = −(φ − θ)ᵀu (Rajeswaran et al., 2019, Meta-Learning
    with Implicit Gradients).

    Args:
        loss: `loss(phi, *args)`, the solver's arguments without θ, returns a scalar tensor.
        lam: λ > 0: a number, a tensor, or a container of them in the form of θ or of its upper
            part (per tensor or per element). A tensor that requires grad gets its gradient.
        convex: say that the loss is convex in φ; then λ bounds the curvature from below, and the
            linear solver's error is bounded (`Report.solve_error_bound`).
    """

    loss: Callable[..., Tensor]
    lam: Any
    convex: bool = False
    symmetric: ClassVar[bool] = True
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_callable("proximal", "loss", self.loss)
        for leaf in _tree.leaves(self.lam):
            check_lam(leaf, "proximal")

    @property
    def parameters(self) -> Any:
        return self.lam

    def check_call(self, call: Call) -> None:
        if not call.args:
            raise InvalidArgumentError(
                "proximal: the solver's first positional argument is theta, but it was called "
                "without positional arguments"
            )
        spread_lam(self.lam, call.args[0], "proximal")

    def template(self, call: Call) -> Any:
        return call.args[0]

    def objective_of(self, call: Call, parameters: Any) -> Callable[[Any], Tensor]:
        theta, *rest = call.args
        thetas, lams = _tree.leaves(theta), spread_lam(parameters, theta, "proximal")

        def objective(phi: Any) -> Tensor:
            loss = self.loss(phi, *rest, **call.kwargs)
            return loss + proximal_term(_tree.leaves(phi), thetas, lams)

        return objective

    def at(self, phi: Any, variables: Tensors, call: Call, parameters: Any) -> Snapshot:
        theta, *rest = call.args
        value = scalar("proximal: loss", self.loss(phi, *rest, **call.kwargs))
        lam = spread_lam(parameters, theta, "proximal")
        slot = {id(t): i for i, t in enumerate(variables)}
        slots = [slot[id(t)] for t in _tree.leaves(phi)]

        def linearize() -> Linearization:
            smooth = gradient(value, variables)
            residual, diagonal = add_proximal(smooth, variables, slots, _tree.leaves(theta), lam)
            return Linearization(residual, variables, smooth=smooth, diagonal=diagonal)

        return Snapshot((value,), linearize)


@dataclasses.dataclass(frozen=True, eq=False)
class root(Condition):
    """φ solves residual(φ, *args) = 0, a system with as many equations as unknowns.

    Args:
        residual: `residual(phi, *args)` returns tensors in the form of φ.
    """

    residual: Callable[..., Any]
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_callable("root", "residual", self.residual)

    def at(self, phi: Any, variables: Tensors, call: Call, parameters: Any) -> Snapshot:
        residual = self.residual(phi, *call.args, **call.kwargs)
        outputs = _like_phi("root: residual", residual, phi, variables)
        return Snapshot(outputs, lambda: Linearization(outputs, variables))


@dataclasses.dataclass(frozen=True, eq=False)
class fixed_point(Condition):
    """φ = map(φ, *args): F = map(φ) − φ, as in deep equilibrium models.

    Args:
        map: `map(phi, *args)` returns tensors in the form of φ.
    """

    map: Callable[..., Any]
    symmetric: ClassVar[bool] = False
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_callable("fixed_point", "map", self.map)

    def at(self, phi: Any, variables: Tensors, call: Call, parameters: Any) -> Snapshot:
        image = self.map(phi, *call.args, **call.kwargs)
        outputs = _like_phi("fixed_point: map", image, phi, variables)
        residual = tuple(t - p for t, p in zip(outputs, variables, strict=True))
        return Snapshot(residual, lambda: Linearization(residual, variables))


def _check_callable(condition: str, name: str, value: object) -> None:
    if not callable(value):
        raise InvalidArgumentError(
            f"{condition}: {name} must be a function of (phi, ...), got {describe(value)}"
        )


def scalar(name: str, value: object) -> Tensor:
    """The value, if it is one floating-point number in a tensor."""
    if not torch.is_tensor(value) or value.numel() != 1 or not value.is_floating_point():
        raise InvalidArgumentError(
            f"{name} must return a scalar floating-point tensor, got {describe(value)}"
        )
    return value


def _like_phi(name: str, value: Any, phi: Any, variables: Tensors) -> Tensors:
    phi_leaves, value_leaves = _tree.leaves(phi), _tree.leaves(value)
    if len(phi_leaves) != len(variables):
        raise InvalidSolutionError(
            f"{name.split(':')[0]}: phi holds one tensor more than once; return distinct tensors"
        )
    if _tree.structure(value) != _tree.structure(phi):
        raise InvalidArgumentError(
            f"{name} must return the form of phi, {_tree.structure(phi)}, "
            f"got {_tree.structure(value)}"
        )
    for label, f, p in zip(_tree.names(phi, "phi"), value_leaves, phi_leaves, strict=True):
        if not torch.is_tensor(f) or f.shape != p.shape or f.dtype != p.dtype:
            raise InvalidArgumentError(
                f"{name}: for {label}, {describe(p)}, it returned {describe(f)}"
            )
    return tuple(value_leaves)
