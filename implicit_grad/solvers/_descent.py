"""What minimisers that walk downhill have in common: when to stop, and what is then returned."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import is_number, require, require_count, require_tolerance
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.pytree import Tensors
from implicit_grad.solvers._objective import Objective, Point


class _Reached(Exception):
    """The gradient is as small as was asked for. Passes through other people's optimizers."""

    def __init__(self, phi: Tensors) -> None:
        self.phi = phi


class Watch:
    """Evaluates the objective in one run, and ends the run where the gradient is small enough."""

    def __init__(self, objective: Objective, tol: float | None, rtol: float | None) -> None:
        self.objective, self._tol, self._rtol = objective, tol, rtol
        self._target: float | None = None

    def at(self, phi: Tensors, step: int) -> Point:
        """Value and gradient before a step."""
        return self._seen(self.objective.at(phi), step)

    def curved_at(self, phi: Tensors, step: int) -> tuple[Point, Linearization]:
        """The same, with the means for products with the Hessian."""
        here, around = self.objective.curved_at(phi)
        return self._seen(here, step), around

    def _seen(self, here: Point, step: int) -> Point:
        # without a tolerance not even a zero gradient ends the run: momentum may go on
        watched = self._tol is not None or self._rtol is not None
        self.objective.check(here, step, watched)
        if not watched:
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

    def __post_init__(self) -> None:
        require_tolerance(self, "tol")
        good = self.rtol is None or (is_number(self.rtol) and 0 < self.rtol < 1)
        require(self, "rtol", good, "None or a number between 0 and 1")

    @property
    def has_tolerance(self) -> bool:
        """Whether it ends where the gradient is small, and not only after a number of steps."""
        return self.tol is not None or self.rtol is not None

    def minimize(self, objective: Callable[[Any], Tensor], init: Any) -> Any:
        """Descend from init; phi has the form of init."""
        with torch.inference_mode(False), torch.no_grad():
            seen = Objective(self, objective, init)
            try:
                phi = self._descend(Watch(seen, self.tol, self.rtol), seen.start)
            except _Reached as reached:
                phi = reached.phi
            return seen.result(phi)

    @abc.abstractmethod
    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        """The last iterate; `start` may be overwritten."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise(Descent):
    """A descent whose steps cost about one gradient each."""

    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            require_count(self, "steps", 0)
        elif self.tol is None and self.rtol is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}: give steps, tol or both (rtol stands for tol as well)"
            )

    @property
    def most_steps(self) -> int:
        """The steps to take if no tolerance is reached before."""
        return 10_000 if self.steps is None else self.steps
