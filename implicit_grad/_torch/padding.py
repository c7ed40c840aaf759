"""Rows of embeddings that stand for padding: values may see them, gradients by torch's word do not.

`nn.Embedding(padding_idx=...)` holds one row where it is, on purpose: every optimizer leaves it
there, and the inner solution with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from implicit_grad._torch.graph import walk
from implicit_grad._torch.pytree import Tensors


def beside_padding(direction: Tensors, value: Tensor, phi: Tensors) -> Tensors:
    """The direction in the space of φ, with zeros in the rows that embeddings hold."""
    places: dict[Any, int] = {
        p.grad_fn if p.grad_fn is not None else id(p): i for i, p in enumerate(phi)
    }
    found = list(direction)
    for node in walk([value]):
        row = getattr(node, "_saved_padding_idx", -1)
        table = node.next_functions[0][0] if node.name() == "EmbeddingBackward0" else None
        leaf = id(getattr(table, "variable", None))
        place = places.get(table, places.get(leaf))
        if place is not None and 0 <= row < len(found[place]):  # none is a number beyond all rows
            found[place] = found[place].clone()
            found[place][row] = 0.0
    return tuple(found)
