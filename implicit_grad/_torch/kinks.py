"""Kinks, held where they were: two graphs of a function are made to take the same pieces.

A difference of gradients of a network with ReLUs sees each unit that dies or comes to life between
its two points, as a jump over a small step: in float32, and with a million units, they hide the
second derivative, which knows nothing of them. What an operation that is linear in pieces saves for
its backward pass only tells which piece it is on. So it can be lent what another graph has saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._torch.graph import walk

_SELF, _INDICES = ("self",), ("indices",)
# Of operations that are linear in pieces (or choose, like `where`): what tells the pieces.
_TELLS = {
    "ReluBackward0": ("result",),
    "LeakyReluBackward0": _SELF,
    "LeakyReluBackward1": ("result",),
    "RreluWithNoiseBackward0": _SELF,
    "RreluWithNoiseBackward1": ("result",),
    "PreluKernelBackward0": _SELF,
    "EluBackward0": _SELF,
    "EluBackward1": ("result",),
    "ThresholdBackward0": _SELF,
    "ThresholdBackward1": _SELF,
    "HardtanhBackward0": _SELF,
    "HardsigmoidBackward0": _SELF,
    "HardswishBackward0": _SELF,
    "SoftshrinkBackward0": _SELF,
    "HardshrinkBackward0": _SELF,
    "AbsBackward0": _SELF,
    "ClampBackward0": ("self", "min", "max"),
    "ClampBackward1": _SELF,
    "ClampMinBackward0": _SELF,
    "ClampMaxBackward0": _SELF,
    "MaximumBackward0": ("self", "other"),
    "MinimumBackward0": ("self", "other"),
    "FmaxBackward0": ("self", "other"),
    "FminBackward0": ("self", "other"),
    "AminmaxBackward0": ("self", "min", "max"),
    "MaxBackward0": _INDICES,
    "MinBackward0": _INDICES,
    "MaxBackward1": ("self", "result"),
    "MinBackward1": ("self", "result"),
    "AmaxBackward0": ("self", "result"),
    "AminBackward0": ("self", "result"),
    "SortBackward0": _INDICES,
    "TopkBackward0": _INDICES,
    "KthvalueBackward0": _INDICES,
    "MedianBackward0": ("self", "result"),
    "MedianBackward1": _INDICES,
    "NanmedianBackward0": ("self", "result"),
    "NanmedianBackward1": _INDICES,
    "GatherBackward0": ("index",),
    "MaxPool2DWithIndicesBackward0": ("result1",),
    "MaxPool3DWithIndicesBackward0": ("result1",),
    "AdaptiveMaxPool2DBackward0": ("result1",),
    "AdaptiveMaxPool3DBackward0": ("result1",),
    "WhereBackward0": ("condition",),
    "MaskedFillBackward0": ("mask",),
    "CummaxBackward0": _INDICES,
    "CumminBackward0": _INDICES,
    "FractionalMaxPool2DBackward0": ("result1",),
    "FractionalMaxPool3DBackward0": ("result1",),
    "ScatterReduceBackward0": ("self", "src", "result"),
    "SegmentReduceBackward0": ("data", "result"),
    "MultilabelMarginLossBackward0": _SELF,
    "MultiMarginLossBackward0": _SELF,
    "LinalgVectorNormBackward0": ("self", "result"),
    "NormBackward1": ("self", "result"),
    "DistBackward0": ("self", "other", "result"),
    "CdistBackward0": ("x1", "x2", "result"),
    "PdistBackward0": ("self", "result"),
}
_LINEAR = (1, math.inf, -math.inf)  # powers of norms and of margin losses that do not bend
# Of those that bend between their kinks, it moves, but not beyond them.
_KINKS: dict[str, tuple[float, ...]] = {
    "HardswishBackward0": (-3.0, 3.0),
    "PreluKernelBackward0": (0.0,),
    "EluBackward0": (0.0,),
    "EluBackward1": (0.0,),
}


def take_pieces(value: Tensor, of: Tensor) -> None:
    """Have value's gradient take, at each kink, the piece that another graph of it took."""
    nodes, others = list(walk([value])), list(walk([of]))
    names = [n.name() for n in nodes]
    if names != [n.name() for n in others]:
        return
    for name, node, other in zip(names, nodes, others, strict=True):
        if name in _TELLS and node is not other and _is_in_pieces(node):
            _take_piece(node, other, _TELLS[name], _KINKS.get(name, ()))


def _is_in_pieces(node: Any) -> bool:
    power = getattr(node, "_saved_p", getattr(node, "_saved_ord", 1))
    return power in _LINEAR and getattr(node, "_saved_reduce", None) != "prod"


def _take_piece(node: Any, other: Any, tells: Sequence[str], kinks: Sequence[float]) -> None:
    saved = [getattr(other, f"_saved_{tell}", None) for tell in tells]
    if any(isinstance(s, Tensor) and s.is_complex() for s in saved):  # there, moduli bend
        return
    for tell, there in zip(tells, saved, strict=True):
        _lend(getattr(node, f"_raw_saved_{tell}", None), there, kinks)


def _lend(place: Any, saved: Tensor | None, kinks: Sequence[float]) -> None:
    if place is None or saved is None:
        return
    there = saved.detach()

    def lent(own: Tensor) -> Tensor:
        if there.shape != own.shape:
            return own  # of x[x > 0], there are as many as hold
        return _on_piece(own, there, kinks) if kinks else there

    with contextlib.suppress(RuntimeError):  # it has hooks already: those of a checkpoint, say
        place.register_hooks(lambda own: own, lent)


def _on_piece(own: Tensor, there: Tensor, kinks: Sequence[float]) -> Tensor:
    """The nearest to each number that lies between the same kinks as the other."""
    at, end = there.new_tensor(kinks), there.new_tensor([math.inf])
    gap = at.abs() * torch.finfo(at.dtype).eps + torch.finfo(at.dtype).tiny
    low, high = torch.cat([-end, at + gap]), torch.cat([at - gap, end])
    piece = torch.bucketize(there, at)
    return own.clamp(low[piece], high[piece])
