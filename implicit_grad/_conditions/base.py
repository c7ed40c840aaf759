"""The contract of conditions: what a solution is, evaluated and linearised at a given φ."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad._conditions.processes import Processes
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._theorem.linearization import Curvature, Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.seen_calls import SeenCalls

Again = Callable[[Tensors], Tensor]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The user's function as evaluated at φ: its outputs with their graph, and F from them.

    Where data come in batches, `sample` is the condition with the first of them, and `batches` how
    many there are. `apart` tells which of many tasks cannot be linearised with the others, if there
    may be such; each task has `n_multipliers` beside φ. Under constraints, `lagrangian` makes from
    such outputs what F is the gradient of, with the multipliers of this φ.
    """

    outputs: Tensors
    linearize: Callable[[Curvature], Linearization]
    objective: Objective | None = None  # whose gradient F is made of
    sample: Condition | None = None
    batches: int | None = None
    apart: Callable[[], Tensor] | None = None
    n_multipliers: int = 0
    lagrangian: Callable[[Tensors], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a wrapped solver, and what the condition itself holds."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: Any = ()
    start: Any = None  # what φ was trained from, where that is known and no argument any more
    warm: Any = None  # where a call before this one ended, for whoever runs the solver

    def without_first(self) -> Call:
        """The call as the user's function sees it if φ takes the first argument's place."""
        return dataclasses.replace(self, args=self.args[1:], start=self.args[0])


class Condition(abc.ABC):
    """F(φ, a) = 0.

    `symmetric` says whether ∂F/∂φ is, so that CG applies where it is also `definite`: a minimum's
    is positive definite, a root's may be definite of either sign, or not at all.
    """

    symmetric: bool
    is_minimum: ClassVar[bool] = True
    must_depend_on_phi: ClassVar[bool] = True
    definite = True
    tasks = False  # φ is a batch of solutions of separate problems
    constrained = False  # φ is held by constraints, of which other φ have others
    returns_more = False  # a call returns a pair of φ and what follows from it
    processes: Processes | None = None  # those over which F is a sum, if there are several

    @property
    def parameters(self) -> Any:
        """Tensors that the condition itself holds, such as λ: arguments like the others."""
        return ()

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        """The kinds of products that there can be."""
        return ("auto",)

    def strong_convexity_with(self, curvature: Curvature) -> float | None:
        """μ in units of A's scale for that kind of products, where it is known."""
        return None

    def for_tasks(self) -> Condition | None:
        """The condition for a batch of such problems, if there is a batched linear solve for it."""
        return None

    def apart(self, call: Call) -> Any:
        """Arguments that the user's function is not handed."""
        return ()

    def seeing_outputs(self) -> Condition:
        """This condition, with the outputs of φ's modules for its model, if it can have one."""
        return self

    def check_call(self, call: Call) -> None:  # noqa: B027  (most conditions accept any call)
        """Raise if the arguments cannot work, before the solver runs."""

    def held(self, call: Call) -> Any:
        """What enters F in another way than through the user's function."""
        return call.parameters

    def template(self, call: Call) -> Any:
        """What φ has to look like, if the arguments tell; else None."""
        return None

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """What a solver is handed: phi ↦ an objective or a residual, and constraints."""
        kind = "an objective to minimise" if solver == "minimize" else "a residual to bring to 0"
        raise InvalidArgumentError(
            f"{type(self).__name__} has not {kind}: a solver with a method `minimize` goes with "
            "argmin and proximal, one with `find_root` with root and fixed_point; or pass a "
            "solver function"
        )

    def more(self, phi: Any, call: Call) -> Any:
        """What a call returns besides φ, if `returns_more`: tensors that follow from φ and call."""
        raise NotImplementedError

    @abc.abstractmethod
    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        """Evaluate at the container `phi`, whose distinct tensors are `variables`.

        `again` evaluates the objective's value elsewhere, if that may be asked for.
        """


def check_callable(condition: str, name: str, value: object) -> None:
    if not callable(value):
        raise InvalidArgumentError(
            f"{condition}: {name} must be a function of (phi, ...), got {describe(value)}"
        )
    if isinstance(value, type):
        raise InvalidArgumentError(
            f"{condition}: {name} must be a function of (phi, ...), got {describe(value)}: give "
            f"what it makes, {value.__name__}(...)"
        )


def without_aux(name: str, function: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The function, which with `has_aux` returns (value, aux), as one that returns the value."""
    if not has_aux:
        return function

    def value(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise InvalidArgumentError(
                f"{name} must return a pair (value, aux) with has_aux=True, got "
                f"{describe(returned)}"
            )
        return returned[0]

    return value


def scalar(name: str, value: object) -> Tensor:
    """The value, if it is one floating-point number in a tensor."""
    if not torch.is_tensor(value) or value.numel() != 1 or not value.is_floating_point():
        raise InvalidArgumentError(
            f"{name} must return a scalar floating-point tensor, got {describe(value)}"
        )
    return value


def like_phi(name: str, value: Any, phi: Any, variables: Tensors, hint: str = "") -> Tensors:
    """The tensors of a value in the form of φ, as reals; else an error that ends in the hint."""
    phi, value = pytree.opened(phi, value)
    phi_leaves, value_leaves = pytree.leaves(phi), pytree.leaves(value)
    check_distinct(name.split(":")[0], phi, variables)
    if pytree.structure(value) != pytree.structure(phi):
        raise InvalidArgumentError(
            f"{name} must return the form of phi, {pytree.structure(phi)}, "
            f"got {pytree.structure(value)}{hint}"
        )
    places = zip(pytree.names(phi, "phi"), value_leaves, phi_leaves, strict=True)
    found = [(label, f, p) for label, f, p in places if torch.is_tensor(p)]
    for label, f, p in found:
        if not torch.is_tensor(f) or f.shape != p.shape:
            raise InvalidArgumentError(
                f"{name}: for {label}, {describe(p)}, it returned {describe(f)}{hint}"
            )
        if f.dtype != p.dtype:
            wider = torch.promote_types(f.dtype, p.dtype)
            owner = "the solver" if wider == f.dtype else name.split(": ")[-1]
            raise InvalidArgumentError(
                f"{name}: the solver returned {label} as {describe(p)}, and {name.split(': ')[-1]} "
                f"there is {describe(f)}: {owner} has to return it as {wider}, the dtype of all"
            )
    return tuple(pytree.real(f) for _, f, _ in found)


def check_distinct(name: str, phi: Any, variables: Tensors) -> None:
    if sum(map(torch.is_tensor, pytree.leaves(phi))) != len(variables):
        raise InvalidSolutionError(
            f"{name}: phi holds one tensor more than once; return distinct tensors",
            anchor="tied-phi",
        )


def composed(
    function: Callable[..., Any], model: Callable[..., Any] | None, args: Any, kwargs: Any
) -> Callable[[Any], tuple[Any, Tensors | None]]:
    """phi ↦ function(model(phi)), and the model's outputs, none of which is behind another."""

    def evaluate(phi: Any) -> tuple[Any, Tensors | None]:
        if model is None:
            return function(phi, *args, **kwargs), None
        if model is seen:
            return _seen(function, phi, args, kwargs)
        returned = model(phi, *args, **kwargs)
        tensors, tree = pytree.flatten(returned, lambda t: torch.is_tensor(t) and t.requires_grad)
        outputs = tuple(t.view_as(t) for t in tensors)
        return function(tree.rebuild(outputs), *args, **kwargs), outputs

    return evaluate


def seen(phi: Any, *args: Any, **kwargs: Any) -> Any:
    """The model of functions of modules, whose outputs are noted when they are called."""
    return phi


def check_seen(phi: Any, name: str) -> None:
    """Raise unless there is a module whose outputs could be seen."""
    if not pytree.modules(phi):
        raise InvalidArgumentError(_NOT_SEEN.format(f"{name} is {describe(phi)} and no module"))


def unseen(model: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The model where only values are asked for."""
    return None if model is seen else model


def _seen(
    function: Callable[..., Any], phi: Any, args: Any, kwargs: Any
) -> tuple[Any, Tensors | None]:
    """The function's value, and the outputs of φ's modules that it depends on.

    A penalty on φ keeps all its curvature: the parameters that it reads are outputs as well.
    """
    check_seen(phi, "phi, which the solver returned,")
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in pytree.flatten(phi)[0]):
        return function(phi, *args, **kwargs), ()
    calls = SeenCalls(phi)
    value = function(calls.container, *args, **kwargs)
    if not torch.is_tensor(value) or not value.requires_grad:
        return value, ()
    try:
        outputs, read = calls.behind(value)
    except ValueError as reason:
        raise InvalidSolutionError(_NOT_SEEN.format(f"the function of phi {reason}")) from None
    if not outputs:
        raise InvalidSolutionError(
            _NOT_SEEN.format(
                "the function of phi does not depend on the output of a call of phi's module, "
                "phi(x), or of a part of it"
            )
        )
    return value, (*outputs, *read)


_NOT_SEEN = (
    'curvature="gauss_newton" has to know where the model ends and the loss begins: {}. Pass the '
    "condition model=model, with loss(model(phi, *args), *args); or let phi be a module, and the "
    'loss a function of what its call returns; or use curvature="hessian"'
)


def curvatures(model: Any) -> tuple[Curvature, ...]:
    every: tuple[Curvature, ...] = ("auto", "hessian", "finite_difference")
    return every if model is None else (*every, "gauss_newton")


def check_model(condition: str, model: object) -> None:
    if model is not None:
        check_callable(condition, "model", model)
