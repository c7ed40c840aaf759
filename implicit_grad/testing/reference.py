"""What gradients are compared with: differences through the solver, or a whole gradient."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from implicit_grad.testing.differences import Derivative, derivative, noise
from implicit_grad.testing.subject import Subject, unit_direction

_FIRST_STEP = 0.02  # relative to an argument
_OTHER_STEPS = (3.7, 1 / 7.3, 1 / 47)  # times the first
_CONFIDENCE = 3.0  # times the uncertainty


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A gradient against the reference along some directions, each the worst of them."""

    error: float
    size: float
    uncertainty: float
    reference: float

    def is_right(self, rtol: float, floor: float) -> bool:
        """Whether the two agree; `floor` is a derivative that counts as none."""
        return self.error <= rtol * self.size + floor + _CONFIDENCE * self.uncertainty

    def is_vague(self, floor: float) -> bool:
        """Whether the reference is too uncertain for an agreement to mean anything.

        `floor` is a derivative that it need not resolve.
        """
        return not _CONFIDENCE * self.uncertainty <= 0.1 * self.size + floor


class Reference(Protocol):
    """What gradients are compared with."""

    name: str

    def compare(self, index: int, gradient: Tensor | None) -> Comparison:
        """One variable's gradient against the reference."""
        ...

    def pairs(self, index: int, gradient: Tensor | None) -> list[tuple[float, float]]:
        """The numbers that should be equal: the gradient's and the reference's."""
        ...

    def confirm(self, index: int) -> None:
        """Make sure of a reference that something disagrees with."""


@dataclasses.dataclass
class _Along:
    direction: Tensor
    found: Derivative


class Differences:
    """Finite differences through the black box, along the gradient and random directions."""

    name = "finite differences through the solver"

    def __init__(
        self,
        subject: Subject,
        values: list[float],
        rtol: float,
        directions: int,
        gradients: list[Tensor | None],
    ) -> None:
        """`values` are those of repeated calls, `gradients` what is to be compared first."""
        self._subject, self._rtol, self._number = subject, rtol, directions
        self._gradients, self._base = gradients, abs(values[0])
        self.noise = max(self._noise(values[0]), max(values) - min(values))
        self._known: dict[int, list[_Along]] = {}

    def _noise(self, base: float) -> float:
        random = torch.Generator().manual_seed(2)
        variables = self._subject.variables
        eps = max(torch.finfo(v.tensor.dtype).eps for v in variables)
        steps = {
            i: 100 * eps**0.75 * v.size * unit_direction(v.tensor, random)
            for i, v in enumerate(variables)
        }
        values = [self._subject.value({i: k * s for i, s in steps.items()}) for k in range(1, 7)]
        return max(noise([base, *values]), eps * abs(base))

    def compare(self, index: int, gradient: Tensor | None) -> Comparison:
        """One variable's gradient against differences."""
        pairs = self.pairs(index, gradient)
        return Comparison(
            error=max(abs(s - d) for s, d in pairs),
            size=max(max(abs(s), abs(d)) for s, d in pairs),
            uncertainty=max(along.found.error for along in self._along(index)),
            reference=max(abs(d) for _, d in pairs),
        )

    def pairs(self, index: int, gradient: Tensor | None) -> list[tuple[float, float]]:
        """The gradient's slope and the differences' along each direction."""
        return [
            (
                0.0 if gradient is None else float(gradient.cpu() @ along.direction.flatten()),
                along.found.value,
            )
            for along in self._along(index)
        ]

    def confirm(self, index: int) -> None:
        """Difference anew from other first steps: two neighbours have to agree.

        Exactly 0 from a smaller step agrees with nothing: there are functions like stairs.
        """
        for along in self._along(index):
            direction, first = along.direction, along.found
            results = [first]
            for factor in _OTHER_STEPS:
                other = self._derivative(index, direction, factor * _FIRST_STEP)
                results = [other, *results] if factor > 1 else [*results, other]
                pairs = [(a, b) for a, b in pairwise(results) if b.value or not first.value]
                if not pairs:
                    continue
                apart = [max(abs(a.value - b.value), a.error, b.error) for a, b in pairs]
                k = min(range(len(pairs)), key=apart.__getitem__)
                better = min(pairs[k], key=lambda derivative: derivative.error)
                along.found = Derivative(better.value, apart[k])
                if apart[k] <= 0.1 * self._rtol * abs(better.value):
                    break  # nothing that other steps could add

    def _along(self, index: int) -> list[_Along]:
        if index not in self._known:
            self._known[index] = [
                _Along(d, self._derivative(index, d, _FIRST_STEP)) for d in self._directions(index)
            ]
        return self._known[index]

    def _derivative(self, index: int, direction: Tensor, first_step: float) -> Derivative:
        size = self._subject.variables[index].size
        return derivative(
            lambda step: self._subject.value({index: step * direction}),
            first_step * size,
            self.noise,
            0.01 * self._rtol,
            scale=self._base / size,
        )

    def _directions(self, index: int) -> list[Tensor]:
        tensor, gradient = self._subject.variables[index].tensor, self._gradients[index]
        random = torch.Generator().manual_seed(3 + index)
        if tensor.numel() == 1:
            return [torch.ones(tensor.shape, dtype=torch.float64)]
        found = [unit_direction(tensor, random) for _ in range(self._number)]
        size = 0.0 if gradient is None else float(gradient.norm())
        if gradient is not None and 0.0 < size < float("inf"):
            # the gradient's own direction alone would be blind to a part that is missing
            mixed = gradient.cpu().view(tensor.shape) / size + found[0]
            found[0] = mixed / mixed.norm()
        return found


class Whole:
    """A whole gradient as the reference."""

    def __init__(self, subject: Subject, name: str, gradients: list[Tensor | None]) -> None:
        self._subject, self.name, self._gradients = subject, name, gradients

    def compare(self, index: int, gradient: Tensor | None) -> Comparison:
        """One variable's gradient against the reference's."""
        g, r = self._both(index, gradient)
        size = max(float(g.norm()), float(r.norm()))
        rounding = 100 * torch.finfo(self._subject.variables[index].tensor.dtype).eps * size
        return Comparison(float((g - r).norm()), size, rounding, float(r.norm()))

    def pairs(self, index: int, gradient: Tensor | None) -> list[tuple[float, float]]:
        """The two element by element."""
        g, r = self._both(index, gradient)
        return list(zip(g.tolist(), r.tolist(), strict=True))

    def _both(self, index: int, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self._subject.variables[index].tensor.numel(), dtype=torch.float64)
        both = [zeros if g is None else g.cpu() for g in (gradient, self._gradients[index])]
        return both[0], both[1]

    def confirm(self, index: int) -> None:
        """There is nothing to repeat."""
