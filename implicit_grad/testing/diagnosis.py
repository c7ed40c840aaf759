"""Why gradients are wrong, measured: the more fundamental questions are asked first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicit_grad._errors import ImplicitGradError
from implicit_grad._theorem.report import Report
from implicit_grad._torch.pytree import Flat
from implicit_grad.testing.check_report import Cause
from implicit_grad.testing.diagnosis_inner import Inner
from implicit_grad.testing.diagnosis_system import System
from implicit_grad.testing.local_problem import Local
from implicit_grad.testing.reference import Reference
from implicit_grad.testing.subject import FAILURES, Subject, unit_direction

SINGULAR = 1e3  # times rounding


class Diagnosis:
    """The measurements behind a failed check; `run` draws the conclusions."""

    def __init__(
        self,
        subject: Subject,
        reference: Reference,
        is_right: Callable[[int, Tensor | None], bool],
        gradients: list[Tensor | None],
        reports: list[Report],
        values: list[float],
        rtol: float,
    ) -> None:
        self.subject, self.reference, self.is_right = subject, reference, is_right
        self.gradients, self.reports, self.values, self.rtol = gradients, reports, values, rtol
        self.evidence: list[str] = []

    def run(self, failed: list[int], vague: set[int]) -> dict[int, Cause]:
        """The cause of each failure; what was seen is added to `evidence`."""
        for report in self.reports[-1:]:
            residual = "" if report.linear_residual is None else f"{report.linear_residual:.2g}"
            self._see(
                f"the backward solve reports {report.status.name} after {report.iterations} "
                f"iterations, linear residual {residual or 'not computed'}, ‖F(φ)‖ = "
                f"{report.inner_residual:.2g}"
            )
        causes = {}
        plain = self.subject.gradients()
        for i in failed:
            if not (is_finite(self.gradients[i]) and all(map(math.isfinite, self.values))):
                causes[i] = Cause.NOT_FINITE
            elif self._is_random(i in vague):
                causes[i] = Cause.NON_DETERMINISTIC
            elif i in vague:
                causes[i] = self._blur()
            elif self.is_right(i, plain[i]):
                self._see(
                    f"{self._name(i)}: the gradient is right if no other call comes between "
                    "forward and backward"
                )
                causes[i] = Cause.STALE_STATE
            else:
                causes[i] = self._shallow(i) if self._local is None else self._deep(i, self._local)
        return causes

    def _blur(self) -> Cause:
        """Why the reference is too uncertain to compare with."""
        if self._local is None or not self._is_singular(self._local):
            return Cause.REFERENCE_TOO_NOISY
        return Cause.NOT_ISOLATED if self._inner.solved else self._inner.cause

    # ------------------------------------------------------------------ without a condition

    def _shallow(self, i: int) -> Cause:
        """What can be told of a gradient without knowing F."""
        if self._is_zero(i):
            return self._lost(i)
        gradient = self.gradients[i]
        assert gradient is not None
        if self.is_right(i, -gradient):
            return Cause.WRONG_SIGN
        for group, whose in ((range(len(self.gradients)), "all gradients"), ((i,), self._name(i))):
            factor = self._factor(group)
            if factor is not None:
                self._see(f"{whose}, times {factor:.4g}: that would agree with the reference")
                return Cause.WRONG_SCALE
        return Cause.UNEXPLAINED

    def _factor(self, group: Sequence[int]) -> float | None:
        """The one factor that makes these gradients right; None if there is none."""
        pairs = [p for j in group for p in self.reference.pairs(j, self.gradients[j])]
        own = sum(g * g for g, _ in pairs)
        factor = sum(g * r for g, r in pairs) / own if own else 0.0
        if len(pairs) < 2 or not factor:
            return None  # one number is a factor away from any other
        scaled = [(j, self.gradients[j]) for j in group]
        right = all(self.is_right(j, None if g is None else factor * g) for j, g in scaled)
        return factor if right else None

    def _is_zero(self, i: int) -> bool:
        gradient = self.gradients[i]
        return gradient is None or not bool(gradient.any())

    def _lost(self, i: int) -> Cause:
        """A gradient of exactly zero: where the dependence may be hidden."""
        variable = self.subject.variables[i]
        if variable.kind == "captured":
            self._see(f"{variable.name} is captured, moving it changes φ, but its gradient is zero")
            return Cause.CAPTURED_TENSOR
        own = {id(v.tensor) for v in self.subject.variables}
        for name, held in self.subject.held:
            if id(held) not in own and _same(held, variable.tensor):
                self._see(f"a function holds '{name}', which equals the argument {variable.name}")
                return Cause.CAPTURED_TENSOR
        return Cause.STRUCTURALLY_ZERO

    # ------------------------------------------------------------------ with a condition

    def _deep(self, i: int, local: Local) -> Cause:
        """What can be told knowing F."""
        name, u = self._name(i), self._exact
        if local.condition.constrained and not self._inner.solved:
            return self._inner.cause  # the forces in F are not those of a solution
        if local.around.degenerate is not None:
            kink = local.around.degenerate.sentence
            self._see(f"φ is at a kink, of which differences see both sides: {kink}")
            return Cause.REFERENCE_TOO_NOISY
        claimed, measured = self._cross(i, local)
        largest = max(float(claimed.norm()), float(measured.norm()))
        if float((claimed - measured).norm()) > self._resolution(local) * largest:
            self._see(
                f"{name}: along a direction, ∂F/∂a is {float(measured.norm()):.3g} by differences "
                f"of F, {float((claimed - measured).norm()):.3g} of which autograd does not see"
            )
            captured = self.subject.variables[i].kind == "captured"
            return Cause.CAPTURED_TENSOR if captured else Cause.MISSING_CROSS_DERIVATIVE
        exact = None if u is None else local.gradients(u)
        if self._is_zero(i) and (self._inner.solved or (exact and bool(exact[i].any()))):
            return self._lost(i)
        if u is not None and exact is not None and self.is_right(i, exact[i]):
            self._see(
                f"{name}: a dense solve with the same F at the same φ agrees with the reference"
            )
            return Cause.STALE_STATE if self._is_stale(local) else self._system(local, u).cause(i)
        if local.jacobian_defect > self._resolution(local):
            self._see(f"A differs from differences of F by {local.jacobian_defect:.2g}, relative")
            return Cause.WRONG_JACOBIAN
        singular = self._is_singular(local)
        if singular:
            self._see(
                f"A's least singular value over its greatest: {local.least_singular_value:.1g}"
            )
        if not self._inner.solved:  # what A is at another place says nothing of φ
            return self._inner.cause
        if singular:
            return Cause.NOT_ISOLATED
        drift = self._drift(i, local)
        if drift > 10 * self.rtol:
            self._see(
                f"{name}: φ satisfies F = 0 here, but leaves it as {name} moves (by {drift:.2g} of "
                "what F itself changes): the solver depends on it in another way"
            )
            return Cause.WRONG_CONDITION
        return Cause.UNEXPLAINED

    @functools.cached_property
    def _local(self) -> Local | None:
        """The condition around the solver's φ, if there is a condition and it can be evaluated."""
        subject = self.subject
        if subject.condition is None:
            return None
        try:
            return Local(subject.condition, subject.args, subject.phi(), subject.targets)
        except ImplicitGradError as error:
            self._see(f"the condition cannot be evaluated at φ: {error}")
            return None

    @functools.cached_property
    def _exact(self) -> Tensor | None:
        assert self._local is not None
        return self._local.exact(self.subject.cotangent(self._local.value))

    @functools.cached_property
    def _inner(self) -> Inner:
        assert self._local is not None
        return Inner(self.subject, self._local, self.rtol, self._see)

    def _system(self, local: Local, u: Tensor) -> System:
        v = local.rhs(self.subject.cotangent(local.value))
        everything = range(len(self.gradients))
        right = [self.is_right(j, self.gradients[j]) for j in everything]
        return System(
            local, v, u, self.gradients, right, self.subject.linear_solver, self.reports, self._see
        )

    def _cross(self, i: int, local: Local) -> tuple[Tensor, Tensor]:
        """∂F/∂a along a direction: as autograd knows it, and by differences of F at the same φ."""
        variable = self.subject.variables[i]
        direction = unit_direction(variable.tensor, torch.Generator().manual_seed(4))
        probes = torch.Generator().manual_seed(5)
        flat = Flat(local.around.phi)
        step = torch.finfo(variable.tensor.dtype).eps ** (1 / 3) * variable.size
        sides = [self._residual(i, sign * step * direction, local) for sign in (1.0, -1.0)]
        if any(side.shape != local.residual.shape for side in sides):
            return torch.zeros(1), torch.zeros(1)  # other constraints are active: another F
        slope = (sides[0] - sides[1]) / (2 * step)
        claimed, measured = [], []
        for _ in range(3):
            u = torch.randn(local.size, dtype=torch.float64, generator=probes)
            u = local.along_constraints(u.to(flat.device, flat.dtype))
            claimed.append(float(local.pullback(u)[i].cpu() @ direction.flatten()))
            measured.append(float(u @ slope))
        return torch.tensor(claimed), torch.tensor(measured)

    def _residual(self, i: int, shift: Tensor, local: Local) -> Tensor:
        """F at the same φ with one variable moved."""
        assert self.subject.condition is not None
        with self.subject.shifted({i: shift}) as args:
            return Local(self.subject.condition, args, local.value, ()).residual

    def _is_stale(self, local: Local) -> bool:
        """Whether the gradients are those of the derivatives of F at an earlier call."""
        elsewhere = self.subject.elsewhere
        try:
            phi = self.subject.phi(elsewhere)
            with self.subject.shifted(elsewhere) as args:
                there = Local(local.condition, args, phi, self.subject.targets_in(args))
                u = there.exact(self.subject.cotangent(local.value))
                expected = [] if u is None else there.gradients(u)
        except FAILURES:
            return False
        pairs = zip(expected, self.gradients, strict=False)
        same = [g is not None and bool(torch.isclose(e, g, rtol=1e-4).all()) for e, g in pairs]
        if not (same and all(same)):
            return False
        self._see("the gradients are those of F's derivatives at the arguments of an earlier call")
        return True

    def _drift(self, i: int, local: Local) -> float:
        """d/da F(φ(a), a) along a direction, over ∂F/∂a and ∂F/∂φ dφ/da there."""
        assert self.subject.condition is not None
        variable = self.subject.variables[i]
        direction = unit_direction(variable.tensor, torch.Generator().manual_seed(4))
        step = torch.finfo(variable.tensor.dtype).eps ** 0.25 * variable.size
        moved = []
        try:
            for sign in (1.0, -1.0):
                shift = {i: sign * step * direction}
                phi = self.subject.phi(shift)
                with self.subject.shifted(shift) as args:
                    moved.append(Local(self.subject.condition, args, phi, ()).residual)
            fixed = [self._residual(i, s * step * direction, local) for s in (1.0, -1.0)]
        except FAILURES:
            return 0.0
        total, partial = moved[0] - moved[1], fixed[0] - fixed[1]
        size = max(float(partial.norm()), float((total - partial).norm()))
        return float(total.norm()) / (size or 1.0)

    def _resolution(self, local: Local) -> float:
        """What differences of F can resolve."""
        return float(max(self.rtol, 100 * local.flat.eps ** (2 / 3)))

    def _is_singular(self, local: Local) -> bool:
        least = local.least_singular_value
        eps = local.flat.eps
        return least is not None and least <= min(SINGULAR * local.size * eps, eps ** (2 / 3))

    def _is_random(self, vague: bool) -> bool:
        """Whether equal calls differ, by enough to matter."""
        spread, size = max(self.values) - min(self.values), max(map(abs, self.values))
        if not spread > (1e-9 if vague else 0.1 * self.rtol) * size:
            return False
        seeded = []
        for _ in range(2):
            torch.default_generator.manual_seed(0)
            seeded.append(self.subject.value())
        self._see(
            "calls with the same arguments gave outer losses of "
            + ", ".join(f"{v:.6g}" for v in self.values)
            + (
                "; with torch.manual_seed before each call they agree"
                if seeded[0] == seeded[1]
                else "; torch.manual_seed before each call does not help"
            )
        )
        return True

    def _name(self, i: int) -> str:
        return self.subject.variables[i].name

    def _see(self, sentence: str) -> None:
        if sentence not in self.evidence:
            self.evidence.append(sentence)


def is_finite(gradient: Tensor | None) -> bool:
    """Whether there is no NaN and no infinity in it."""
    return gradient is None or bool(torch.isfinite(gradient).all())


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same values, and not just because they are trivial."""
    return x.shape == y.shape and x.dtype == y.dtype and bool(x.any()) and torch.equal(x, y)
