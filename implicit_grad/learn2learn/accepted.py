"""What `imaml` takes: a model, a MAML, and subclasses of it that lose nothing by it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import is_number

_FIELDS = ("module", "lr", "first_order", "allow_unused", "allow_nograd", "clone", "adapt")
# what imaml does in its own way, so that a subclass's own would not be called
_REPLACED = ("adapt", "clone", "parameters", "named_parameters")
_INSTEAD = (
    'What takes the place of learned step lengths is lam=ig.LearnedLam(model, per="element"), a '
    "learned pull towards theta for each weight: imaml(model, lr=0.5, lam=...)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
    """A model and how it adapts; `wrapped` is the learner itself if its class adds to MAML."""

    module: nn.Module
    lr: float
    first_order: bool = False
    allow_unused: bool = False
    allow_nograd: bool = False
    wrapped: nn.Module | None = None


def accepted(module_or_maml: Any, lr: Any) -> Accepted:
    """What `imaml` is to work with, unless it would leave something out."""
    _check_nothing_is_lost(module_or_maml)
    if not isinstance(module_or_maml, nn.Module):
        raise InvalidArgumentError(
            "imaml: the first argument must be a model, an nn.Module, or a "
            f"learn2learn.algorithms.MAML, got {describe(module_or_maml)}"
        )
    if _is_maml(module_or_maml):
        return _of_maml(module_or_maml, lr)
    _check_model(module_or_maml, lr)
    return Accepted(module=module_or_maml, lr=lr)


def held_maml(module: Any) -> str | None:
    """Where a learn2learn LightningMAML or LightningANIL has its MAML; None for all else."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if not kinds & {"LightningMAML", "LightningANIL"} or not isinstance(module, nn.Module):
        return None
    return next((name for name, part in module.named_children() if _is_maml(part)), None)


def _is_maml(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _FIELDS)


def _of_maml(maml: Any, lr: Any) -> Accepted:
    if lr is not None:
        raise InvalidArgumentError(
            f"imaml: lr={lr!r} is for a model; this {type(maml).__name__} has a step length of its "
            f"own, lr={maml.lr!r}: leave lr= out, or set that of the {type(maml).__name__}"
        )
    check_lr("imaml", maml.lr)
    check_subclass(maml)
    extended = type(maml).__name__ != "MAML" or bool(_below_the_original(maml))
    return Accepted(
        module=maml.module,
        lr=maml.lr,
        first_order=maml.first_order,
        allow_unused=maml.allow_unused,
        allow_nograd=maml.allow_nograd,
        wrapped=maml if extended else None,
    )


def _check_model(model: nn.Module, lr: Any) -> None:
    """Raise unless copies of the model can adapt by steps of this length."""
    if lr is None:
        raise InvalidArgumentError(
            f"imaml: {describe(model)} is no learn2learn.algorithms.MAML, which has an lr of its "
            "own: say how long the adaptation's steps are, imaml(model, lr=0.5)"
        )
    check_lr("imaml", lr)
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise InvalidArgumentError(
            "imaml: the weights of a scripted module cannot be replaced by fast ones; pass the "
            "module that was scripted"
        )
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise InvalidArgumentError(
            "imaml: the model has lazy layers, whose weights have no shape yet; call it once first"
        )


def _check_nothing_is_lost(maml: Any) -> None:
    """Raise if it learns how it steps."""
    kinds = {kind.__name__ for kind in type(maml).__mro__}
    if "MetaSGD" in kinds and hasattr(maml, "lrs"):
        raise InvalidArgumentError(
            "imaml: MetaSGD learns its step lengths, which have no implicit gradient: the solution "
            f"of the inner problem does not depend on how it was reached. {_INSTEAD}"
        )
    if "GBML" in kinds and hasattr(maml, "transform"):
        raise InvalidArgumentError(
            "imaml: GBML learns a transform of its steps, which has no implicit gradient: the "
            f"solution of the inner problem does not depend on how it was reached. {_INSTEAD}"
        )


def check_subclass(maml: nn.Module) -> None:
    """Raise if a subclass of MAML has an adaptation or parameters of its own."""
    name = type(maml).__name__
    own = [n for n in _REPLACED if n in vars(maml) or _is_overridden(maml, n)]
    if own:
        raise InvalidArgumentError(
            f"imaml: {name} has {' and '.join(own)} of its own, which imaml would not call: it "
            "takes its own steps. Put what they do into the loss or the model, pass a minimiser "
            "as solver=..., or wrap a learn2learn.algorithms.MAML"
        )
    of_model = {id(p) for p in maml.module.parameters()}  # type: ignore[union-attr]
    others = [n for n, p in maml.named_parameters() if id(p) not in of_model]
    if others:
        raise InvalidArgumentError(
            f"imaml: {name} has parameters besides its model's ({', '.join(others)}), which imaml "
            f"would leave out. Make them a part of the model. {_INSTEAD}"
        )


def check_lr(where: str, lr: Any) -> None:
    """Raise unless the step length is a number."""
    if not is_number(lr):
        raise InvalidArgumentError(
            f"{where}: lr must be a number, got {describe(lr)} (a schedule's number goes in "
            "as maml.lr = float(lr)); a learned step length has no implicit gradient, because the "
            f"solution does not depend on it. {_INSTEAD}"
        )
    if not 0 <= lr < math.inf:
        raise InvalidArgumentError(
            f"{where}: lr must be a finite number of at least 0, got {lr!r}; to go uphill, "
            "adapt to the negated loss"
        )


def has_own_forward(maml: nn.Module) -> bool:
    """Whether a subclass calls its model in its own way."""
    return _is_overridden(maml, "forward")


def _is_overridden(maml: nn.Module, name: str) -> bool:
    """Whether a class below the original MAML defines it."""
    return any(name in vars(kind) for kind in _below_the_original(maml))


def _below_the_original(maml: nn.Module) -> tuple[type, ...]:
    """The classes that add to MAML, which may be called that as well."""
    kinds = type(maml).__mro__
    originals = [i for i, kind in enumerate(kinds) if kind.__name__ == "MAML"]
    return kinds[: originals[-1]] if originals else ()
