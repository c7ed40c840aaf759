"""Bisection: a root of each element's own equation, in an interval where its sign changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.bounds import Limits, spread
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._options import require_tolerance
from implicit_grad._warnings import tell
from implicit_grad.solvers._roots import Residual

# Halvings from the widest to the narrowest interval of floats, in float64: its exponents and bits.
_MOST = 2200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """Halves, for each element of φ, an interval at whose ends the residual has different signs.

    The residual is elementwise: an element of it depends on the same element of φ only. The
    number of evaluations is that of the digits asked for, whatever the function, about 53 for all
    of float64's.

    Args:
        lower, upper: ends of the intervals: a number, a tensor, or a container in the form of φ
            of numbers and tensors. init gives the form of φ only.
        tol: stop when no interval is wider than this, in units of φ; None: when there is no
            number between its ends.

    >>> import torch
    >>> kepler = lambda E: E - 0.8 * torch.sin(E) - torch.tensor([0.1, 1.0])
    >>> Bisection(lower=0.0, upper=torch.pi).find_root(kepler, torch.zeros(2))
    tensor([0.4427, 1.7822])
    """

    lower: Any
    upper: Any
    tol: float | None = None

    def __post_init__(self) -> None:
        require_tolerance(self, "tol")

    def find_root(self, residual: Callable[[Any], Any], init: Any) -> Any:
        """The roots in the intervals; phi has the form of init, and so has residual(phi)."""
        with torch.inference_mode(False), torch.no_grad():
            at = Residual(self, residual, init, False)
            if not at.first.numel():
                return at.result(at.start)
            below, above = spread("Bisection", (self.lower, self.upper), init)
            ends = [self._end(at, "lower", below), self._end(at, "upper", above)]
            values = [self._value(at, x) for x in ends]
            _check_signs(at, ends, values)
            x, said = self._halved(at, ends, values)
            if said is not None:
                tell(said, anchor="solver-missed", of=type(self).__name__)
            return at.result(at.tensors(x))

    def _end(self, at: Residual, name: str, limits: Limits) -> Tensor:
        if any(b is None or not bool(torch.isfinite(b).all()) for b in limits):
            raise InvalidArgumentError(
                f"Bisection: {name} must be finite for each element of phi, got "
                f"{getattr(self, name)!r}"
            )
        return at.rows(tuple(b.detach() for b in limits if b is not None))

    def _value(self, at: Residual, x: Tensor) -> Tensor:
        value = at(x)
        if bool(value.isnan().any()):  # Inf has a sign
            at.check(value, 0, "it is not defined in all of the interval")
        return value

    def _halved(
        self, at: Residual, ends: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, str | None]:
        """The middle of the last intervals, or the better end of those that have none."""
        (a, b), (at_a, at_b) = ends, values
        before = torch.maximum(at_a.abs(), at_b.abs())
        a, b = torch.where(at_b == 0, b, a), torch.where((at_a == 0) & (at_b != 0), a, b)
        sign = torch.where(a == b, 0.0, at_a.sign())
        for _ in range(_MOST):
            middle = _between(at, a, b)
            left = (middle != a) & (middle != b) & ((b - a) > (self.tol or 0.0))
            if not bool(left.any()):
                break
            value = self._value(at, middle)
            same, zero = left & (value.sign() == sign), left & (value == 0)
            a = torch.where(same | zero, middle, a)
            b = torch.where(left & ~same, middle, b)
        at_a, at_b = self._value(at, a), self._value(at, b)
        narrow = (middle == a) | (middle == b)
        best = torch.where(at_a.abs() <= at_b.abs(), a, b)
        parted = (at_a.sign() * at_b.sign() > 0) & (a != b)
        jump = torch.minimum(at_a.abs(), at_b.abs()) > before
        return torch.where(narrow, best, middle), _said(parted, jump)


def _between(at: Residual, a: Tensor, b: Tensor) -> Tensor:
    """The middle, as a number that φ's own dtype has."""
    middle: Tensor = at.rows(at.tensors(a / 2 + b / 2))
    return middle


def _check_signs(at: Residual, ends: list[Tensor], values: list[Tensor]) -> None:
    first, last = values
    same = (first.sign() * last.sign() > 0)[0]
    if bool(same.any()):
        (a, b), (low, high) = ((float(t[0, same][0]) for t in pair) for pair in (ends, values))
        raise InvalidArgumentError(
            "Bisection: the residual must have different signs at lower and upper; it has the same "
            f"for {int(same.sum())} of {same.numel()} elements (for instance {low:.3g} at {a:g} "
            f"and {high:.3g} at {b:g})"
        )


def _said(parted: Tensor, jump: Tensor) -> str | None:
    if bool(parted.any()):
        return (
            f"Bisection: in the end the residual's sign does not change for {int(parted.sum())} of "
            f"{parted.numel()} elements: it has to be elementwise (Newton() or Broyden() solve "
            "systems), and not random"
        )
    if bool(jump.any()):
        return (
            f"Bisection: for {int(jump.sum())} of {jump.numel()} elements the residual is larger "
            "where its sign changes than at both ends of the interval: that is a pole, not a root"
        )
    return None
