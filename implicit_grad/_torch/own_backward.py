"""Operations that are given other graphs than torch's when a gradient is taken with its graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from implicit_grad._torch import batch_norm, layer_norm, weight_norm

_MARK = "implicit_grad"  # of nodes that have been seen to
_REPLACEMENTS = {m.NODE: m.replacement for m in (batch_norm, layer_norm, weight_norm)}


def is_special(node: Any) -> bool:
    """Whether the node is of a custom Function, or of an operation with a graph of our own."""
    return getattr(node, "_forward_cls", None) is not None or node.name() in _REPLACEMENTS


@contextlib.contextmanager
def own_backwards(nodes: Iterable[Any], lasting: bool = False) -> Iterator[None]:
    """Gradients with graphs, taken inside, have our own graphs of the operations listed above.

    That concerns the given nodes, those between φ and a value. Derivatives beyond the second need
    it to be `lasting`, for they take the gradient of the first graph again.
    """
    handles = []
    for node in nodes:
        make = _REPLACEMENTS.get(node.name())
        if make is None or _MARK in node.metadata or _inside_checkpoint(node):
            continue
        hook = make(node)
        if hook is None:
            continue
        handle = node.register_hook(hook)
        if lasting:
            node.metadata[_MARK] = True
        else:
            handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inside_checkpoint(node: object) -> bool:
    """Whether what the node has saved can be read once only, or costs a computation.

    An older torch does not tell: there, a checkpoint is computed again whenever it is looked into.
    """
    names = (name for name in dir(node) if name.startswith("_raw_saved_"))
    return any(getattr(getattr(node, n), "unpack_hook", None) is not None for n in names)
