"""How long a training was: the t of `EarlyStopped(time=t)`, read off a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import check_value, is_integer

_OTHERS = (
    "training_time: the sum of lr / (1 - momentum) is the time of torch.optim.SGD, whose steps are "
    "along the gradient. {} is another optimizer. Adam and its like divide each element by the "
    "size of its own gradients, so that each has a time of its own, which lr and steps do not "
    "tell. Known is that training has settled where lr times steps is many times the way that phi "
    "has to go; where it has not, compare EarlyStopped(time=...) for a few times with finite "
    "differences of the whole training, or train by SGD"
)


def training_time(
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    *,
    steps: int,
    every: int = 1,
) -> float:
    """t = Σ lr/(1 − momentum), in the units of φ² over the objective's, of a training by SGD.

    Momentum adds each gradient again to all later steps, by momentum, momentum², …: 1/(1 −
    momentum) times in all, so that steps with it are about as many plain steps that much longer.
    Neither the optimizer nor its parameters are changed.

    Args:
        optimizer: a `torch.optim.SGD`, before or after the training.
        schedule: a function that makes the scheduler of an optimizer, such as
            `lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 25)`; None if lr was constant.
            It is handed an optimizer of its own.
        steps: how many steps the training took.
        every: how many of them come between two calls of the scheduler's `step`: the batches in an
            epoch, where it is called once an epoch.

    Raises:
        InvalidArgumentError: the optimizer is another one, or has no single time.

    >>> sgd = torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9)
    >>> round(training_time(sgd, steps=200), 6)
    200.0
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            "training_time: optimizer must be a torch.optim.Optimizer, got " + describe(optimizer)
        )
    if not isinstance(optimizer, torch.optim.SGD):
        raise InvalidArgumentError(_OTHERS.format(type(optimizer).__name__))
    for name, value in (("steps", steps), ("every", every)):
        good = is_integer(value, 1)
        check_value("training_time", name, value, good, "an integer of at least 1")
    if schedule is not None and not callable(schedule):
        raise InvalidArgumentError(
            "training_time: schedule must be None or a function that makes the scheduler of an "
            f"optimizer, got {describe(schedule)}"
        )
    own = _stand_in(optimizer, schedule is not None)
    return steps * _length(own) if schedule is None else _scheduled(own, schedule, steps, every)


def _stand_in(optimizer: torch.optim.SGD, scheduled: bool) -> torch.optim.SGD:
    """An optimizer of nothing, as this one was at the start."""
    groups = []
    for group in optimizer.param_groups:
        start = group.get("initial_lr", group["lr"])
        if not scheduled and start != group["lr"]:
            raise InvalidArgumentError(
                f"training_time: a scheduler has taken lr from {float(start):g} to "
                f"{float(group['lr']):g}: pass a function that makes it as schedule"
            )
        options = {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        groups.append({"params": [torch.zeros(1)], "lr": float(start), **options})
    return torch.optim.SGD(groups, lr=0.0)


def _scheduled(
    own: torch.optim.SGD, schedule: Callable[[torch.optim.Optimizer], Any], steps: int, every: int
) -> float:
    """The time of steps whose length a scheduler changes."""
    scheduler, time = schedule(own), 0.0
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InvalidArgumentError(
            "training_time: ReduceLROnPlateau goes by the losses of the training itself: sum up "
            "lr / (1 - momentum) while it runs"
        )
    for step in range(1, steps + 1):
        time += _length(own)
        own.step()
        if step % every == 0:
            scheduler.step()
    return time


def _length(optimizer: torch.optim.SGD) -> float:
    """lr/(1 − momentum) of one step, if it is the same for all parameters."""
    lengths = {
        group["lr"] * (1 - group["dampening"]) / (1 - group["momentum"])
        for group in optimizer.param_groups
    }
    if len(lengths) > 1:
        raise InvalidArgumentError(
            "training_time: the optimizer's groups of parameters take steps of different lengths, "
            f"lr / (1 - momentum) from {min(lengths):g} to {max(lengths):g}: no one time stands "
            "for all of them"
        )
    return float(lengths.pop())
