"""Layer normalisation, whose third derivatives torch computes without a word and wrong.

Its second derivatives are right, and stay torch's. With the mean and 1/r the standard deviation of
each row, and x̂ = r (x − mean), the backward pass of y = w x̂ + b for a cotangent g is

    dx = r P(w g),    dw = Σ g x̂,    db = Σ g,    P v = v − mean(v) − x̂ mean(v x̂),

and where a graph of its derivative is asked for, it is written in these operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Tensors

NODE = "NativeLayerNormBackward0"
_TWICE = "NativeLayerNormBackwardBackward0"
_backward = torch.ops.aten.native_layer_norm_backward.default


def replacement(node: Any) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """A hook that gives the results of the node another graph."""
    x, w, b = node._saved_input, node._saved_weight, node._saved_bias
    mean, r, shape = node._saved_result1, node._saved_result2, node._saved_normalized_shape
    if x.dtype not in (torch.float32, torch.float64):
        return None

    def hook(
        results: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        (g, *_), (dx, *_) = cotangents, results
        if g is None or dx is None or g.dtype != x.dtype:
            return None
        if dx.grad_fn is None or dx.grad_fn.name() != _TWICE:
            return None  # no graph is asked for, or another hook was here before
        ours = iter(_Backward.apply(g, x, w, b, mean, r, shape))
        ours = (next(ours), *(next(ours) if p is not None else None for p in (w, b)))
        return tuple(None if a is None else o for a, o in zip(results, ours, strict=True))

    return hook


class _Backward(torch.autograd.Function):
    """(g, x, w) ↦ (dx, dw, db), without those of w and b where there are none."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        mean: Tensor,
        r: Tensor,
        shape: list[int],
    ) -> Tensors:
        own = [None if a is None else a.detach().requires_grad_() for a in (g, x, w)]
        mask = [True, w is not None, b is not None]
        with torch.enable_grad():
            outputs = _backward(own[0], own[1], shape, mean, r, own[2], b, mask)
        outputs = tuple(o for o, there in zip(outputs, mask, strict=True) if there)
        ctx.graph, ctx.rows = (outputs, own), len(shape)
        ctx.save_for_backward(g, x, w, r)
        ctx.has_bias = b is not None
        return tuple(o.detach() for o in outputs)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        outputs, own = ctx.graph
        if torch.is_grad_enabled():
            g, x, w, r = ctx.saved_tensors
            # new nodes, for g may depend on x and w, and these are partial derivatives
            own = [None if a is None else a.view_as(a) for a in (g, x, w)]
            outputs = _plainly(own[0], own[1], own[2], r, ctx.rows, ctx.has_bias)
        wanted = [a for a in own if a is not None and a.requires_grad]
        found = dict(zip(map(id, wanted), vjp(outputs, wanted, v), strict=True))
        return *(found.get(id(a)) for a in own), None, None, None, None


def _plainly(
    g: Tensor, x: Tensor, w: Tensor | None, r: Tensor, normalised: int, has_bias: bool
) -> Tensors:
    """(dx, dw, db) in operations that torch differentiates as often as one likes."""
    within = list(range(x.dim() - normalised, x.dim()))
    rows = list(range(x.dim() - normalised))

    def over_rows(t: Tensor) -> Tensor:
        return t.sum(rows) if rows else t

    away = x - x.mean(within, keepdim=True)
    variance = away.square().mean(within, keepdim=True)
    eps = (r.view_as(variance).pow(-2) - variance).detach()
    r = (variance + eps).rsqrt()
    unit = away * r
    by_unit = g if w is None else g * w
    projected = by_unit - by_unit.mean(within, keepdim=True)
    dx = r * (projected - unit * (by_unit * unit).mean(within, keepdim=True))
    outputs = [dx]
    if w is not None:
        outputs.append(over_rows(g * unit))
    if has_bias:
        outputs.append(over_rows(g))
    return tuple(outputs)
