"""λ: the forms in which it may be given, and one weight for each tensor of θ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from implicit_grad._conditions.proximal_term import ProximalTerm
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import is_number
from implicit_grad._torch import pytree
from implicit_grad._torch.transforms import is_wrapped


class LowRank(NamedTuple):
    """Λ = diag(diagonal) + U Uᵀ: a λ that also holds φ back along a few directions at once.

    Args:
        diagonal: λ > 0 in any of its other forms: a number, a tensor, or a container of them.
        factor: U, in the form of θ, each tensor with one more dimension at its end, the rank.

    >>> lam = LowRank(0.5, torch.ones(3, 1))  # for a theta of shape (3,): 0.5 I + 1 1ᵀ
    >>> proximal_term(lam, torch.zeros(3), "here").term([torch.ones(3)], [torch.zeros(3)])
    tensor(5.2500)
    """

    diagonal: Any
    factor: Any


def evaluated(lam: Any) -> Any:
    """λ, or what it returns if it is a function (a module with parameters to be learned)."""
    return lam() if callable(lam) else lam


def proximal_term(lam: Any, theta: Any, where: str) -> ProximalTerm:
    """The pull of λ on each leaf of θ; λ may be given for whole branches of θ at once."""
    check_theta(theta, where)
    if isinstance(lam, LowRank):
        weights, factors = lam
        return ProximalTerm(_weights(weights, theta, where), _factors(factors, theta, where))
    return ProximalTerm(_weights(lam, theta, where))


def check_theta(theta: Any, where: str) -> None:
    """Raise unless all leaves of θ are floating-point tensors."""
    for leaf in pytree.leaves(theta):
        if not (torch.is_tensor(leaf) and pytree.is_continuous(leaf)):
            raise InvalidArgumentError(
                f"{where}: theta, the solver's first argument, must hold floating-point tensors "
                f"only; it holds {describe(leaf)}"
            )


def _weights(lam: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    theta, lam = pytree.opened(theta, lam)
    if not pytree.leaves(lam):
        check_lam(lam, where)
    try:
        spread = optree.broadcast_prefix(lam, theta, namespace=pytree.NAMESPACE)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{where}: lam must be a number, a tensor, or a container in the form of theta: {error}"
        ) from None
    made: dict[Any, Tensor] = {}
    for distinct in {id(value): value for value in spread}.values():
        check_lam(distinct, where)

    def weight(value: Any, i: int, t: Tensor) -> Any:
        # one tensor for one λ, so that a λ for all of θ is seen to be one number
        if not torch.is_tensor(value):
            key: Any = (value, t.dtype, t.device)
            if key not in made:
                made[key] = torch.full((), value, dtype=t.dtype.to_real(), device=t.device)
            value = made[key]
        elif value.device != t.device:
            value = made.setdefault((id(value), t.device), value.to(t.device))
        if value.dim() > t.dim() or any(
            a not in (1, b) for a, b in zip(reversed(value.shape), reversed(t.shape), strict=False)
        ):
            raise InvalidArgumentError(
                f"{where}: lam of shape {tuple(value.shape)} does not fit "
                f"{pytree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}"
            )
        # for both parts of a complex number
        return value.unsqueeze(-1) if t.is_complex() and value.dim() else value

    return _for_each_leaf(weight, spread, theta)


def _factors(factor: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    theta, factor = pytree.opened(theta, factor)
    if pytree.structure(factor) != pytree.structure(theta):
        raise InvalidArgumentError(
            f"{where}: the factor of a low-rank lam must have theta's form, "
            f"{pytree.structure(theta)}, got {pytree.structure(factor)}"
        )
    ranks = {u.shape[-1] for u in pytree.leaves(factor) if torch.is_tensor(u) and u.dim()}

    def part(u: Any, i: int, t: Tensor) -> Any:
        if t.is_complex():
            raise InvalidArgumentError(
                f"{where}: a low-rank lam is for real numbers, and "
                f"{pytree.names(theta, 'theta')[i]} is complex: take it as torch.view_as_real"
            )
        good = torch.is_tensor(u) and u.is_floating_point() and u.shape[:-1] == t.shape
        if not good or u.dim() != t.dim() + 1 or len(ranks) != 1:
            raise InvalidArgumentError(
                f"{where}: the factor of a low-rank lam must have one more dimension than "
                f"{pytree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}, the same rank for "
                f"all tensors; got {describe(u)}"
            )
        if not bool(torch.isfinite(u).all()):
            raise InvalidArgumentError(f"{where}: the factor of lam holds NaN or Inf")
        return u

    return _for_each_leaf(part, pytree.leaves(factor), theta)


def _for_each_leaf(
    make: Callable[[Any, int, Tensor], Any], values: Sequence[Any], theta: Any
) -> tuple[Tensor, ...]:
    pairs = zip(values, pytree.leaves(theta), strict=True)
    return tuple(make(value, i, t) for i, (value, t) in enumerate(pairs))


def check_lam(lam: Any, where: str) -> None:
    """λ must be a positive finite number or a floating-point tensor of such."""
    if torch.is_tensor(lam) and is_wrapped(lam):
        return  # under a transform nothing is known of its values; the plain calls look at them
    if torch.is_tensor(lam) and lam.is_floating_point():
        good = bool((lam > 0).all()) and bool(torch.isfinite(lam).all())
        shown = "a tensor with other values" if lam.numel() != 1 else f"{lam.item():g}"
    elif is_number(lam):
        good, shown = 0 < lam < math.inf, f"{lam:g}"
    else:
        good, shown = False, repr(lam) if isinstance(lam, str) else describe(lam)
    if not good:
        raise InvalidArgumentError(
            f"{where}: lam must be a number or a floating-point tensor, finite and greater than 0, "
            f"got {shown}"
        )
