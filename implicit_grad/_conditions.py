"""The four forms of F(φ, a) = 0: a minimum, a minimum near θ, a root, a fixed point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._ad import Linearization
from implicit_grad._condition import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    check_distinct,
    like_phi,
    scalar,
)
from implicit_grad._constraints import Constraints
from implicit_grad._curvature import Curvature, Objective
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._proximal import LowRank, ProximalObjective, check_lam, evaluated, proximal_pull
from implicit_grad._tree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class argmin(Condition):
    """φ minimises a scalar objective: F = ∇_φ objective(φ, *args), under constraints if given.

    Args:
        objective: `objective(phi, *args)` returns a 0-d (or one-element) tensor, twice
            differentiable around the solution.
        strong_convexity: a known μ > 0 with ∂²objective ⪰ μ·I, which turns the linear solver's
            coefficients into a bound on its error (`Report.solve_error_bound`).
        model: if given, the objective is `objective(model(phi, *args), *args)`; this form allows
            Gauss-Newton products. What penalises phi itself has to be among the model's outputs.
        bounds: `(lower, upper)`, each None, a number, a tensor or a container in the form of φ; or
            a function of the solver's arguments that returns such a pair.
        equality: `equality(phi, *args)` returns tensors that are 0 at a solution.
        inequality: `inequality(phi, *args)` returns tensors that are at most 0 at a solution.

    Constraints that hold with equality at φ enter the linear system with their multipliers, which
    are found from φ; where one holds by chance (a multiplier of 0), φ has no derivative, and the
    status says so (Fiacco, 1976, Sensitivity analysis for nonlinear programming).
    """

    objective: Callable[..., Tensor]
    strong_convexity: float | None = None
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    bounds: Any = None
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_callable("argmin", "objective", self.objective)
        _check_model("argmin", self.model)
        mu = self.strong_convexity
        if mu is not None and not 0 < mu < math.inf:
            raise InvalidArgumentError(f"argmin(strong_convexity={mu!r}): expected a number > 0")
        if self.constraints and self.model is not None:
            raise InvalidArgumentError("argmin: model does not go with constraints")

    @property
    def constraints(self) -> Constraints:
        """Those that were given."""
        return Constraints(self.bounds, self.equality, self.inequality)

    @property
    def definite(self) -> bool:  # type: ignore[override]
        return not self.constraints.rows

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return ("auto", "hessian") if self.constraints else _curvatures(self.model)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        function = _composed(self.objective, self.model, call.args, call.kwargs)
        return lambda phi: function(phi)[0], self.constraints.for_minimizer(call.args, call.kwargs)

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        value, outputs = _composed(self.objective, self.model, call.args, call.kwargs)(phi)
        scalar("argmin: objective", value)
        objective = Objective(value, variables, outputs=outputs, again=again)
        if not self.constraints:
            return Snapshot((value,), objective.linearize)
        check_distinct("argmin", phi, variables)
        evaluated, linearize = self.constraints.at(objective, phi, call.args, call.kwargs)
        return Snapshot(evaluated, lambda _: linearize())


@dataclasses.dataclass(frozen=True, eq=False)
class proximal(Condition):
    """φ minimises loss(φ, *args) + λ/2 ‖φ − θ‖², θ the first argument of the solver (iMAML).

    F = ∇loss(φ) + λ(φ − θ), so with (∇²loss + λ) u = v the gradients are
    dθ = λu = (I + ∇²loss/λ)⁻¹v and dλ = −(φ − θ)ᵀu (Rajeswaran et al., 2019, Meta-Learning
    with Implicit Gradients).

    Args:
        loss: `loss(phi, *args)`, the solver's arguments without θ, returns a scalar tensor.
        lam: λ > 0: a number, a tensor, or a container of them in the form of θ or of its upper
            part (per tensor or per element); `LowRank`, a matrix; or a function without arguments
            that returns one of these, such as `LearnedLam`. Tensors that require grad get theirs.
        convex: say that the loss is convex in φ; then λ bounds the curvature from below, and the
            linear solver's error is bounded (`Report.solve_error_bound`).
        model: if given, the loss is `loss(model(phi, *args), *args)`; this form allows
            Gauss-Newton products.
    """

    loss: Callable[..., Tensor]
    lam: Any
    convex: bool = False
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    symmetric: ClassVar[bool] = True
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("proximal", "loss", self.loss)
        _check_model("proximal", self.model)
        diagonal = self.lam.diagonal if isinstance(self.lam, LowRank) else self.lam
        for leaf in () if callable(diagonal) else _tree.leaves(diagonal):
            check_lam(leaf, "proximal")

    @property
    def parameters(self) -> Any:
        return evaluated(self.lam)

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return _curvatures(self.model)

    def check_call(self, call: Call) -> None:
        if not call.args:
            raise InvalidArgumentError(
                "proximal: the solver's first positional argument is theta, but it was called "
                "without positional arguments"
            )
        proximal_pull(call.parameters, call.args[0], "proximal")

    def template(self, call: Call) -> Any:
        return call.args[0]

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        theta, *rest = call.args
        thetas = tuple(_tree.leaves(theta))
        pull = proximal_pull(call.parameters, theta, "proximal")
        loss = _composed(self.loss, self.model, rest, call.kwargs)
        return ProximalObjective(lambda phi: loss(phi)[0], pull, thetas), {}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        theta, *rest = call.args
        value, outputs = _composed(self.loss, self.model, rest, call.kwargs)(phi)
        scalar("proximal: loss", value)
        pull = proximal_pull(call.parameters, theta, "proximal")
        slot = {id(t): i for i, t in enumerate(variables)}
        slots = [slot[id(t)] for t in _tree.leaves(phi)]

        def force(slope: Tensors) -> Any:
            return pull.force(slope, variables, _tree.leaves(theta), slots)

        objective = Objective(value, variables, force, outputs, again)
        return Snapshot((value,), objective.linearize)


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
            return optree.tree_map(torch.sub, phi, image, namespace=_tree.NAMESPACE)

        return residual, {}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        image = self.map(phi, *call.args, **call.kwargs)
        outputs = like_phi("fixed_point: map", image, phi, variables)
        residual = tuple(p - t for t, p in zip(outputs, variables, strict=True))
        return Snapshot(residual, lambda _: Linearization(residual, variables))


def _composed(
    function: Callable[..., Any], model: Callable[..., Any] | None, args: Any, kwargs: Any
) -> Callable[[Any], tuple[Any, Tensors | None]]:
    """phi ↦ function(model(phi)), and the model's outputs, none of which is behind another."""

    def evaluate(phi: Any) -> tuple[Any, Tensors | None]:
        if model is None:
            return function(phi, *args, **kwargs), None
        returned = model(phi, *args, **kwargs)
        tensors, tree = _tree.flatten(returned, lambda t: torch.is_tensor(t) and t.requires_grad)
        outputs = tuple(t.view_as(t) for t in tensors)
        return function(tree.rebuild(outputs), *args, **kwargs), outputs

    return evaluate


def _curvatures(model: Any) -> tuple[Curvature, ...]:
    every: tuple[Curvature, ...] = ("auto", "hessian", "finite_difference")
    return every if model is None else (*every, "gauss_newton")


def _check_model(condition: str, model: object) -> None:
    if model is not None:
        check_callable(condition, "model", model)
