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
from implicit_grad._batched import aligned, batched, number_of_tasks, total
from implicit_grad._condition import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    check_distinct,
    check_model,
    composed,
    curvatures,
    like_phi,
)
from implicit_grad._constraints import Constraints
from implicit_grad._curvature import Curvature, Objective
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._proximal import (
    LowRank,
    ProximalObjective,
    Pull,
    check_lam,
    evaluated,
    proximal_pull,
)
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
        tasks: φ is a batch of solutions of separate problems, along the first dimension of each
            of its tensors; `objective` then returns one value for each, and CG solves for each.

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
    tasks: bool = False
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_callable("argmin", "objective", self.objective)
        check_model("argmin", self.model)
        mu = self.strong_convexity
        if mu is not None and not 0 < mu < math.inf:
            raise InvalidArgumentError(f"argmin(strong_convexity={mu!r}): expected a number > 0")
        if self.constraints and self.model is not None:
            raise InvalidArgumentError("argmin: model does not go with constraints")
        if self.constraints and self.tasks:
            raise InvalidArgumentError("argmin: tasks does not go with constraints")

    @property
    def constraints(self) -> Constraints:
        """Those that were given."""
        return Constraints(self.bounds, self.equality, self.inequality)

    @property
    def definite(self) -> bool:  # type: ignore[override]
        return not self.constraints.rows

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return ("auto", "hessian") if self.constraints else curvatures(self.model)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        function = composed(self.objective, self.model, call.args, call.kwargs)

        def objective(phi: Any) -> Tensor:
            return total("argmin: objective", function(phi)[0], _tasks(self, phi))

        return objective, self.constraints.for_minimizer(call.args, call.kwargs)

    def for_tasks(self) -> Condition | None:
        if self.constraints or self.tasks:
            return None
        objective, model = batched(self.objective, "argmin: objective"), _batched_model(self)
        return argmin(objective, self.strong_convexity, model=model, tasks=True)

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        returned, outputs = composed(self.objective, self.model, call.args, call.kwargs)(phi)
        tasks = _tasks(self, phi)
        value = total("argmin: objective", returned, tasks)
        objective = Objective(value, variables, outputs=outputs, again=again, tasks=tasks)
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
        tasks: θ and φ are batches of separate problems, along the first dimension of each of their
            tensors; `loss` then returns one value for each, and CG solves for each. A `lam` for
            each task has as many dimensions as θ's tensors.
    """

    loss: Callable[..., Tensor]
    lam: Any
    convex: bool = False
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    tasks: bool = False
    symmetric: ClassVar[bool] = True
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("proximal", "loss", self.loss)
        check_model("proximal", self.model)
        diagonal = self.lam.diagonal if isinstance(self.lam, LowRank) else self.lam
        for leaf in () if callable(diagonal) else _tree.leaves(diagonal):
            check_lam(leaf, "proximal")

    @property
    def parameters(self) -> Any:
        return evaluated(self.lam)

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return curvatures(self.model)

    def check_call(self, call: Call) -> None:
        if not call.args:
            raise InvalidArgumentError(
                "proximal: the solver's first positional argument is theta, but it was called "
                "without positional arguments"
            )
        if self.tasks and isinstance(call.parameters, LowRank):
            raise InvalidArgumentError(
                "proximal: with tasks=True, lam must not be a LowRank matrix"
            )
        self._pull(call)

    def for_tasks(self) -> Condition | None:
        if self.tasks or isinstance(self.parameters, LowRank):
            return None
        loss, model = batched(self.loss, "proximal: loss"), _batched_model(self)
        return _Stacked(loss, self.lam, self.convex, model=model, tasks=True)

    def _pull(self, call: Call) -> Pull:
        return proximal_pull(call.parameters, call.args[0], "proximal")

    def template(self, call: Call) -> Any:
        return call.args[0]

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        theta, *rest = call.args
        whole = composed(self.loss, self.model, rest, call.kwargs)

        def loss(phi: Any) -> Tensor:
            return total("proximal: loss", whole(phi)[0], _tasks(self, phi))

        return ProximalObjective(loss, self._pull(call), tuple(_tree.leaves(theta))), {}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        theta, *rest = call.args
        returned, outputs = composed(self.loss, self.model, rest, call.kwargs)(phi)
        tasks, pull = _tasks(self, phi), self._pull(call)
        value = total("proximal: loss", returned, tasks)
        slot = {id(t): i for i, t in enumerate(variables)}
        slots = [slot[id(t)] for t in _tree.leaves(phi)]

        def force(slope: Tensors) -> Any:
            return pull.force(slope, variables, _tree.leaves(theta), slots)

        objective = Objective(value, variables, force, outputs, again, tasks=tasks)
        return Snapshot((value,), objective.linearize)


class _Stacked(proximal):
    """A batch made of single problems: λ, an argument like the others, has tasks as well."""

    def _pull(self, call: Call) -> Pull:
        theta = call.args[0]
        return proximal_pull(aligned(call.parameters, theta), theta, "proximal")


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


def _tasks(condition: argmin | proximal, phi: Any) -> int | None:
    """How many problems there are, if φ is a batch."""
    if not condition.tasks:
        return None
    return number_of_tasks(type(condition).__name__, tuple(_tree.leaves(phi)))


def _batched_model(condition: argmin | proximal) -> Callable[..., Any] | None:
    return None if condition.model is None else batched(condition.model)
