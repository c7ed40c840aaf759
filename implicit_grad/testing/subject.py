"""What is checked: a solver at its arguments, as a black box and as autograd sees it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_grad._conditions.base import Call, Condition
from implicit_grad._errors import ImplicitGradWarning, InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._theorem.report import Monitor, Report
from implicit_grad._torch import pytree
from implicit_grad._torch.captured import captured_tensors
from implicit_grad._torch.pytree import Tensors
from implicit_grad._wrapper.evaluation import phi_replaces_first
from implicit_grad._wrapper.implicit_solver import ImplicitSolver

FAILURES = (ArithmeticError, ValueError, RuntimeError)  # what a solver may do far from its point
Kind = Literal["argument", "parameter", "captured"]


@dataclasses.dataclass(frozen=True)
class Variable:
    """A tensor to differentiate by: where it comes from, and what to call it."""

    name: str
    kind: Kind
    tensor: Tensor
    slot: int = -1  # among the distinct tensors of the arguments

    @property
    def size(self) -> float:
        """‖a‖₂, and 1 for zeros: the unit of steps."""
        return float(self.tensor.detach().double().norm()) or 1.0


class Subject:
    """A solver with its arguments, and all tensors that its φ may have a gradient for.

    Of the arguments these are the floating-point tensors that require grad, or all of them if none
    does, but for those of a module that training starts from; further the condition's own
    parameters, and what the functions involved capture.
    """

    def __init__(
        self,
        solve: Callable[..., Any],
        args: Sequence[Any],
        outer: Callable[[Any], Tensor] | None,
        condition: Condition | None,
    ) -> None:
        self.monitor = Monitor()
        self.original = solve
        self.linear_solver: LinearSolver | None = None
        self.solver: object = solve
        if isinstance(solve, ImplicitSolver):
            setup = solve.setup
            condition = setup.condition if condition is None else condition
            self.linear_solver, self.solver = setup.linear_solver, solve.solver
            reporting = dataclasses.replace(
                setup.reporting, monitor=self.monitor, on_failure="ignore"
            )
            solve = copy.copy(solve)
            setup = setup.without_trace()
            solve.setup = dataclasses.replace(setup, reporting=reporting)
        self.solve, self.condition, self._outer = solve, condition, outer
        self._weights: list[Tensor] | None = None
        leaves, self._tree = pytree.flatten(tuple(args))
        start = self._start(leaves, args)
        floating = [t.is_floating_point() and id(t) not in start for t in leaves]
        wanted = [f and t.requires_grad for f, t in zip(floating, leaves, strict=True)]
        if not any(wanted):
            wanted = floating
        self._leaves = tuple(
            _leaf(t) if w else t if id(t) in start else t.detach()
            for t, w in zip(leaves, wanted, strict=True)
        )
        names = self._names(args)
        self.variables = [
            Variable(names[slot], "argument", t, slot)
            for slot, (t, w) in enumerate(zip(self._leaves, wanted, strict=True))
            if w
        ]
        self.variables += self._captured()
        if not self.variables:
            raise InvalidArgumentError(
                "check_implicit: there is no floating-point tensor among the arguments to "
                "differentiate by"
            )

    def _start(self, leaves: Sequence[Tensor], args: Sequence[Any]) -> set[int]:
        """The identities of tensors where training starts: those of a module that φ replaces.

        φ does not depend on them by the condition, which is not handed them; and what an unfinished
        training keeps of them is small and noisy. That it is unfinished, other gradients show.
        """
        modules = pytree.modules(args[:1])
        if not modules or self.condition is None or not isinstance(self.solve, ImplicitSolver):
            return set()
        if self.linear_solver is not None and self.linear_solver.keeps_start:
            return set()
        start = {id(t) for t in pytree.leaves(modules)}
        self._leaves = tuple(leaves)
        if all(id(t) in start or not t.is_floating_point() for t in leaves):
            return set()
        phi = self.phi()
        return start if phi_replaces_first(self.condition, phi, Call(tuple(args), {})) else set()

    def _names(self, args: Sequence[Any]) -> list[str]:
        """What to call the distinct tensors: by the solver's parameters, where it tells."""
        labels = [f"args[{i}]" for i in range(len(args))]
        with contextlib.suppress(TypeError, ValueError):
            positional = (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
            parameters = inspect.signature(self.original).parameters.values()
            known = [p.name for p in parameters if p.kind in positional]
            labels[: len(known)] = known[: len(labels)]
        every = [n for a, label in zip(args, labels, strict=True) for n in pytree.names(a, label)]
        found: dict[int, str] = {}
        for name, slot in zip(every, self._tree.slots, strict=True):
            if slot is not None:
                found.setdefault(slot, name)
        return [found[slot] for slot in range(len(self._leaves))]

    def _captured(self) -> list[Variable]:
        """The condition's own tensors and what functions hold, where these require grad."""
        own = {id(t) for t in self._leaves}
        found: list[Variable] = []
        if self.condition is not None:
            parameters = self.condition.parameters
            names = pytree.names(parameters, "lam")
            for name, leaf in zip(names, pytree.leaves(parameters), strict=True):
                if torch.is_tensor(leaf) and leaf.requires_grad and leaf.is_leaf:
                    found.append(Variable(name, "parameter", leaf))
        self.held = captured_tensors(self.original, self.condition)
        for name, tensor in self.held:
            if tensor.requires_grad and tensor.is_leaf and tensor.is_floating_point():
                found.append(Variable(name, "captured", tensor))
        distinct = {id(v.tensor): v for v in reversed(found) if id(v.tensor) not in own}
        return list(reversed(distinct.values()))

    @property
    def targets(self) -> Tensors:
        """The variables' tensors."""
        return tuple(v.tensor for v in self.variables)

    def targets_in(self, args: Sequence[Any]) -> Tensors:
        """The variables' tensors in arguments that `shifted` made."""
        leaves, _ = pytree.flatten(tuple(args))
        return tuple(v.tensor if v.slot < 0 else leaves[v.slot] for v in self.variables)

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments, with the tensors that are differentiated by."""
        return tuple(self._tree.rebuild(self._leaves))

    @contextlib.contextmanager
    def shifted(self, shift: dict[int, Tensor]) -> Iterator[tuple[Any, ...]]:
        """The arguments with some variables moved; captured ones are moved where they are."""
        leaves, before = list(self._leaves), []
        for index, step in shift.items():
            variable = self.variables[index]
            moved = variable.tensor.detach() + step.to(variable.tensor)
            if variable.slot >= 0:
                leaves[variable.slot] = moved.requires_grad_()
            else:
                before.append((variable.tensor, variable.tensor.data))
                variable.tensor.data = moved
        try:
            yield tuple(self._tree.rebuild(leaves))
        finally:
            for tensor, data in before:
                tensor.data = data

    def phi(self, shift: dict[int, Tensor] | None = None) -> Any:
        """The solver's φ, detached."""
        with self.shifted(shift or {}) as args:
            # ours runs its solver with gradients on by itself, and need not record F here
            with torch.set_grad_enabled(not isinstance(self.solve, ImplicitSolver)):
                phi = self.solve(*args)
            leaves, tree = pytree.flatten(phi)
            return tree.rebuild([t.detach() for t in leaves], owned=True)

    def value(self, shift: dict[int, Tensor] | None = None) -> float:
        """The outer loss at the solver's φ."""
        with torch.no_grad():
            return float(self.outer(self.phi(shift)))

    def outer(self, phi: Any) -> Tensor:
        """The outer loss: the user's, or fixed random weights times φ."""
        if self._outer is not None:
            value = self._outer(phi)
            if not torch.is_tensor(value) or value.numel() != 1:
                raise InvalidArgumentError(
                    f"check_implicit: outer must return a scalar tensor, got {describe(value)}"
                )
            return value
        leaves, _ = pytree.unknowns(phi)
        if self._weights is None:
            random = torch.Generator().manual_seed(0)
            self._weights = [
                torch.randn(t.shape, dtype=torch.float64, generator=random).to(t.device)
                for t in leaves
            ]
        terms = [(t.double() * w).sum() for t, w in zip(leaves, self._weights, strict=True)]
        return torch.stack(terms).sum()

    def cotangent(self, phi: Any) -> Tensors:
        """v = ∂(outer loss)/∂φ at a φ."""
        leaves, tree = pytree.unknowns(phi)
        with torch.enable_grad():
            at = [t.detach().requires_grad_() for t in leaves]
            value = self.outer(tree.rebuild(at))
        found = torch.autograd.grad(value, at, allow_unused=True)
        return tuple(
            torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)
        )

    def gradients(
        self,
        solve: Callable[..., Any] | None = None,
        between: Callable[[], object] | None = None,
    ) -> list[Tensor | None]:
        """The outer loss's gradients as autograd has them, in float64; None where it has none.

        Through another solver, if one is given; `between` runs between forward and backward.
        """
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitGradWarning)
            value = self.outer((solve or self.solve)(*self.args))
            if between is not None:
                between()
            if not value.requires_grad:
                return [None for _ in self.variables]
            found = torch.autograd.grad(value, self.targets, allow_unused=True)
        return [None if g is None else g.detach().double().flatten() for g in found]

    @property
    def elsewhere(self) -> dict[int, Tensor]:
        """A shift of all variables by a few percent."""
        random = torch.Generator().manual_seed(1)
        return {
            i: 0.05 * v.size * unit_direction(v.tensor, random)
            for i, v in enumerate(self.variables)
        }

    def visit(self) -> None:
        """Call the solver elsewhere, forward and backward, for what it may keep of the call."""
        with contextlib.suppress(*FAILURES), self.shifted(self.elsewhere) as args:
            with torch.enable_grad():
                value = self.outer(self.solve(*args))
            if value.requires_grad:
                torch.autograd.grad(value, self.targets_in(args), allow_unused=True)
        self.monitor.clear()

    def reports(self) -> list[Report]:
        """What the solver's own backward solves said, since the last time."""
        found = list(self.monitor.reports)
        self.monitor.clear()
        return found


def _leaf(tensor: Tensor) -> Tensor:
    if tensor.requires_grad and tensor.is_leaf:
        return tensor
    return tensor.detach().clone().requires_grad_()


def unit_direction(like: Tensor, random: torch.Generator) -> Tensor:
    """A random direction in the space of a tensor, of norm 1, in float64."""
    vector = torch.randn(like.shape, dtype=torch.float64, generator=random)
    return vector / (vector.norm() or 1.0)
