"""A minimum, with or without constraints: F = ∇objective."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    check_distinct,
    check_model,
    composed,
    curvatures,
)
from implicit_grad._conditions.batching import batched, batched_model, tasks_of, total
from implicit_grad._conditions.constraints import Constraints
from implicit_grad._conditions.constraints_batched import ConstraintsOfTasks
from implicit_grad._curvature.auto import linearize
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import is_number, require, require_flag
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class argmin(Condition):
    """φ minimises a scalar objective: F = ∇_φ objective(φ, *args), under constraints if given.

    Args:
        objective: `objective(phi, *args)` returns a 0-d (or one-element) tensor, twice
            differentiable around the solution.
        strong_convexity: a known μ > 0 with ∂²objective ⪰ μ·I, which turns the linear solver's
            coefficients into a bound on its error (`Report.solve_error_bound`).
        model: if given, the objective is `objective(model(phi, *args), *args)`; this form allows
            Gauss-Newton products, which keep the curvature of `objective` in the model's outputs
            and drop the model's own. So for a penalty on phi, phi itself has to be an output, and
            the penalty a part of `objective`: `model=lambda phi, X: (X @ phi, phi)` with
            `objective=lambda out, X: misfit(out[0]) + out[1].square().sum()`. A penalty that the
            model computes would lose its curvature.
        bounds: `(lower, upper)`, each None, a number, a tensor or a container in the form of φ, of
            numbers, tensors and None; or a function of the solver's arguments that returns such a
            pair.
        equality: `equality(phi, *args)` returns tensors that are 0 at a solution.
        inequality: `inequality(phi, *args)` returns tensors that are at most 0 at a solution.
        tasks: φ is a batch of solutions of separate problems, along the first dimension of each
            of its tensors; `objective` then returns one value for each, and CG solves for each.

    Constraints that hold with equality at φ enter the linear system with their multipliers, which
    are found from φ. They may depend on each other, as copies do or an equation written as two
    inequalities. Where one holds by chance (its multiplier is 0 in all that are right), or where
    some that depend on each other part ways as an argument changes, φ has a kink, and the status
    says so (Fiacco, 1976, Sensitivity analysis for nonlinear programming).
    """

    objective: Callable[..., Tensor]
    strong_convexity: float | None = None
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    bounds: Any = None
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None
    tasks: bool = False
    symmetric = True

    def __post_init__(self) -> None:
        check_callable("argmin", "objective", self.objective)
        check_model("argmin", self.model)
        mu = self.strong_convexity
        good = mu is None or (is_number(mu) and 0 < mu < math.inf)
        require(self, "strong_convexity", good, "None or a number > 0")
        require_flag(self, "tasks")
        if self.constraints and self.model is not None:
            raise InvalidArgumentError("argmin: model does not go with constraints")
        if self.constraints and self.tasks:
            raise InvalidArgumentError("argmin: tasks does not go with constraints")

    @functools.cached_property
    def constraints(self) -> Constraints:
        """Those that were given."""
        return Constraints(self.bounds, self.equality, self.inequality)

    @property
    def definite(self) -> bool:  # type: ignore[override]
        return not self.constraints.rows

    @property
    def differentiable_twice(self) -> bool:  # type: ignore[override]
        return not self.constraints

    def strong_convexity_with(self, curvature: Curvature) -> float | None:
        # it is the objective's: not that of its Gauss-Newton part, or of a system with multipliers
        known = self.definite and curvature != "gauss_newton"
        return self.strong_convexity if known else None

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return ("auto", "hessian") if self.constraints else curvatures(self.model)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        function = composed(self.objective, self.model, call.args, call.kwargs)

        def objective(phi: Any) -> Tensor:
            return total("argmin: objective", function(phi)[0], tasks_of(self, phi))

        return objective, self.constraints.for_minimizer(call.args, call.kwargs)

    def check_call(self, call: Call) -> None:
        self.constraints.check(call.args, call.kwargs)

    def held(self, call: Call) -> Any:
        return (call.args, call.kwargs) if self.constraints else ()  # bounds that are not active

    def for_tasks(self) -> Condition | None:
        if self.tasks:
            return None
        objective = batched(self.objective, "argmin: objective")
        return _Stacked(
            objective,
            self.strong_convexity,
            model=batched_model(self.model),
            bounds=self.bounds,
            equality=self.equality,
            inequality=self.inequality,
            tasks=True,
        )

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        returned, outputs = composed(self.objective, self.model, call.args, call.kwargs)(phi)
        tasks = tasks_of(self, phi)
        value = total("argmin: objective", returned, tasks)
        objective = Objective(value, variables, outputs=outputs, again=again, tasks=tasks)
        if not self.constraints:
            return Snapshot((value,), functools.partial(linearize, objective), objective)
        check_distinct("argmin", phi, variables)
        found = self.constraints.at(objective, phi, call.args, call.kwargs)
        return Snapshot(
            found.outputs,
            lambda _: found.linearize(),
            objective,
            found.apart,
            found.multipliers,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stacked(argmin):
    """A batch made of single problems under constraints."""

    def __post_init__(self) -> None:
        """What is checked has been checked."""

    @functools.cached_property
    def constraints(self) -> Constraints:
        return ConstraintsOfTasks(self.bounds, self.equality, self.inequality)
