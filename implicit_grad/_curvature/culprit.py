"""Where a wrong second derivative begins: the first operation whose backward changes wrongly.

On the way back from a value, each operation turns the gradient by its output into those by its
inputs. Along a line through φ these change by what the graph says, which products go through, and
by what differences of two evaluations say. Where the two first disagree, all that came back to the
operation was right: its backward is to blame, or a value that it computes with and that was cut off
from φ before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._curvature.comparison import changes_unseen
from implicit_grad._torch.graph import between, name_of
from implicit_grad._torch.own_backward import own_backwards
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Tensors, inner

Line = Callable[[float], tuple[Tensor, Tensors]]


def culprit(line: Line, along: Tensors, eps: float) -> str | None:
    """The name of the operation at which the second derivative begins to be wrong, if one shows.

    Args:
        line: t ↦ the value at φ + t·along, with its graph, and the tensors that stand for φ in it.
        along: the direction, in the form of φ.
        eps: the relative precision of the gradients.
    """
    value, phi = line(0.0)
    names, slopes = _on_the_way_back(value, phi, graph=True)

    @functools.cache
    def at(t: float) -> Tensors:
        there, moved = _on_the_way_back(*line(t), graph=False)
        if there != names:
            raise _AnotherPath
        return moved

    def is_wrong(i: int) -> bool:
        slope = slopes[i]

        def claimed(u: Tensors) -> float:
            with torch.no_grad():
                return inner(vjp((slope,), phi, u), along)

        return changes_unseen(lambda t: (at(t)[i],), (slope.detach(),), claimed, eps)

    try:
        return next((name for i, name in enumerate(names) if is_wrong(i)), None)
    except _AnotherPath:
        return None


class _AnotherPath(Exception):
    """The function takes another path elsewhere: its operations cannot be compared."""


def _on_the_way_back(value: Tensor, phi: Tensors, graph: bool) -> tuple[list[str], Tensors]:
    """The operations in the order in which backward meets them, and the gradients they hand on."""
    names: list[str] = []
    found: list[Tensor] = []

    def note(name: str, results: tuple[Tensor | None, ...], _: object) -> None:
        known = [result for result in results if result is not None]
        names.extend([name] * len(known))
        found.extend(known)

    nodes = list(between([value], phi))
    with torch.set_grad_enabled(graph), own_backwards(nodes):
        handles = [node.register_hook(functools.partial(note, name_of(node))) for node in nodes]
        try:
            gradient(value, phi)
        finally:
            for handle in handles:
                handle.remove()
    return names, tuple(found)
