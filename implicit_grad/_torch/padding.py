"""Rows of embeddings that stand for padding: values may see them, gradients by torch's word do not.

`nn.Embedding(padding_idx=...)` holds one row where it is, on purpose: every optimizer leaves it
there, and the inner solution with it.
"""

from __future__ import annotations

from torch import Tensor

from implicit_grad._torch.graph import walk
from implicit_grad._torch.pytree import Tensors


def beside_padding(direction: Tensors, value: Tensor, phi: Tensors) -> Tensors:
    """The direction in the space of φ, with zeros in the rows that embeddings hold."""
    places, found = {id(p): i for i, p in enumerate(phi)}, list(direction)
    for node in walk([value]):
        if node.name() == "EmbeddingBackward0":
            table, row = node.next_functions[0][0], node._saved_padding_idx
            i = places.get(id(getattr(table, "variable", None)))
            if i is not None and row < len(found[i]):  # none is a number beyond all rows
                found[i] = found[i].clone()
                found[i][row] = 0.0
    return tuple(found)
