"""A minimum near θ: F = ∇loss + λ(φ − θ), the inner problem of iMAML."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    check_model,
    check_seen,
    composed,
    curvatures,
    seen,
    unseen,
    without_aux,
)
from implicit_grad._conditions.batching import aligned, batched, batched_model, n_tasks_of, total
from implicit_grad._conditions.lam import LowRank, check_lam, evaluated, proximal_term
from implicit_grad._conditions.loader import Batches, check_batches
from implicit_grad._conditions.processes import Processes, check_group
from implicit_grad._conditions.proximal_term import ProximalObjective, ProximalTerm
from implicit_grad._curvature.auto import linearize
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import require_flag
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class proximal(Condition):
    """φ minimises loss(φ, *args) + λ/2 ‖φ − θ‖², θ the first argument of the solver (iMAML).

    F = ∇loss(φ) + λ(φ − θ), so with (∇²loss + λ) u = v the gradients are
    dθ = λu = (I + ∇²loss/λ)⁻¹v and dλ = −(φ − θ)ᵀu (Rajeswaran et al., 2019, Meta-Learning
    with Implicit Gradients).

    Args:
        loss: `loss(phi, *args)`, the solver's arguments without θ, returns a scalar tensor. Where
            θ is a module, so is φ.
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
        batches, regularizer, keep, group: the loss is the sum over batches of
            `loss(phi, batch, *args)`, plus `regularizer(phi, *args)`: see `argmin`. `args` are
            without θ here too.
        has_aux: `loss` returns (value, aux), of which aux, which may be anything, is ignored.
    """

    loss: Callable[..., Tensor]
    lam: Any
    convex: bool = False
    _: dataclasses.KW_ONLY
    model: Callable[..., Any] | None = None
    tasks: bool = False
    batches: Iterable[Any] | None = dataclasses.field(default=None, repr=False)
    regularizer: Callable[..., Tensor] | None = None
    keep: int = 0
    group: Any = dataclasses.field(default=None, repr=False)
    has_aux: bool = False
    symmetric = True
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("proximal", "loss", self.loss)
        require_flag(self, "has_aux")
        check_model("proximal", self.model)
        require_flag(self, "convex")
        require_flag(self, "tasks")
        apart = {"tasks": self.tasks}
        check_batches("proximal", self.batches, self.regularizer, self.keep, apart)
        check_group("proximal", self.group, self.batches)
        diagonal = self.lam.diagonal if isinstance(self.lam, LowRank) else self.lam
        for leaf in () if callable(diagonal) else pytree.leaves(diagonal):
            check_lam(leaf, "proximal")

    @property
    def _loss(self) -> Callable[..., Any]:
        return without_aux("proximal: loss", self.loss, self.has_aux)

    @property
    def parameters(self) -> Any:
        return evaluated(self.lam)

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return curvatures(self.model)

    def strong_convexity_with(self, curvature: Curvature) -> float | None:
        # a loss that is convex in φ need not be so in the model's outputs, as Gauss-Newton needs
        return 1.0 if self.convex and curvature != "gauss_newton" else None

    @functools.cached_property
    def processes(self) -> Processes | None:  # type: ignore[override]
        return None if self.group is None else Processes(self.group)

    def apart(self, call: Call) -> Any:
        return call.args[0], call.parameters

    def check_call(self, call: Call) -> None:
        if not call.args:
            raise InvalidArgumentError(
                "proximal: the solver's first positional argument is theta, but it was called "
                "without positional arguments"
            )
        if self.model is seen:
            check_seen(call.args[0], "theta")
        if self.tasks and isinstance(call.parameters, LowRank):
            raise InvalidArgumentError(
                "proximal: with tasks=True, lam must not be a LowRank matrix"
            )
        self._pull(call)
        if self.processes is not None:
            self.processes.check_arguments((call.args, call.kwargs, call.parameters))

    def for_tasks(self) -> Condition | None:
        if self.tasks or self.batches is not None or self.model is seen:
            return None
        if isinstance(self.parameters, LowRank):
            return None
        loss, model = batched(self._loss, "proximal: loss"), batched_model(self.model)
        return _Stacked(loss, self.lam, self.convex, model=model, tasks=True)

    def _pull(self, call: Call) -> ProximalTerm:
        return proximal_term(call.parameters, call.args[0], "proximal")

    def held(self, call: Call) -> Any:
        return call.args[0], call.parameters

    def template(self, call: Call) -> Any:
        return call.args[0]

    def seeing_outputs(self) -> Condition:
        return self if self.model is not None else dataclasses.replace(self, model=seen)

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        if solver != "minimize":
            return super().problem_for(solver, call)
        theta, *rest = call.args
        if self.batches is not None:
            data = self._over_batches(call)
            whole = dataclasses.replace(data, model=unseen(self.model)).value
            return ProximalObjective(whole, self._pull(call), tuple(pytree.reals(theta))), {}
        evaluate = composed(self._loss, unseen(self.model), rest, call.kwargs)

        def loss(phi: Any) -> Tensor:
            return total("proximal: loss", evaluate(phi)[0], n_tasks_of(self, phi))

        return ProximalObjective(loss, self._pull(call), tuple(pytree.reals(theta))), {}

    def _over_batches(self, call: Call) -> Batches:
        assert self.batches is not None
        rest = Call(call.args[1:], call.kwargs)
        where, function = "proximal: loss", self._loss
        options = self.model, self.regularizer, self.keep
        return Batches(where, self.batches, function, *options, rest, self.processes)

    def _sample(self, function: Callable[..., Tensor], model: Any) -> Condition:
        return proximal(function, self.lam, self.convex, model=model)

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        theta, *rest = call.args
        pull = self._pull(call)
        slots = [slot for slot in pytree.flatten(phi)[1].slots if slot is not None]

        def stationarity(slope: Tensors) -> Any:
            return pull.stationarity(slope, variables, pytree.reals(theta), slots)

        if self.batches is not None:
            data = self._over_batches(call)
            return data.snapshot(phi, variables, again, stationarity, self._sample)
        returned, outputs = composed(self._loss, self.model, rest, call.kwargs)(phi)
        n_tasks = n_tasks_of(self, phi)
        value = total("proximal: loss", returned, n_tasks)
        objective = Objective(value, variables, stationarity, outputs, again, n_tasks=n_tasks)
        return Snapshot((value,), functools.partial(linearize, objective), objective)


class _Stacked(proximal):
    """A batch made of single problems: λ, an argument like the others, has tasks as well."""

    def _pull(self, call: Call) -> ProximalTerm:
        theta = call.args[0]
        return proximal_term(aligned(call.parameters, theta), theta, "proximal")
