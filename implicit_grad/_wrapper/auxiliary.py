"""What a solver returns besides φ: with `has_aux=True` it returns (φ, aux)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicit_grad._conditions.base import Call
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import is_batched


class WithAux:
    """A solver's run that gives φ alone, and keeps what came with it until it is taken."""

    def __init__(self, run: Callable[[Call], Any]) -> None:
        self._run, self._aux = run, None

    def __call__(self, call: Call) -> Any:
        returned = self._run(call)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise InvalidSolutionError(
                "with has_aux=True the solver must return a pair (phi, aux), it returned "
                f"{_described(returned)}",
                anchor="aux-pair",
            )
        phi, self._aux = returned
        return phi

    def taken(self) -> Any:
        """Aux, with its tensors cut off from any graph; it is not kept any longer."""
        aux, self._aux = self._aux, None
        tensors, tree = pytree.flatten(aux, whole_modules=True)
        if not any(t.requires_grad for t in tensors):
            return aux
        return tree.rebuild(tuple(t.detach() for t in tensors))


def check_not_batched(inputs: Tensors) -> None:
    """Raise where a solver would run once for each sample, and so return several aux."""
    if any(map(is_batched, inputs)):
        raise InvalidArgumentError(
            "implicit: has_aux=True does not go with torch.func.vmap: the solver runs for one "
            "sample after another, and each run returns an aux of its own. Call it in a loop, or "
            "let the solver return phi alone"
        )


def _described(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"{len(returned)} things: return phi, (the others)"
    return describe(returned) if not torch.is_tensor(returned) else f"{describe(returned)} alone"
