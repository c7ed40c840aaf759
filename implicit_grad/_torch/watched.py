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


def marks_behind(value: Tensor, wanted: set[Mark], stop: Callable[[Any], bool]) -> set[Mark]:
    """Which of the marks are in the graph behind a value; not past `stop`.

    The walk ends with the last of them: to look at a node makes Python objects, which stay with it.
    """
    missing = set(wanted)
    nodes = walk([value], stop)
    while missing and (node := next(nodes, None)) is not None:
        missing.discard(node.metadata.get(_MARK))
    return wanted - missing
