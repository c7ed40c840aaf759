"""The smooth part of an inner objective, evaluated at φ: what every kind of A is made from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from implicit_grad._theorem.linearization import Stationarity
from implicit_grad._torch.graph import between
from implicit_grad._torch.own_backward import is_special
from implicit_grad._torch.pytree import Tensors


@dataclasses.dataclass(frozen=True)
class Objective:
    """The smooth part of an inner objective, evaluated at φ with its graph.

    Attributes:
        value: the scalar.
        phi: the tensors in its graph that stand for φ.
        stationarity: F from ∇value (the identity, or what adds λ(φ − θ)).
        outputs: the model's outputs that value depends on φ through, if there is a model.
        again: evaluates value at another φ, on the same arguments; needed for differences.
        guard: see `Linearization`.
        tasks: how many separate problems the value sums over.
        own: whether the graph is nobody else's.
    """

    value: Tensor
    phi: Tensors
    stationarity: Callable[[Tensors], Stationarity] = Stationarity
    outputs: Tensors | None = None
    again: Callable[[Tensors], Tensor] | None = None
    guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    tasks: int | None = None
    own: bool = True

    @functools.cached_property
    def special(self) -> list[Any]:
        """The nodes through which the value depends on φ that are no plain operations of torch."""
        return list(filter(is_special, between([self.value], self.phi)))

    def look_among(self, nodes: Iterable[Any]) -> None:
        """Spare a walk through the graph where none of all the nodes behind the value is such."""
        if not any(map(is_special, nodes)):
            self.__dict__["special"] = []
