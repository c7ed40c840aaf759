"""Any optimizer of torch.optim as a minimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._options import require_callable
from implicit_grad._torch.pytree import Tensors
from implicit_grad.solvers._descent import Stepwise, Watch
from implicit_grad.solvers.training_time import training_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchOptim(Stepwise):
    """Steps of the optimizer that `factory` makes, on private copies of the tensors.

    Each run has an optimizer of its own, so no state (momentum) passes from one to the next. Its
    `step` is always given a closure, as LBFGS needs it. Tensors on which the objective does not
    depend have zero gradients.

    Args:
        factory: `factory(tensors)` returns a `torch.optim.Optimizer` for a list of tensors.
        scheduler: `scheduler(optimizer)` returns a scheduler of torch.optim.lr_scheduler, stepped
            once after every step; ReduceLROnPlateau is given the loss from before the step.
        steps: the most calls of `optimizer.step`; None means 10,000.
        tol: stop when ‖∇objective‖₂ is at most this before a step, in the objective's units over
            φ's.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1.

    >>> sgd = TorchOptim(factory=lambda tensors: torch.optim.SGD(tensors, lr=0.5), steps=3)
    >>> sgd.minimize(lambda phi: (phi * phi).sum() / 2, torch.tensor([8.0]))
    tensor([1.])
    """

    more: ClassVar[str] = (
        "Allow more steps; if that does not help, the optimizer is at the end of its own rules or "
        "of its line search (values that differ by rounding only): loosen tol, or take NewtonCG"
    )

    factory: Callable[[list[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_callable(self, "factory", "a function of a list of tensors")
        if self.scheduler is not None:
            require_callable(self, "scheduler", "None or a function of an optimizer")

    def training(self, phi: Tensors) -> EarlyStopped | None:
        if not self.counts_steps or not self.steps or not phi:
            return None
        optimizer = self.factory([p.detach().clone().requires_grad_() for p in phi])
        try:
            time = training_time(optimizer, self.scheduler, steps=self.steps)
        except InvalidArgumentError:  # other optimizers, and groups with times of their own
            return None
        group = optimizer.param_groups[0]
        if self.scheduler is not None or group["nesterov"] or group["dampening"]:
            return EarlyStopped(time=time) if time else None
        lr, momentum = float(group["lr"]), float(group["momentum"])
        return EarlyStopped(steps=self.steps, lr=lr, momentum=momentum) if lr else None

    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        leaves = [t.requires_grad_() for t in start]
        if not leaves:
            return start
        optimizer = self.factory(leaves)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgumentError(
                "TorchOptim: factory must return a torch.optim.Optimizer, got "
                f"{describe(optimizer)}"
            )
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        for step in range(self.most_steps):
            loss = optimizer.step(_Closure(watch, leaves, step))
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            elif scheduler is not None:
                scheduler.step()
        return tuple(leaves)


class _Closure:
    """Puts the gradient into the leaves' `.grad`, and into no other tensor's; returns the loss.

    Only the first evaluation in a step is watched: the others are at trial points.
    """

    def __init__(self, watch: Watch, leaves: list[Tensor], step: int) -> None:
        self._watch, self._leaves, self._step = watch, leaves, step
        self._first = True

    def __call__(self) -> float:
        phi = tuple(self._leaves)
        here = self._watch.at(phi, self._step) if self._first else self._watch.objective.at(phi)
        self._first = False
        for leaf, slope in zip(self._leaves, here.slope, strict=True):
            leaf.grad = slope
        return here.value
