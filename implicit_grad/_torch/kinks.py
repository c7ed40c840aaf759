"""Kinks, held where they were: two graphs of a function are made to take the same pieces.

A difference of gradients of a network with ReLUs sees each unit that dies or comes to life between
its two points, as a jump over a small step: in float32, and with a million units, they hide the
second derivative, which knows nothing of them. What an operation that is linear in pieces saves for
its backward pass only tells which piece it is on. So it can be lent what another graph has saved.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor

from implicit_grad._torch.graph import walk

_SELF, _INDICES = ("self",), ("indices",)
# Of operations that are linear in pieces (or choose, like `where`): what tells the pieces.
_TELLS = {
    "ReluBackward0": ("result",),
    "LeakyReluBackward0": _SELF,
    "ThresholdBackward0": _SELF,
    "HardtanhBackward0": _SELF,
    "HardsigmoidBackward0": _SELF,
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
    "MultilabelMarginLossBackward0": _SELF,
    "MultiMarginLossBackward0": _SELF,
    "LinalgVectorNormBackward0": ("self", "result"),
    "CdistBackward0": ("x1", "x2", "result"),
    "PdistBackward0": ("self", "result"),
}
_LINEAR = (1, math.inf, -math.inf)  # powers of norms and of margin losses that do not bend


def take_pieces(value: Tensor, of: Tensor) -> None:
    """Have value's gradient take, at each kink, the piece that another graph of it took."""
    nodes, others = list(walk([value])), list(walk([of]))
    if [n.name() for n in nodes] != [n.name() for n in others]:
        return
    for node, other in zip(nodes, others, strict=True):
        power = getattr(node, "_saved_p", getattr(node, "_saved_ord", 1))
        if node is other or power not in _LINEAR:
            continue
        names = _TELLS.get(node.name(), ())
        saved = [getattr(other, f"_saved_{name}", None) for name in names]
        if any(isinstance(s, Tensor) and s.is_complex() for s in saved):  # there, moduli bend
            continue
        for name, there in zip(names, saved, strict=True):
            _lend(getattr(node, f"_raw_saved_{name}", None), there)


def _lend(place: Any, saved: Tensor | None) -> None:
    if place is None or saved is None:
        return
    there = saved.detach()

    def lent(own: Tensor) -> Tensor:
        return there if there.shape == own.shape else own  # of x[x > 0], there are as many as hold

    with contextlib.suppress(RuntimeError):  # it has hooks already: those of a checkpoint, say
        place.register_hooks(lambda own: own, lent)
