"""λ in the form in which an `imaml` learner holds it: nn.Module then registers what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._conditions.lam import LowRank, evaluated, proximal_term
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._torch import pytree


def registrable(lam: Any, weights: list[tuple[str, Tensor]]) -> Any:
    """λ, checked against what adapts, in a form that nn.Module registers if it is to be learned."""
    if lam is None:
        return None
    theta = tuple(t for _, t in weights)
    if callable(lam) or isinstance(lam, LowRank):
        _check_held(lam)
        proximal_term(evaluated(lam), theta, "imaml")
        return lam
    lam = _by_parameter(lam, [name for name, _ in weights])
    _check_learned(lam if isinstance(lam, tuple) else (lam,))
    proximal_term(lam, theta, "imaml")
    return _registered(lam) if isinstance(lam, tuple) else lam


def _check_held(lam: Any) -> None:
    """Raise if a matrix has tensors to be learned that no module holds."""
    held = [] if callable(lam) else pytree.leaves(lam)
    if any(torch.is_tensor(t) and t.requires_grad for t in held):
        raise InvalidArgumentError(
            "imaml: a LowRank lam that is to be learned must be a LearnedLam(model, rank=...), "
            "so that its tensors appear in parameters()"
        )


def _by_parameter(lam: Any, names: Sequence[str]) -> Any:
    """A mapping or a sequence as a tuple with an entry for each parameter; others as they are."""
    if isinstance(lam, Mapping):
        if set(lam) != set(names):
            raise InvalidArgumentError(
                f"imaml: lam must have one entry for each parameter, {list(names)}; got {list(lam)}"
            )
        return tuple(lam[name] for name in names)
    if isinstance(lam, str) or not isinstance(lam, (Sequence, nn.ParameterList)):
        return lam
    if len(lam) != len(names):
        raise InvalidArgumentError(
            f"imaml: lam must have one entry for each of the {len(names)} parameters, got "
            f"{len(lam)}"
        )
    return tuple(lam)


def _check_learned(values: Sequence[Any]) -> None:
    for value in values:
        if torch.is_tensor(value) and value.requires_grad and not isinstance(value, nn.Parameter):
            raise InvalidArgumentError(
                "imaml: a lam that is to be learned must be a torch.nn.Parameter, so that it "
                "appears in parameters()"
            )


def _registered(values: tuple[Any, ...]) -> Any:
    if not any(isinstance(value, nn.Parameter) for value in values):
        return values
    fixed = [torch.is_tensor(v) and not isinstance(v, nn.Parameter) for v in values]
    return nn.ParameterList(  # it would make a parameter to be learned of any tensor
        nn.Parameter(v, requires_grad=False) if stays else v
        for v, stays in zip(values, fixed, strict=True)
    )
