"""Whether a part of a graph is still there: if so, somebody may go backward through it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicit_grad._torch.graph import walk

_MARK = "implicit_grad: watched"  # in what torch lets one note at a node of the graph


class Mark:
    """Lives as long as a node of the graph, whoever holds that."""

    __slots__ = ("__weakref__",)


def watched(value: Tensor) -> weakref.ref[Mark]:
    """A reference that is dead once the node that computed the value is gone."""
    node: Any = value.grad_fn
    return weakref.ref(node.metadata.setdefault(_MARK, Mark()))


def marks_behind(value: Tensor, stop: Callable[[Any], bool]) -> set[Mark]:
    """The marks of nodes that are watched in the graph behind a value; not past `stop`."""
    found = (node.metadata.get(_MARK) for node in walk([value], stop))
    return {mark for mark in found if mark is not None}
