"""Exponential cones among the constraints: a smooth surface, its edge and its tip.

s = (x, y, z) ∈ K means y exp(x/y) ≤ z with y > 0; or, where that ends, x ≤ 0, y = 0 and z ≥ 0.

- Where y or z is above 0, the surface is as smooth as any inequality.
- At the edge, y = 0 < z, it is steep: x ≤ y log(z/y) leaves 0 with infinite slope as y does, so
  that y has a multiplier of its own, as of y ≥ 0. Where no variable moves y, it is a parameter at
  its bound, as the zeros of p in rel_entr(p, z): of x ≤ y log z − y log y, the last is of no
  concern to any z, if it is only the objective that counts x; else φ has infinite slopes.
- At the tip, y = z = 0, the multipliers u of x and m of z are those of one ray of the surface, on
  which z/y = ρ = u/m: where an argument takes y off 0, z = ρ y and x = y log ρ follow (interior
  point methods live on that: z m = y u). So the tip is the corner of x ≤ y log ρ, z ≥ ρ y and
  y ≥ 0; whose third multiplier is 0 where (−u, v, m) lies on the boundary of the dual cone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import TOUCHING

_LARGEST = 600.0  # whose exponential, and its inverse, are numbers


class ExponentialCones(NamedTuple):
    """The vectors that are to lie in K.

    Attributes:
        parts: x, y and z, a row for each.
        lengths: the sizes of their gradients in φ: 0 for constants.
        counted: which x are of no concern but to an objective that is linear in them.
    """

    parts: Tensor
    lengths: Tensor
    counted: Tensor

    def surface(self) -> Tensor:
        """At most 0 where s is in K and y > 0: in the form that rounding spoils less."""
        x, y, z = self.parts.unbind(1)
        by_logarithm = (z >= y) & (z > 0)
        height, base = torch.where(y > 0, y, 1.0), torch.where(by_logarithm, z, 1.0)
        power = torch.where(by_logarithm, 0.0, x) / height
        logarithm = x - y * (base.log() - height.log())
        return torch.where(by_logarithm, logarithm, height * power.exp() - z)

    def small(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Where y, and where z, is 0 for a φ of that size: to the bit, if it is a constant.

        But at the tip z = ρ y: there a constant y, too, is 0 beside φ.
        """
        reach = torch.finfo(self.parts.dtype).eps ** TOUCHING * size
        (_, y, z), (_, of_y, of_z) = (t.detach().unbind(1) for t in (self.parts, self.lengths))
        zero = z <= reach * of_z
        return y <= reach * torch.where((of_y == 0) & zero, of_z, of_y), zero

    def smooth(self, size: Tensor) -> Tensor:
        """The surface; at edges and tips a 0 that nothing moves."""
        low, _ = self.small(size)
        return torch.where(low, 0.0, self.surface())

    def divided(self, size: Tensor) -> tuple[list[Tensor], list[Corner]]:
        """The surface of those that are not at edges or tips, and those that are."""
        low, none = self.small(size)
        _, *move = (self.lengths > 0).unbind(1)
        flags = list(zip(*map(_read, (none, *move, self.counted)), strict=True))
        x, y, z = (part.unbind() for part in self.parts.unbind(1))
        at_corner = _read(low)
        surface = zip(self.surface().unbind(), at_corner, strict=True)
        corners = [Corner(x[i], y[i], z[i], *flags[i]) for i, at in enumerate(at_corner) if at]
        return [row for row, at in surface if not at], corners


def _read(flags: Tensor) -> list[bool]:
    """One by one: older torches (2.4) make no list of a tensor under `grad` and its like."""
    return [bool(flag) for flag in flags.unbind()]


class Corner(NamedTuple):
    """One cone at its edge or, with `is_tip`, at its tip.

    `y_moves` and `z_moves` tell whether φ moves them; for `counted` see `ExponentialCones`.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    is_tip: bool
    y_moves: bool
    z_moves: bool
    counted: bool

    @property
    def is_steep(self) -> bool:
        """Whether, if x presses at the edge, φ has infinite slopes."""
        return not (self.y_moves or self.counted)

    def edge(self) -> list[Tensor]:
        """Inequalities, where z > 0."""
        return [self.x - self.y * self.z.log(), *self._least(self.y_moves)]

    def parts(self) -> list[Tensor]:
        """What is 0 at the tip, besides x."""
        return [*self._least(self.y_moves), *([-self.z] if self.z_moves else [])]

    def tip(self, u: float, of_parts: Sequence[float]) -> list[Tensor]:
        """Inequalities, given the multipliers of x ≤ 0 and of the parts."""
        if not self.z_moves:  # and holds y: for it, y's multiplier tells the ray
            v = of_parts[0] if self.y_moves else 0.0
            rho = math.exp(min(v / u + 1, _LARGEST)) if u > 0 else 0.0
            return [self._above(rho), self.y - self.z / rho if rho else -self.y]
        m = of_parts[-1]
        rho = max(u, 0.0) / m if m > 0 else 0.0
        return [self._above(rho), rho * self.y - self.z, *self._least(self.y_moves)]

    def _above(self, rho: float) -> Tensor:
        return self.x - self.y * math.log(rho) if rho else self.x

    def _least(self, moves: bool) -> list[Tensor]:
        return [-self.y] if moves else []
