"""What minimisers that walk downhill have in common: when to stop, and what is then returned."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._options import require_count, require_fraction, require_tolerance
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.pytree import Tensors, length, norm
from implicit_grad._warnings import tell
from implicit_grad.solvers._objective import ObjectiveFunction, Point, moved

# A gradient this many times eps·‖∇²objective‖·‖φ‖ is what rounding leaves of one that is zero.
_ROUNDING = 50.0


class _Reached(Exception):
    """The gradient is as small as was asked for. Passes through other people's optimizers."""

    def __init__(self, phi: Tensors) -> None:
        self.phi = phi


class Watch:
    """Evaluates the objective in one run, and ends the run where the gradient is small enough."""

    def __init__(self, objective: ObjectiveFunction, tol: float | None, rtol: float | None) -> None:
        self.objective, self._tol, self._rtol = objective, tol, rtol
        self._target: float | None = None
        # without a tolerance not even a zero gradient ends the run: momentum may go on
        self._watched = tol is not None or rtol is not None
        self._start = norm(objective.start) if self._watched else 0.0  # it may be overwritten
        self._seen_at = -1  # the steps that were taken when it last looked
        self._why: str | None = None

    def at(self, phi: Tensors, step: int) -> Point:
        """Value and gradient before a step."""
        return self._seen(self.objective.at(phi), step)

    def curved_at(self, phi: Tensors, step: int) -> tuple[Point, Linearization]:
        """Value and gradient before a step, and the means for products with the Hessian."""
        here, around = self.objective.curved_at(phi)
        return self._seen(here, step), around

    def stuck(self, why: str) -> None:
        """The run ends before its tolerance, and not for want of steps."""
        self._why = why

    def missed(self, phi: Tensors, more: str) -> str | None:
        """A sentence on the tolerance, if the last iterate does not meet it; `more` is a remedy.

        A gradient at rounding level meets any tolerance: no step makes it smaller.
        """
        taken = self._seen_at + (self._why is None)
        try:
            here = self.at(phi, taken)
        except _Reached:
            return None
        if here.norm <= self._rounding(here):
            return None
        steps = f"{taken} step{'s' * (taken != 1)}"
        return (
            f"{self.objective.name}: {self._asked()} was asked for and is not reached: after "
            f"{steps} the gradient's norm is {here.norm:.2g}. What phi lacks to a solution, "
            f"its implicit gradient lacks as well. {self._why or more}"
        )

    def _asked(self) -> str:
        options = (("tol", self._tol), ("rtol", self._rtol))
        given = " or ".join(f"{name}={value:g}" for name, value in options if value is not None)
        return given if self._rtol is None else f"{given} (a norm of {self._target:.2g})"

    def _rounding(self, here: Point) -> float:
        """The norm that rounding may leave of a gradient which is zero, by its change nearby."""
        size = length(here.phi) + float(self._start)
        eps = max((torch.finfo(p.dtype).eps for p in here.phi), default=0.0)
        step = eps ** (1 / 3) * size / here.norm
        if not step:
            return 0.0
        ahead = self.objective.at(moved(here.phi, here.slope, step)).slope
        change = length(moved(ahead, here.slope, -1.0)) / (step * here.norm)
        return float(_ROUNDING * eps * size * change)

    def _seen(self, here: Point, step: int) -> Point:
        self.objective.check(here, step, self._watched)
        self._seen_at = step
        if not self._watched:
            return here
        if self._target is None:
            absolute = -1.0 if self._tol is None else self._tol
            relative = -1.0 if self._rtol is None else self._rtol * here.norm
            self._target = max(absolute, relative)
        if here.norm <= self._target:
            raise _Reached(here.phi)
        return here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent(abc.ABC):
    """Stops when ‖∇objective‖₂ ≤ tol, or ≤ rtol · ‖∇objective(init)‖₂, or after enough steps."""

    tol: float | None = None
    rtol: float | None = None
    more: ClassVar[str] = "Allow more steps (maxiter)"  # what to do if they do not suffice

    def __post_init__(self) -> None:
        require_tolerance(self, "tol")
        require_fraction(self, "rtol")

    @property
    def has_tolerance(self) -> bool:
        """Whether it ends where the gradient is small, and not only after a number of steps."""
        return self.tol is not None or self.rtol is not None

    def minimize(self, objective: Callable[[Any], Tensor], init: Any) -> Any:
        """Descend from init, a tensor, a module or a container of them; phi has its form."""
        with torch.inference_mode(False), torch.no_grad():
            seen = ObjectiveFunction(self, objective, init)
            watch = Watch(seen, self.tol, self.rtol)
            try:
                phi = self._descend(watch, seen.start)
            except _Reached as reached:
                return seen.result(reached.phi)
            found = seen.result(phi)
            if self.has_tolerance and (missed := watch.missed(phi, self.more)):
                tell(missed, anchor="solver-missed", of=type(self).__name__)
            return found

    def training(self, phi: Tensors) -> EarlyStopped | None:
        """What a run to φ was, if that is known: so many steps, and no tolerance to end them."""
        return None

    @abc.abstractmethod
    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        """The last iterate; `start` may be overwritten."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise(Descent):
    """A descent whose steps cost about one gradient each."""

    steps: int | None = None
    more: ClassVar[str] = "Allow more steps, or choose a longer lr or a faster minimiser"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            require_count(self, "steps", 0)
        elif self.tol is None and self.rtol is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}: give steps, tol or both (rtol stands for tol as well)"
            )

    @property
    def counts_steps(self) -> bool:
        """Whether a number of steps is all that ends a run."""
        return self.steps is not None and not self.has_tolerance

    @property
    def most_steps(self) -> int:
        """The steps to take if no tolerance is reached before."""
        return 10_000 if self.steps is None else self.steps
