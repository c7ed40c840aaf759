"""The objective as minimisers see it: a function of a tuple of tensors, one variable each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import scalar
from implicit_grad._conditions.proximal_term import ProximalObjective, gradient_step
from implicit_grad._curvature.auto import AutoCurvature
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.foreach import added
from implicit_grad._torch.products import gradient, variables
from implicit_grad._torch.pytree import Tensors


class Point:
    """The objective around one φ: a loss and its gradient, and the proximal term if there is one.

    What is not asked for is not computed, and no number read from the device.
    """

    def __init__(
        self,
        phi: Tensors,
        loss: Tensor,
        of_loss: Tensors,
        proximal: ProximalObjective | None = None,
    ) -> None:
        self.phi, self.loss = phi, loss.detach()
        self._of_loss, self._proximal = of_loss, proximal

    @functools.cached_property
    def slope(self) -> Tensors:
        """The objective's gradient."""
        if self._proximal is None:
            return self._of_loss
        return self._proximal.slope(self.phi, self._of_loss)

    @functools.cached_property
    def value(self) -> float:
        """The objective."""
        return float(self._value())

    @functools.cached_property
    def norm(self) -> float:
        """‖slope‖₂ over all tensors."""
        value = self._value().reshape(()).double()
        # both numbers at once: a step waits for the device a single time
        self.value, size = torch.stack([value, pytree.norm(self.slope).to(value)]).tolist()
        return float(size) if math.isfinite(size) else pytree.length(self.slope)

    def step(self, lr: float) -> Tensors:
        """φ − lr slope; with a proximal term the step that is stable for every λ."""
        if self._proximal is None:
            return gradient_step(self.phi, self.slope, lr)
        return self._proximal.steps(self.phi, self._of_loss, lr)

    def _value(self) -> Tensor:
        if self._proximal is None:
            return self.loss
        with torch.no_grad():
            return self.loss + self._proximal.pull.term(self.phi, self._proximal.theta)


class Variables:
    """The distinct tensors of a container, copied, and the way back to the container."""

    def __init__(self, owner: object, init: Any) -> None:
        self.name = type(owner).__name__
        found, self.tree = pytree.unknowns(init)
        for tensor in found:
            if not tensor.is_floating_point():
                raise InvalidArgumentError(
                    f"{self.name}: init must hold floating-point tensors only; it holds "
                    f"{describe(tensor)}"
                )
        self.container = init
        self.start: Tensors = tuple(t.detach().clone() for t in found)
        self._takes_gradients = False  # whether the user's function does, as is found out
        self._with_modules = bool(pytree.modules(init))
        if self._with_modules:  # a run may write to their buffers
            _, self.tree = pytree.unknowns(self.tree.rebuild(self.start, owned=True))

    def at_values(self, phi: Tensors) -> Any:
        """The container with these tensors; those in modules tell that they train."""
        if self._with_modules:
            phi = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in phi)
        return self.tree.rebuild(phi)

    def numbers(self, function: Callable[[Tensors], Tensor], phi: Tensors) -> Tensor:
        """A function's value at φ alone, recorded only where it takes gradients itself."""
        if not self._takes_gradients:
            try:
                with torch.no_grad():
                    return function(phi)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._takes_gradients = True
        with torch.enable_grad():
            return function(variables(phi)).detach()

    def result(self, phi: Tensors) -> Any:
        """φ in the form of init, if it is made of numbers."""
        if not pytree.finite(phi):
            raise InvalidSolutionError(
                f"{self.name}: phi holds NaN or Inf after the last step: {_WHY}"
            )
        return self.tree.rebuild(tuple(t.detach() for t in phi), owned=True)


class ObjectiveFunction(Variables):
    """A user's objective, to be evaluated where and as often as a minimiser likes."""

    def __init__(self, owner: object, objective: Callable[[Any], Tensor], init: Any) -> None:
        super().__init__(owner, init)
        self._objective = objective
        self._proximal: ProximalObjective | None = None
        if isinstance(objective, ProximalObjective) and len(objective.theta) == len(self.start):
            self._proximal = objective  # one variable for each leaf of θ: no weights are tied

    def __call__(self, phi: Tensors) -> Tensor:
        """The objective's own output."""
        return self._evaluated(self._objective, phi)

    def value(self, phi: Tensors) -> float:
        """The objective alone, without a graph."""
        return float(self.numbers(self, phi))

    def at(self, phi: Tensors) -> Point:
        """Value and gradient; no graph is kept."""
        proximal = self._proximal
        here, loss = self._recorded(self._objective if proximal is None else proximal.loss, phi)
        with torch.no_grad():
            return Point(phi, loss, gradient(loss, here), proximal)

    def curved_at(self, phi: Tensors) -> tuple[Point, Linearization]:
        """Value and gradient, and products with the Hessian (by differences if torch has none)."""
        here, value = self._recorded(self._objective, phi)
        around = AutoCurvature(Objective(value, here, again=self))
        return Point(phi, value, tuple(g.detach() for g in around.residual)), around

    def check(self, here: Point, step: int, slope: bool = True) -> None:
        """Raise if the objective is not finite; without `slope`, only the loss is looked at."""
        seen = (here.norm, here.value) if slope else (float(here.loss),)
        if all(map(math.isfinite, seen)):
            return
        raise InvalidSolutionError(
            f"{self.name}: at step {step} the objective is {here.value:g} and its gradient's "
            f"norm {here.norm:g}: {_WHY}"
        )

    def _evaluated(self, function: Callable[[Any], Tensor], phi: Tensors) -> Tensor:
        return scalar(f"{self.name}: objective", function(self.at_values(phi)))

    def _recorded(self, function: Callable[[Any], Tensor], phi: Tensors) -> tuple[Tensors, Tensor]:
        here = tuple(p.detach().requires_grad_() for p in phi)
        with torch.enable_grad():
            return here, self._evaluated(function, here)


_WHY = (
    "a step was too long for this objective (lower lr, or choose a minimiser with a line search), "
    "or it is not defined everywhere on the way (start elsewhere)"
)


def moved(phi: Tensors, direction: Tensors, length: float) -> Tensors:
    """φ + length · direction."""
    return added(phi, direction, length)
