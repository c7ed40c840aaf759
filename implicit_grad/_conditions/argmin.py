"""A minimum, with or without constraints: F = ∇objective."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
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
    seen,
    unseen,
    without_aux,
)
from implicit_grad._conditions.batching import batched, batched_model, n_tasks_of, total
from implicit_grad._conditions.constraints import Constraints
from implicit_grad._conditions.constraints_batched import ConstraintsOfTasks
from implicit_grad._conditions.lagrangian import Multipliers
from implicit_grad._conditions.loader import Batches, check_batches
from implicit_grad._conditions.processes import Processes, check_group
from implicit_grad._curvature.auto import linearize
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import is_number, require, require_flag
from implicit_grad._theorem.linearization import Curvature, Stationarity
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class argmin(Condition):
    """φ minimises a scalar objective: F = ∇_φ objective(φ, *args), under constraints if given.

    Args:
        objective: `objective(phi, *args)` returns a 0-d (or one-element) tensor, twice
            differentiable around the solution. Where φ is a module that was trained from the first
            argument, it is `objective(module, *args)` without that argument.
        strong_convexity: a known μ > 0 with ∂²objective ⪰ μ·I, which turns the linear solver's
            coefficients into a bound on its error (`Report.solve_error_bound`).
        model: if given, the objective is `objective(model(phi, *args), *args)`; this form allows
            Gauss-Newton products, which keep the curvature of `objective` in the model's outputs
            and drop the model's own. (Where φ is a module, they need no `model`: its outputs are
            seen.) So for a penalty on phi, phi itself has to be an output, and
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
        batches: if given, φ minimises the sum over batches of `objective(phi, batch, *args)`, for
            data that do not fit into one graph: see below. A `model` is `model(phi, batch, *args)`.
        regularizer: with `batches`, `regularizer(phi, *args)` is added to the sum, once.
        keep: with `batches`, keep the graphs of so many batches, the first: a product through one
            takes about a third less time. The others are evaluated again in each product.
        group: with `batches`, a `torch.distributed` process group: the sum is over the batches of
            all its processes, plus the regularizer once. See below.
        multipliers: whether a call returns `(phi, multipliers)`, the second as `Multipliers(lower,
            upper, equality, inequality)` with gradients like φ's.
        has_aux: `objective` returns (value, aux), of which aux, which may be anything, is ignored.

    `batches` is anything that gives its batches each time that it is iterated over: a DataLoader, a
    list. The gradient, products with the Hessian and (∂F/∂a)ᵀu are sums over batches too; each is
    one pass, in which one batch's graph is alive at a time. An objective that averages over its
    batch is weighted by batch, not by sample. Each pass must give the same sum, up to the order of
    its terms, and is held against the first: a loader may shuffle (with `keep`, by torch's
    generators or its `generator=`, which are set back), and what it or dropout draws from torch's
    generators is the same in each pass; one that augments by other draws is refused, and so is a
    subset of the data that changes from pass to pass. One that stays is a stochastic estimate, and
    `Report.batches` says how many there were. Data of the loader get no gradient: what needs one is
    an argument. Our minimisers, handed this condition, minimise the sum. A loader whose workers are
    slow to start needs `persistent_workers=True`: each product is a pass.

    With `group` each process has its own batches, at least one, and any number of them. All make
    the same calls with the same arguments, and have the same φ: that is checked, to the bit. What
    arrives at φ in backward is averaged over the processes, as `DistributedDataParallel` averages
    gradients, so an outer loss may be that of a process's own validation data, or the same in all.
    Then all take the same steps, and get the same gradient. Each product takes one message of as
    many numbers as φ has, and one of three. Where a process fails in its part of a sum, all raise;
    where one is lost, the others do when the group's timeout is over.

    Constraints that hold with equality at φ enter the linear system with their multipliers, which
    are found from φ. They may depend on each other, as copies do or an equation written as two
    inequalities. Where one holds by chance (its multiplier is 0 in all that are right), or where
    some that depend on each other part ways as an argument changes, φ has a kink, and the status
    says so (Fiacco, 1976, Sensitivity analysis for nonlinear programming).

    >>> import implicit_grad as ig, torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> distances = ig.argmin(
    ...     lambda w, batch, lam: (w - batch).square().sum(),
    ...     batches=x.split(2),
    ...     regularizer=lambda w, lam: lam * w.square(),
    ... )
    >>> lam = torch.tensor(1.0, requires_grad=True)
    >>> w = ig.implicit(lambda lam: x.sum() / (3 + lam), distances)(lam)  # 9 / (3 + lam)
    >>> w.backward()
    >>> lam.grad
    tensor(-0.5625)
    """

    objective: Callable[..., Tensor]
    strong_convexity: float | None = None
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    bounds: Any = None
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None
    tasks: bool = False
    batches: Iterable[Any] | None = dataclasses.field(default=None, repr=False)
    regularizer: Callable[..., Tensor] | None = None
    keep: int = 0
    group: Any = dataclasses.field(default=None, repr=False)
    multipliers: bool = False
    has_aux: bool = False
    symmetric = True

    def __post_init__(self) -> None:
        check_callable("argmin", "objective", self.objective)
        require_flag(self, "has_aux")
        check_model("argmin", self.model)
        mu = self.strong_convexity
        good = mu is None or (is_number(mu) and 0 < mu < math.inf)
        require(self, "strong_convexity", good, "None or a number > 0")
        require_flag(self, "tasks")
        require_flag(self, "multipliers")
        if self.constraints and self.model is not None:
            raise InvalidArgumentError("argmin: model does not go with constraints")
        if self.constraints and self.tasks:
            raise InvalidArgumentError("argmin: tasks does not go with constraints")
        apart = {"constraints": self.constraints, "tasks": self.tasks}
        check_batches("argmin", self.batches, self.regularizer, self.keep, apart)
        check_group("argmin", self.group, self.batches)
        if self.multipliers and not self.constraints:
            raise InvalidArgumentError(
                "argmin: multipliers=True is for minima under bounds, equality or inequality"
            )

    @property
    def _objective(self) -> Callable[..., Any]:
        return without_aux("argmin: objective", self.objective, self.has_aux)

    @functools.cached_property
    def constraints(self) -> Constraints:
        """Those that were given."""
        return Constraints(self.bounds, self.equality, self.inequality)

    @property
    def definite(self) -> bool:  # type: ignore[override]
        return not self.constraints.rows

    @property
    def constrained(self) -> bool:  # type: ignore[override]
        return bool(self.constraints)

    def strong_convexity_with(self, curvature: Curvature) -> float | None:
        # it is the objective's: not that of its Gauss-Newton part, or of a system with multipliers
        known = self.definite and curvature != "gauss_newton"
        return self.strong_convexity if known else None

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return ("auto", "hessian") if self.constraints else curvatures(self.model)

    def seeing_outputs(self) -> Condition:
        known = self.model is not None or self.constraints
        return self if known else dataclasses.replace(self, model=seen)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        if self.batches is not None:
            data = self._over_batches(call)
            return dataclasses.replace(data, model=unseen(self.model)).value, {}
        function = composed(self._objective, unseen(self.model), call.args, call.kwargs)

        def objective(phi: Any) -> Tensor:
            return total("argmin: objective", function(phi)[0], n_tasks_of(self, phi))

        return objective, self.constraints.for_minimizer(call.args, call.kwargs)

    @functools.cached_property
    def processes(self) -> Processes | None:  # type: ignore[override]
        return None if self.group is None else Processes(self.group)

    def check_call(self, call: Call) -> None:
        self.constraints.check(call.args, call.kwargs)
        if self.processes is not None:
            self.processes.check_arguments((call.args, call.kwargs, call.parameters))

    def held(self, call: Call) -> Any:
        return (call.args, call.kwargs) if self.constraints else ()  # bounds that are not active

    @property
    def returns_more(self) -> bool:  # type: ignore[override]
        return self.multipliers

    def more(self, phi: Any, call: Call) -> Multipliers:
        tensors, tree = pytree.unknowns(phi)
        own = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in tensors)
        at, args, kwargs = tree.rebuild(own), call.args, call.kwargs
        value = total("argmin: objective", self._objective(at, *args, **kwargs), None)
        return self.constraints.multipliers(value, at, own, args, kwargs)

    def for_tasks(self) -> Condition | None:
        if self.tasks or self.batches is not None or self.model is seen:
            return None
        return _Stacked(
            batched(self._objective, "argmin: objective"),
            self.strong_convexity,
            model=batched_model(self.model),
            bounds=self.bounds,
            equality=self.equality,
            inequality=self.inequality,
            tasks=True,
        )

    def _over_batches(self, call: Call) -> Batches:
        assert self.batches is not None
        where, function = "argmin: objective", self._objective
        options = self.model, self.regularizer, self.keep
        return Batches(where, self.batches, function, *options, call, self.processes)

    def _sample(self, function: Callable[..., Tensor], model: Any) -> Condition:
        return argmin(function, self.strong_convexity, model=model)

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        stationarity = functools.partial(Stationarity, starts=_starts(call, phi, variables))
        if self.batches is not None:
            data = self._over_batches(call)
            return data.snapshot(phi, variables, again, stationarity, self._sample)
        returned, outputs = composed(self._objective, self.model, call.args, call.kwargs)(phi)
        n_tasks = n_tasks_of(self, phi)
        value = total("argmin: objective", returned, n_tasks)
        objective = Objective(value, variables, stationarity, outputs, again, n_tasks=n_tasks)
        if not self.constraints:
            return Snapshot((value,), functools.partial(linearize, objective), objective)
        check_distinct("argmin", phi, variables)
        found = self.constraints.at(objective, phi, call.args, call.kwargs)
        return Snapshot(
            found.outputs,
            lambda _: found.linearize(),
            objective,
            apart=found.apart,
            n_multipliers=found.n_multipliers,
            lagrangian=found.lagrangian,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stacked(argmin):
    """A batch made of single problems, which may have constraints."""

    def __post_init__(self) -> None:
        """What is checked has been checked."""

    @functools.cached_property
    def constraints(self) -> Constraints:
        return ConstraintsOfTasks(self.bounds, self.equality, self.inequality)


_Stacked.__name__ = argmin.__name__  # as messages call it


def _starts(call: Call, phi: Any, variables: Tensors) -> Tensors:
    """For each tensor of φ the one that its training started from, if that is known.

    So it is for a module. A container with all the names and shapes of φ, handed in as the first
    argument, is hardly anything else if no gradient is asked for (else decays for each parameter,
    it may be); being a guess, it only tells the way that φ went, and is no argument's own tensor.
    (A single tensor in the shape of φ may be anything.)
    """
    is_guess = call.start is None
    if is_guess and (len(variables) < 2 or not call.args):
        return ()
    starts, form = pytree.flatten(call.args[0] if is_guess else call.start)
    there, form_there = pytree.flatten(phi)
    if form.structure != form_there.structure:
        return ()
    if len(starts) != len(there) or any(s.is_complex() for s in starts):
        return ()  # a name, a number or an array is a leaf in the place of a tensor
    if not is_guess:
        return starts
    pairs = zip(starts, there, strict=True)
    alike = all(s.shape == p.shape and not s.requires_grad for s, p in pairs)
    return tuple(s.detach() for s in starts) if alike else ()
