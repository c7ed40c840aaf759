"""Which learners `imaml` takes: a MAML, and subclasses that lose nothing by it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import is_number

_FIELDS = ("module", "lr", "first_order", "allow_unused", "allow_nograd", "clone", "adapt")
# what imaml does in its own way, so that a subclass's own would not be called
_REPLACED = ("adapt", "clone", "parameters", "named_parameters")
_INSTEAD = (
    'What takes the place of learned step lengths is lam=ig.LearnedLam(model, per="element"), a '
    "learned pull towards theta for each weight: imaml(l2l.algorithms.MAML(model, lr=0.5), lam=...)"
)


def check_maml(maml: Any) -> None:
    """Raise unless it is a MAML of which imaml leaves nothing out."""
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
    if not isinstance(maml, nn.Module) or not all(hasattr(maml, name) for name in _FIELDS):
        raise InvalidArgumentError(
            "imaml: the first argument must be a learn2learn.algorithms.MAML, got "
            f"{describe(maml)}. Wrap your model first: imaml(l2l.algorithms.MAML(model, lr=0.5)); "
            'learn2learn comes with pip install "implicit-grad[learn2learn]"'
        )
    check_lr("imaml", maml.lr)


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
            f"{where}: MAML's lr must be a number, got {describe(lr)} (a schedule's number goes in "
            "as maml.lr = float(lr)); a learned step length has no implicit gradient, because the "
            f"solution does not depend on it. {_INSTEAD}"
        )
    if not 0 <= lr < math.inf:
        raise InvalidArgumentError(
            f"{where}: MAML's lr must be a finite number of at least 0, got {lr!r}; to go uphill, "
            "adapt to the negated loss"
        )


def extended(maml: nn.Module) -> nn.Module | None:
    """The learner itself if its class adds to MAML: what it adds is then to be called."""
    return None if type(maml).__name__ == "MAML" else maml


def has_own_forward(maml: nn.Module) -> bool:
    """Whether a subclass calls its model in its own way."""
    return _is_overridden(maml, "forward")


def _is_overridden(maml: nn.Module, name: str) -> bool:
    """Whether a class below the first one that is called MAML defines it."""
    for kind in type(maml).__mro__:
        if kind.__name__ == "MAML" or kind is nn.Module:
            return False
        if name in vars(kind):
            return any(base.__name__ == "MAML" for base in kind.__mro__)
    return False
