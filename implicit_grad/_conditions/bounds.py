"""Bounds on φ in any of their forms, one for each tensor of φ."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._torch import pytree


def spread(bound: Any, phi: Any) -> list[Tensor | None]:
    """One bound for each tensor of φ."""
    leaves = pytree.leaves(phi)
    if bound is None:
        return [None] * len(leaves)
    try:
        spread = optree.broadcast_prefix(bound, phi, namespace=pytree.NAMESPACE)
        return [
            torch.as_tensor(b, dtype=p.dtype, device=p.device).expand_as(p)
            for b, p in zip(spread, leaves, strict=True)
        ]
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(
            "argmin: a bound must be a number, a tensor, or a container in the form of phi: "
            f"{error}"
        ) from None
