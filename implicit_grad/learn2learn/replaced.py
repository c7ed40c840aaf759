"""Weights that were put into a learner after it was cloned: which of them it can adapt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from implicit_grad._conditions.lam import LowRank
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._torch.modules import names_in
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import is_wrapped
from implicit_grad.learn2learn.fast_weights import Weights

_CLONE = "learner = learner.clone()"


def check_assigned(learner: Any) -> None:
    """Raise if something that the model has was assigned to the learner, which has no use for it.

    learn2learn's MAML leaves it aside without a word.
    """
    for name in names_in(learner):
        if name not in ("module", "lam") and hasattr(learner.module, name):
            raise InvalidArgumentError(
                f"adapt: {name} was assigned to the learner, whose model computes with its own: "
                f"assign it to the model, learner.module.{name} = ..."
            )


def check_moved(weights: Weights) -> None:
    """Raise if the weights have been converted since they were made, in place."""
    if _kinds(weights.current) == _kinds(weights.theta):
        return
    for name, now, then in zip(weights.names, weights.current, weights.theta, strict=True):
        _check_kind(name, now, then)


def check_replaced(weights: Weights, module: nn.Module, past_call: bool) -> bool:
    """Whether the module's present weights, others than these, are to be taken in.

    Not those that torch.func lends it. Raises if they cannot be adapted; `past_call`: with a loss
    that was computed before they were seen.
    """
    present = weights.named_in(module)
    if any(is_wrapped(t) for _, t in present):
        return False
    own = {id(t) for t in weights.current}
    new = {n: t for n, t in present if id(t) not in own and weights.train(t)}
    _check_new(weights, new)
    if past_call:
        changed = ", ".join(new) or "others"
        raise InvalidArgumentError(
            f"adapt: {changed} were put into the learner (or taken out of it) after it was cloned, "
            "and the loss does not come from a call of the learner since. Compute it by "
            f"learner(...), not by its layers; or pass a function; or begin with {_CLONE}"
        )
    return True


def check_names(weights: Weights, module: nn.Module, lam: Any) -> None:
    """Raise if a λ that goes by the order of the parameters would meet others than it was for."""
    names = [name for name, tensor in weights.named_in(module) if weights.train(tensor)]
    for_each = callable(lam) or isinstance(lam, (Sequence, nn.ParameterList, LowRank))
    if for_each and names != weights.names:
        raise InvalidArgumentError(
            f"imaml: lam has an entry for each of the parameters {weights.names}, and the learner "
            f"has {names} now; lam must be one number, or the change be made before imaml"
        )


def _check_new(weights: Weights, new: dict[str, Tensor]) -> None:
    theta = {id(t) for t in weights.theta}
    if new and weights.n_tasks is not None:
        raise InvalidArgumentError(
            f"adapt: {', '.join(new)} were put into a learner for {weights.n_tasks} tasks, each "
            "with weights of its own: put them into the model before clone(tasks=...)"
        )
    before = dict(zip(weights.names, weights.theta, strict=True))
    for name, tensor in new.items():
        if id(tensor) in theta:
            raise InvalidArgumentError(
                f"adapt: the model's own {name} was put into its learner, whose steps would "
                "overwrite it; put a copy there, or begin with a new clone()"
            )
        if name in before:
            _check_kind(name, tensor, before[name])


def _kinds(tensors: Tensors) -> list[Any]:
    return [t.dtype for t in tensors] + [t.device for t in tensors]


def _check_kind(name: str, now: Tensor, then: Tensor) -> None:
    if now.dtype != then.dtype or now.device != then.device:
        raise InvalidArgumentError(
            f"adapt: {name} is {now.dtype} on {now.device} now, and was {then.dtype} on "
            f"{then.device} when the learner was cloned. Convert the model, then clone it"
        )
