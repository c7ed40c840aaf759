"""The proximal term λ/2 ‖φ − θ‖²: the forms that λ may have, and what it adds to F and A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._tree import Tensors


def proximal_term(phi: Sequence[Tensor], theta: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor:
    """λ/2 ‖φ − θ‖²."""
    terms = [(w * (p - t) ** 2).sum() for p, t, w in zip(phi, theta, lam, strict=True)]
    return torch.stack(terms).sum() / 2


def add_proximal(
    smooth: Tensors,
    phi: Sequence[Tensor],
    slots: Sequence[int],
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
) -> tuple[Tensors, Tensors]:
    """F = smooth + λ(φ − θ) and the diagonal λ. φ[slots[i]] is what θ[i] holds back."""
    residual: list[Tensor] = list(smooth)
    diagonal: dict[int, Tensor] = {}
    for slot, t, weight in zip(slots, theta, lam, strict=True):
        residual[slot] = residual[slot] + weight * (phi[slot] - t)
        # tied weights are pulled at by every θ that stands in their places
        diagonal[slot] = diagonal[slot] + weight if slot in diagonal else weight
    return tuple(residual), tuple(diagonal[slot] for slot in range(len(residual)))


def spread_lam(lam: Any, theta: Any, where: str) -> list[Tensor]:
    """One λ tensor for each leaf of θ; λ may be given for whole branches of θ at once."""
    theta_leaves = _tree.leaves(theta)
    for leaf in theta_leaves:
        if not (torch.is_tensor(leaf) and leaf.is_floating_point()):
            raise InvalidArgumentError(
                f"{where}: theta, the solver's first argument, must hold floating-point tensors "
                f"only; it holds {describe(leaf)}"
            )
    if not _tree.leaves(lam):
        check_lam(lam, where)
    try:
        spread = optree.broadcast_prefix(lam, theta, namespace=_tree._NAMESPACE)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{where}: lam must be a number, a tensor, or a container in the form of theta: {error}"
        ) from None
    lams: list[Tensor] = []
    made: dict[Any, Tensor] = {}
    for distinct in {id(value): value for value in spread}.values():
        check_lam(distinct, where)
    for i, (value, t) in enumerate(zip(spread, theta_leaves, strict=True)):
        if not torch.is_tensor(value):
            key = (value, t.dtype, t.device)
            value = made.setdefault(key, torch.tensor(value, dtype=t.dtype, device=t.device))
        if value.dim() > t.dim() or any(
            a not in (1, b) for a, b in zip(reversed(value.shape), reversed(t.shape), strict=False)
        ):
            raise InvalidArgumentError(
                f"{where}: lam of shape {tuple(value.shape)} does not fit "
                f"{_tree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}"
            )
        lams.append(value)
    return lams


def check_lam(lam: Any, where: str) -> None:
    """λ must be a positive finite number or a floating-point tensor of such."""
    if torch.is_tensor(lam) and lam.is_floating_point():
        good = bool((lam > 0).all()) and bool(torch.isfinite(lam).all())
        shown = "a tensor with other values" if lam.numel() != 1 else f"{lam.item():g}"
    elif isinstance(lam, (int, float)) and not isinstance(lam, bool):
        good, shown = 0 < lam < math.inf, f"{lam:g}"
    else:
        good, shown = False, describe(lam)
    if not good:
        raise InvalidArgumentError(
            f"{where}: lam must be a number or a floating-point tensor, finite and greater than 0, "
            f"got {shown}"
        )
