"""What root finders have in common: the residual as rows of numbers, steps, and when to stop."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad._conditions.base import like_phi
from implicit_grad._conditions.batching import number_of_tasks
from implicit_grad._errors import (
    InvalidArgumentError,
    InvalidSolutionError,
    describe,
)
from implicit_grad._options import (
    require_count,
    require_flag,
    require_fraction,
    require_tolerance,
)
from implicit_grad._torch import pytree
from implicit_grad._torch.products import variables
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._warnings import tell
from implicit_grad.solvers._objective import Variables

# Without a tolerance the residual is to fall by this power of the dtype's eps.
DEFAULT_POWER = 0.75
# A step this many times eps·‖φ‖ is rounding error, and so is a residual that such a step makes.
_STEP_ROUNDING, _ROUNDING = 4.0, 50.0
# The share of ‖residual‖ that a step must take off, for each share of its full length.
_SUFFICIENT = 1e-4


def refuse_modules(name: str, init: Any) -> None:
    """Raise if φ is to be a module, whose parameters would not train here."""
    if modules := pytree.modules(init):
        raise InvalidArgumentError(
            f"{name}: init must be tensors or a container of them, got {describe(modules[0])}: "
            "give dict(module.named_parameters()), and apply it by torch.func.functional_call"
        )


class Residual(Variables):
    """A user's residual as a function of rows: one for each task, or a single one."""

    def __init__(
        self, owner: object, residual: Callable[[Any], Any], init: Any, tasks: bool
    ) -> None:
        super().__init__(owner, init)
        refuse_modules(self.name, init)
        self._residual = residual
        self._tasks = number_of_tasks(self.name, self.start) if tasks else None
        self._flat = Flat(self.start, self._tasks)
        self.eps, self.first = self._flat.eps, self.rows(self.start)

    def rows(self, tensors: Tensors) -> Tensor:
        """Tensors in the form of φ as rows of numbers."""
        flat = self._flat.ravel(tensors)
        return flat if self._tasks is not None else flat[None]

    def tensors(self, rows: Tensor) -> Tensors:
        """What rows stand for."""
        return self._flat.unravel(rows if self._tasks is not None else rows[0])

    def __call__(self, x: Tensor) -> Tensor:
        """The residual's rows at those of φ; no graph is kept."""
        return self.numbers(lambda phi: self.rows(self._evaluated(phi)), self.tensors(x))

    def recorded(self, x: Tensor) -> tuple[Tensors, Tensors]:
        """φ, and the residual with its graph from there."""
        with torch.enable_grad():
            phi = variables(self.tensors(x))
            return phi, self._evaluated(phi)

    def check(self, f: Tensor, step: int, why: str) -> None:
        """Raise if a residual is not made of numbers."""
        if not bool(torch.isfinite(f).all()):
            raise InvalidSolutionError(
                f"{self.name}: at step {step} the residual holds NaN or Inf: {why}"
            )

    def rounding(self, x: Tensor, f: Tensor) -> Tensor:
        """Row by row, the norm that rounding may leave of a residual which is zero."""
        size, along = norms(x) + norms(self.first), norms(f)
        step = self.eps ** (1 / 3) * torch.where(size > 0, size, 1.0) / along
        change = norms(self(x + step[:, None] * f) - f) / (step * along)
        level: Tensor = _ROUNDING * self.eps * size * change
        return level

    def _evaluated(self, phi: Tensors) -> Tensors:
        container = self.tree.rebuild(phi)
        where, value = f"{self.name}: residual", self._residual(container)
        return like_phi(where, value, container, phi, _INIT)


_INIT = ". phi has the form of where it starts: init(*args), by default the solver's first argument"


def norms(rows: Tensor) -> Tensor:
    """‖·‖₂ of each row, in double precision."""
    sizes: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    return sizes


class Method(abc.ABC):
    """Where to go from φ, as long as one run lasts."""

    @abc.abstractmethod
    def direction(self, x: Tensor, f: Tensor) -> Tensor:
        """The full step from each row of φ, given the residual there."""

    def learn(self, step: Tensor, change: Tensor) -> None:  # noqa: B027  (some do not)
        """A step was taken, by which the residual changed."""

    def start_anew(self, x: Tensor, f: Tensor) -> bool:
        """Whether the next step will be another one, where no length of the last will do."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootFinding(abc.ABC):
    """Stops when ‖residual‖₂ ≤ tol, or ≤ rtol · ‖residual(init)‖₂; that of each task with tasks."""

    maxiter: int = 100
    tol: float | None = None
    rtol: float | None = None
    tasks: bool = False
    halvings: ClassVar[int] = 0  # of a step that does not make the residual smaller
    diverged: ClassVar[str] = "it is not defined everywhere on the way (start elsewhere)"
    more: ClassVar[str] = "Allow more steps (maxiter)"

    def __post_init__(self) -> None:
        require_count(self, "maxiter", 0)
        require_tolerance(self, "tol")
        require_fraction(self, "rtol")
        require_flag(self, "tasks")

    def find_root(self, residual: Callable[[Any], Any], init: Any) -> Any:
        """The root near init; phi has the form of init, and so has residual(phi)."""
        with torch.inference_mode(False), torch.no_grad():
            at = Residual(self, residual, init, self.tasks)
            if not at.first.numel():
                return at.result(at.start)
            x, missed = _Run(self, at).to_the_end()
            found = at.result(at.tensors(x))
            if missed is not None:
                tell(missed, anchor="solver-missed", of=type(self).__name__)
            return found

    @abc.abstractmethod
    def method(self, at: Residual, x: Tensor, f: Tensor) -> Method:
        """What chooses the steps, from the start on."""


class _Run:
    """One search; rows whose residual is small enough stay where they are."""

    def __init__(self, finder: RootFinding, at: Residual) -> None:
        self.finder, self.at = finder, at
        self.x, self.f = at.first, at(at.first)
        at.check(self.f, 0, "it is not defined at init")
        self.size = norms(self.f)
        self.target = _target(finder, at.eps, self.size)
        self.steps, self.stuck = 0, False

    def to_the_end(self) -> tuple[Tensor, str | None]:
        """φ, and a sentence on the tolerance if φ does not meet it."""
        method = self.finder.method(self.at, self.x, self.f)
        left = self.size > self.target
        while bool(left.any()) and self.steps < self.finder.maxiter:
            d = method.direction(self.x, self.f)
            length = norms(self.x) + norms(self.at.first)
            # of a direction that is not finite nothing is taken
            moving = left & (norms(d) > _STEP_ROUNDING * self.at.eps * length)
            self.stuck |= bool((left & ~moving).any())  # if that was not for rounding
            if bool(moving.any()) and not self._step(method, d, moving):
                if not method.start_anew(self.x, self.f):
                    self.stuck = True
                    break
            self.steps += 1
            left = moving & (self.size > self.target)
        return self.x, self._missed()

    def _step(self, method: Method, d: Tensor, moving: Tensor) -> bool:
        """Take the steps of the rows that are to move; False if no length will do for some."""
        share = moving.to(d.dtype)[:, None]
        d = torch.where(moving[:, None], d, 0.0)
        for trial in range(self.finder.halvings + 1):
            there = self.x + share * d
            f = self.at(there)
            size = norms(f)
            if not self.finder.halvings:
                self.at.check(f, self.steps + 1, self.finder.diverged)
                good = moving
            else:
                good = size <= (1 - _SUFFICIENT * share[:, 0]) * self.size
            if bool((good | ~moving).all()):
                break
            if trial < self.finder.halvings:
                share = torch.where(good[:, None], share, share / 2)
        taken = good & moving
        there, f = (
            torch.where(taken[:, None], new, old) for new, old in ((there, self.x), (f, self.f))
        )
        if bool(taken.any()):
            method.learn(there - self.x, f - self.f)
        self.x, self.f, self.size = there, f, torch.where(taken, size, self.size)
        return bool((taken | ~moving).all())

    def _missed(self) -> str | None:
        left = self.size > self.target
        if bool(left.any()):
            left = left & ~(self.size <= self.at.rounding(self.x, self.f))
        if not bool(left.any()):
            return None
        worst = (self.size / self.target).masked_fill(~left, 0.0).argmax()
        among = f" in {int(left.sum())} of {len(left)} tasks, at worst" if self.finder.tasks else ""
        count = f"{self.steps} step{'s' * (self.steps != 1)}"
        why = _NO_LENGTH if self.stuck else self.finder.more
        return (
            f"{self.at.name}: a residual with a norm of {float(self.target[worst]):.2g} was asked "
            f"for and is not reached: after {count} it is {float(self.size[worst]):.2g}{among}. "
            f"What phi lacks to a solution, its implicit gradient lacks as well. {why}"
        )


_NO_LENGTH = (
    "No step length makes the residual smaller: its Jacobian is singular there (there may be no "
    "root nearby: start elsewhere), it has a kink, or it is random"
)


def _target(finder: RootFinding, eps: float, first: Tensor) -> Tensor:
    """The norms that end a run, for each row."""
    rtol, tol = finder.rtol, finder.tol
    if rtol is None:
        rtol = eps**DEFAULT_POWER if tol is None else 0.0
    return (rtol * first).clamp(min=tol or 0.0)
