"""The smooth part of an inner objective, evaluated at φ: what every kind of A is made from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor

from implicit_grad._theorem.linearization import Stationarity
from implicit_grad._torch.graph import between, coarsest, is_once_differentiable
from implicit_grad._torch.own_backward import is_special
from implicit_grad._torch.pytree import Tensors


class GaussNewtonProducts(Protocol):
    """Products with the Gauss-Newton part of A."""

    def __call__(self, u: Tensors) -> Tensors:
        """That part times u."""

    def remark(self) -> str | None:
        """What it leaves out that should not be, if that was seen."""


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
        n_tasks: how many separate problems the value sums over.
        own: whether the graph is nobody else's.
        once: whether a part whose graph is not held has no second derivative.
        precision_of_parts: of parts whose graphs are not held; see `coarsest`.
        gauss_newton: products with the Gauss-Newton part of A, where they are not made from
            `outputs`.
    """

    value: Tensor
    phi: Tensors
    stationarity: Callable[[Tensors], Stationarity] = Stationarity
    outputs: Tensors | None = None
    again: Callable[[Tensors], Tensor] | None = None
    guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    n_tasks: int | None = None
    own: bool = True
    once: bool = False
    precision_of_parts: float = 0.0
    gauss_newton: GaussNewtonProducts | None = None

    @functools.cached_property
    def special(self) -> list[Any]:
        """The nodes through which the value depends on φ that are no plain operations of torch."""
        return list(filter(is_special, between([self.value], self.phi)))

    @functools.cached_property
    def precision(self) -> float:
        """The relative precision of the value's gradient by φ."""
        return max(self.precision_of_parts, coarsest([self.value], self.phi))

    def look_among(self, nodes: Collection[Any]) -> None:
        """Spare walks through the graph, of which these are all the nodes behind the value."""
        if not any(map(is_special, nodes)):
            self.__dict__["special"] = []
        precision = coarsest([self.value], self.phi, nodes)
        self.__dict__["precision"] = max(self.precision_of_parts, precision)

    @property
    def is_once_differentiable(self) -> bool:
        """Whether something between φ and the value has no second derivative."""
        return self.once or any(map(is_once_differentiable, self.special))
