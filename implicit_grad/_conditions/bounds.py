"""Bounds on φ in any of their forms, one for each tensor of φ."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._torch import pytree
from implicit_grad._torch.transforms import is_transformed

Limits = list[Tensor | None]


def as_pair(name: str, bounds: Any) -> tuple[Any, Any]:
    """(lower, upper), either of which may be None."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InvalidArgumentError(
            f"{name}: bounds must be a pair (lower, upper), got {describe(bounds)}"
        )
    if any(map(_is_function, bounds)):
        raise InvalidArgumentError(
            f"{name}: a bound is no function, but argmin's bounds may be one, of the arguments, "
            "which returns the pair: bounds=lambda *args: (lower, upper)"
        )
    return bounds[0], bounds[1]


def _is_function(bound: Any) -> bool:
    """Whether it can be called and holds nothing, as modules in the form of φ do."""
    return callable(bound) and any(leaf is bound for leaf in pytree.leaves(bound))


def spread(name: str, bounds: Any, phi: Any) -> tuple[Limits, Limits]:
    """For each distinct tensor of φ its lower and its upper bound; None where there is none."""
    lower, upper = as_pair(name, bounds)
    places = _places(phi)
    below = _side(name, "lower", lower, phi, places)
    above = _side(name, "upper", upper, phi, places)
    check_order(name, phi, below, above)
    return below, above


def check_pair(name: str, bounds: Any) -> None:
    """Raise where bounds are wrong whatever form φ will have; `spread` checks the rest."""
    lower, upper = as_pair(name, bounds)
    (below, form), (above, other) = _numbers(lower), _numbers(upper)
    if form != other and len(below) == 1:
        below *= len(above)
    elif form != other and len(above) == 1:
        above *= len(below)
    elif form != other:
        return
    for low, up in zip(below, above, strict=True):
        _check_order(name, "phi", low, up)


def check_order(name: str, phi: Any, lower: Limits, upper: Limits) -> None:
    """Raise if one of the bounds is NaN, or a lower one is greater than the upper."""
    for label, low, up in zip(_places(phi).values(), lower, upper, strict=True):
        _check_order(name, label, low, up)


def _places(phi: Any) -> dict[int, str]:
    """The distinct tensors' places among φ's leaves, with their names."""
    leaves = optree.tree_leaves(phi, none_is_leaf=True, namespace=pytree.NAMESPACE)
    names = optree.tree_accessors(phi, none_is_leaf=True, namespace=pytree.NAMESPACE)
    first = {id(t): i for i, t in reversed(list(enumerate(leaves))) if torch.is_tensor(t)}
    return {i: names[i].codify("phi") for i in sorted(first.values())}


def _side(name: str, side: str, bound: Any, phi: Any, places: dict[int, str]) -> Limits:
    leaves = optree.tree_leaves(phi, none_is_leaf=True, namespace=pytree.NAMESPACE)
    try:
        # None is a leaf: no bound for what it stands for
        spread = optree.broadcast_prefix(bound, phi, none_is_leaf=True, namespace=pytree.NAMESPACE)
        return [_like(spread[i], leaves[i]) for i in places]
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"{name}: the {side} bound must be None, a number, a tensor, or a container in the "
            f"form of phi: {error}"
        ) from None


def _like(bound: Any, p: Tensor) -> Tensor | None:
    if bound is None:
        return None
    if p.is_complex():
        raise TypeError("complex numbers have no order; bound what is real of them by inequality")
    return torch.as_tensor(bound, dtype=p.dtype, device=p.device).expand_as(p)


def _numbers(bound: Any) -> tuple[Limits, Any]:
    """The leaves of a bound, None where they are no numbers, and its form."""

    def number(leaf: Any) -> Tensor | None:
        try:
            return None if leaf is None else torch.as_tensor(leaf)
        except (ValueError, TypeError, RuntimeError):
            return None

    leaves, form = optree.tree_flatten(bound, none_is_leaf=True, namespace=pytree.NAMESPACE)
    return [number(leaf) for leaf in leaves], form


def _check_order(name: str, label: str, low: Tensor | None, up: Tensor | None) -> None:
    """Raise if one of the bounds is NaN, or the lower is greater than the upper."""
    known = [b.detach() for b in (low, up) if b is not None]
    if not known or is_transformed(known):
        return
    try:
        wrong = ~(known[0] <= known[-1])  # also where one is NaN
    except RuntimeError:  # shapes that do not go together without φ
        return
    if bool(wrong.any()):
        first, last = (float(b.expand_as(wrong)[wrong][0]) for b in (known[0], known[-1]))
        seen = f"from {first:g} to {last:g}" if len(known) == 2 else f"{first:g}"
        raise InvalidArgumentError(
            f"{name}: bounds must not be NaN, and no lower bound greater than the upper, as for "
            f"{int(wrong.sum())} of {wrong.numel()} elements of {label} (for instance {seen})"
        )
