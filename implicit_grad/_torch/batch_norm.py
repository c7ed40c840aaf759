"""Batch normalisation, differentiated twice: in fewer passes than torch's, and to any order.

A product with the Hessian of a convolutional network spends a third of its time or more in the
second derivatives of batch norm, which torch composes of some thirty passes over tensors of the
input's size, eight of them alive at once; third derivatives it refuses. With mean and 1/r the
standard deviation of each channel's n elements, x̂ = r (x − mean), and the projection

    P v = v − mean(v) − x̂ mean(v x̂),

the backward pass of y = w x̂ + b for a cotangent g is

    dx = w r P g,    dw = Σ g x̂,    db = Σ g,

and that of these, for cotangents v of dx, s of dw and t of db, with m = r Σ g P v,

    w r P v + s x̂ + t                                             with respect to g,
    m                                                             with respect to w,
    r P(s g − (w r/n) (v Σ g x̂ + g Σ v x̂)) − (w r m/n) x̂          with respect to x.

torch's own kernel for dx computes r P and the sums, so that two calls and nine passes are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Tensors

NODE = "NativeBatchNormBackward0"  # cuDNN's is another, and stays as it is
_TWICE = "NativeBatchNormBackwardBackward0"
_backward = torch.ops.aten.native_batch_norm_backward.default


def replacement(node: Any) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """A hook that gives the results of the node another graph; in training, at full precision."""
    if not node._saved_training or node._saved_input.dtype not in (torch.float32, torch.float64):
        return None
    # not the node itself, which would keep itself alive
    x, w, eps = node._saved_input, node._saved_weight, node._saved_eps
    mean, invstd = node._saved_result1, node._saved_result2

    def hook(
        results: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        (g, *_), (dx, *_) = cotangents, results
        if g is None or dx is None or g.dtype != x.dtype:
            return None
        if dx.grad_fn is None or dx.grad_fn.name() != _TWICE:
            return None  # no graph is asked for, or another hook was here before
        lean = _Backward.apply(g, x, w, mean, invstd, eps, results)
        return tuple(None if r is None else n for r, n in zip(results, lean, strict=True))

    return hook


class _Backward(torch.autograd.Function):
    """(g, x, w) ↦ (dx, dw, db), whose values are known."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        results: tuple[Tensor | None, ...],
    ) -> Tensors:
        if any(r is None for r in results):
            results = _backward(g, x, w, None, None, mean, invstd, True, eps, [True] * 3)
        ctx.eps = eps
        known = tuple(r.detach() for r in results if r is not None)
        ctx.save_for_backward(g, x, w, mean, invstd, known[1])
        return known

    @staticmethod
    def backward(ctx: Any, v: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, invstd, dw = ctx.saved_tensors
        if torch.is_grad_enabled():
            # new nodes, for g may depend on x and w, and these are partial derivatives
            g, x, w = g.view_as(g), x.view_as(x), None if w is None else w.view_as(w)
            own = tuple(a for a in (g, x, w) if a is not None and a.requires_grad)
            grads = vjp(_plainly(g, x, w, ctx.eps), own, (v, s, t))
            found = dict(zip(map(id, own), grads, strict=True))
            return *(found.get(id(a)) for a in (g, x, w)), None, None, None, None

        def projected(v: Tensor, sums: bool) -> Tensors:
            mask = [True, sums, False]
            found: Tensors = _backward(v, x, None, None, None, mean, invstd, True, ctx.eps, mask)
            return found

        def per_channel(a: Tensor) -> Tensor:
            return a.view(-1, *[1] * (x.dim() - 2))

        weight = torch.ones_like(invstd) if w is None else w
        share = weight * invstd / (x.numel() // x.shape[1])
        along, vx = projected(v, sums=True)[:2]
        m = (along * g).sum([0, *range(2, x.dim())])
        by_x = None
        if ctx.needs_input_grad[1]:
            q = v * per_channel(-share * dw)
            q.addcmul_(g, per_channel(torch.addcmul(s, share, vx, value=-1)))
            by_x = projected(q, sums=False)[0]
            slope = -share * m * invstd
            by_x.addcmul_(x, per_channel(slope)).sub_(per_channel(slope * mean))
            del q
        slope = s * invstd
        by_g = along.mul_(per_channel(weight)).addcmul_(x, per_channel(slope))
        by_g.add_(per_channel(torch.addcmul(t, slope, mean, value=-1)))
        return by_g, by_x, None if w is None else m, None, None, None, None


def _plainly(g: Tensor, x: Tensor, w: Tensor | None, eps: float) -> Tensors:
    """(dx, dw, db) in operations that torch differentiates as often as one likes."""
    dims = [0, *range(2, x.dim())]
    away = x - x.mean(dims, keepdim=True)
    r = (away.square().mean(dims, keepdim=True) + eps).rsqrt()
    normalised = away * r
    projected = g - g.mean(dims, keepdim=True)
    projected = projected - normalised * (g * normalised).mean(dims, keepdim=True)
    scale = r if w is None else r * w.view(-1, *[1] * (x.dim() - 2))
    return scale * projected, (g * normalised).sum(dims), g.sum(dims)
