"""Weight normalisation w = g v/‖v‖, whose backward torch differentiates with ‖v‖ held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._torch.pytree import Tensors

NODE = "WeightNormInterfaceBackward0"


def replacement(node: Any) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """A hook that gives the results of the node a graph that knows how ‖v‖ depends on v."""
    v, g, dim = node._saved_v, node._saved_g, node._saved_dim
    if v.dtype != g.dtype:
        return None  # half precision on a GPU: torch computes in another one

    def hook(
        results: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled() or cotangents[0] is None:
            return None
        right = _backward(cotangents[0], v, g, dim)
        return tuple(None if r is None else x for r, x in zip(results, right, strict=True))

    return hook


def _backward(w: Tensor, v: Tensor, g: Tensor, dim: int) -> Tensors:
    """(dv, dg) for a cotangent w, in operations that torch differentiates as often as one likes."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]

    def total(x: Tensor) -> Tensor:
        return x.sum(others, keepdim=True) if others else x

    length = total(v.square()).sqrt()
    unit = v / length
    dg = total(w * unit)
    return g / length * (w - unit * dg), dg
