"""A φ that does not satisfy F = 0: is it unfinished, or the solution of another problem?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._conditions.proximal import proximal
from implicit_grad._torch import pytree
from implicit_grad.testing.check_report import Cause
from implicit_grad.testing.local_problem import Local
from implicit_grad.testing.subject import FAILURES, Subject

_ITERATIONS, _SAME = 12, 1e-4


class Inner:
    """The solver's φ held against the condition's own solution next to it."""

    def __init__(
        self, subject: Subject, local: Local, rtol: float, see: Callable[[str], None]
    ) -> None:
        self.subject, self.local, self.rtol, self._see = subject, local, rtol, see

    @functools.cached_property
    def solved(self) -> bool:
        """Whether φ is as close to a solution as rtol asks for."""
        if not bool(self.local.residual.any()):
            return True
        solution = self.local.solution
        if solution is not None:
            return self.local.distance(solution) <= 0.1 * self.rtol
        # F is often 0 or not a number at φ = 0 (lengths of differences): that is no measure
        elsewhere = [s for s in map(self._size, self._naive()) if 0.0 < s < math.inf]
        return self._size(self.local) <= 0.01 * self.rtol * min(elsewhere, default=0.0)

    @functools.cached_property
    def cause(self) -> Cause:
        """Why it is not."""
        solution, size = self.local.solution, self._size(self.local)
        where = (
            "no isolated solution of F = 0 was found from there by Newton's method"
            if solution is None
            else f"the solution of F = 0 is {self.local.distance(solution):.2g} away, relative"
        )
        self._see(f"‖F(φ)‖ = {size:.2g}; {where}")
        if hasattr(self.subject.solver, "minimize") or hasattr(self.subject.solver, "find_root"):
            return Cause.INNER_NOT_SOLVED  # it was handed the condition itself
        if self._is_start() or self._gains_from_restart():
            return Cause.INNER_NOT_SOLVED
        if self._solves_another() or self._is_no_progress(size):
            return Cause.WRONG_CONDITION
        self._see("φ is closer to F = 0 than where it may have started, as if it was on its way")
        return Cause.INNER_NOT_SOLVED

    def _size(self, local: Local) -> float:
        return float(local.residual.norm())

    def _starts(self) -> list[object]:
        """Arguments in the form of φ."""
        form, shapes = pytree.structure(self.local.value), [p.shape for p in self.local.phi]
        return [
            a
            for a in self.subject.args
            if pytree.structure(a) == form and [_shape(t) for t in pytree.leaves(a)] == shapes
        ]

    def _is_start(self) -> bool:
        """Whether φ is an argument that came back as it was."""
        for start in self._starts():
            pairs = zip(pytree.leaves(start), self.local.phi, strict=True)
            if all(torch.equal(t.detach().to(p), p) for t, p in pairs):
                self._see("the solver returned one of its arguments as it was")
                return True
        return False

    def _gains_from_restart(self) -> bool:
        """Whether the solver gets further when it starts where it ended (where F has no start)."""
        for k, start in enumerate(self.subject.args):
            if not any(start is s for s in self._starts()):
                continue
            leaves = {id(t) for t in pytree.leaves(start)}
            slots = [i for i, v in enumerate(self.subject.variables) if id(v.tensor) in leaves]
            if len(slots) < len(leaves) or not self.local.is_small:
                continue
            if any(bool(self.local.cross[i].any()) for i in slots):
                continue  # F depends on it: not merely a start
            args = list(self.subject.args)
            args[k] = self.local.value
            try:
                again = self.local.at(_detached(self.subject.solve(*args)))
            except FAILURES:
                continue
            before, after = self._size(self.local), self._size(again)
            self._see(
                f"started from φ again, the solver brings ‖F‖ from {before:.2g} to {after:.2g}"
            )
            return after < 0.9 * before
        return False

    def _solves_another(self) -> bool:
        """Whether φ satisfies F = 0 with one number in it multiplied by a factor."""
        if self.local.size < 2:
            return False  # one equation can always be satisfied by a factor
        for name, scaled in self._scaled().items():
            factor, left = _best_factor(scaled)
            if left <= _SAME * self._size(self.local):
                self._see(
                    f"φ satisfies F = 0 if {name} is taken {factor:.4g} times: ‖F‖ = {left:.1g}"
                )
                return True
        opposite = -2 * self.local.flat.ravel([p.detach() for p in self.local.phi])
        if self.local.size != opposite.numel():
            return False
        left = self._size(self.local.at(self.local.moved(opposite)))
        if left <= _SAME * self._size(self.local):
            self._see(f"−φ satisfies F = 0, φ does not: ‖F(−φ)‖ = {left:.1g}")
            return True
        return False

    def _scaled(self) -> dict[str, Callable[[float], Tensor]]:
        """F as a function of a factor on each number in the problem."""
        local, condition = self.local, self.local.condition
        found: dict[str, Callable[[float], Tensor]] = {}
        for i, variable in enumerate(self.subject.variables):
            if variable.tensor.numel() == 1:

                def with_variable(s: float, i: int = i, t: Tensor = variable.tensor) -> Tensor:
                    with self.subject.shifted({i: (s - 1) * t.detach().double()}) as args:
                        return Local(condition, args, local.value, ()).residual

                found[variable.name] = with_variable
        lam = getattr(condition, "lam", None)
        if isinstance(condition, proximal) and isinstance(lam, (int, float)):

            def with_lam(s: float) -> Tensor:
                changed = dataclasses.replace(condition, lam=s * lam)
                return Local(changed, local.args, local.value, ()).residual

            found["lam"] = with_lam
        return found

    def _naive(self) -> list[Local]:
        """Points that no solver was needed for: zero, arguments, random ones of φ's size."""
        random = torch.Generator().manual_seed(6)
        phi = self.local.flat.ravel([p.detach() for p in self.local.phi])
        found = [self.local.at(self.local.moved(-phi))]
        for _ in range(3):
            step = torch.randn(phi.shape, dtype=torch.float64, generator=random).to(phi)
            found.append(self.local.at(self.local.moved(step / step.norm() * phi.norm() - phi)))
        for start in self._starts():
            found.append(self.local.at(_detached(start)))
        return found

    def _is_no_progress(self, size: float) -> bool:
        sizes = [s for s in map(self._size, self._naive()) if s < math.inf]
        least = min(sizes, default=math.inf)
        if size < 0.5 * least:
            return False
        self._see(f"‖F‖ is {least:.2g} at points that no solver was needed for: φ is no better")
        return True


def _best_factor(residual: Callable[[float], Tensor]) -> tuple[float, float]:
    """The factor that brings ‖F‖ down the most, by Gauss-Newton; and ‖F‖ there."""
    factor, best = 1.0, (1.0, float("inf"))
    for _ in range(_ITERATIONS):
        try:
            here = residual(factor)
            slope = (residual(factor + 1e-5) - here) / 1e-5
        except FAILURES:
            break
        size = float(here.norm())
        if size >= 0.5 * best[1]:
            break
        best = (factor, size)
        square = float(slope @ slope)
        if not 0.0 < square < float("inf"):
            break
        factor -= float(slope @ here) / square
    return best


def _shape(leaf: object) -> object:
    return leaf.shape if torch.is_tensor(leaf) else None


def _detached(value: object) -> object:
    leaves, tree = pytree.flatten(value)
    return tree.rebuild([t.detach() for t in leaves], owned=True)
