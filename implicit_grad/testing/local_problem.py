"""A condition around one φ, measured: F, A, ∂F/∂a, dense solutions, the exact solution nearby."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import Condition
from implicit_grad._curvature.checks import Checks
from implicit_grad._linear_solvers.exact import Exact
from implicit_grad._theorem.adjoint import solve_newton
from implicit_grad._theorem.report import Reporting
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._wrapper.evaluation import Evaluation, Setup

LARGEST = 500  # unknowns, for dense measurements
_NEWTON_STEPS, _HALVINGS = 30, 12


class Local:
    """F(·, a) around φ; everything is measured when it is first asked for.

    `targets` are the tensors to differentiate by, as they stand among the arguments, in the
    condition, or captured by its functions; one that F does not know of has a zero derivative.
    """

    def __init__(
        self,
        condition: Condition,
        args: Sequence[Any],
        phi: Any,
        targets: Tensors,
    ) -> None:
        self.condition, self.args, self.targets = condition, tuple(args), targets
        self.value = phi
        self.phi, self._phi_tree = pytree.unknowns(phi)
        inputs, tree = pytree.flatten((self.args, {}, condition.parameters))
        setup = Setup(
            condition=condition,
            linear_solver=Exact(),
            reporting=Reporting(on_failure="ignore"),
            checks=Checks("never"),
        )
        evaluation = Evaluation(lambda _: phi, setup, tree, inputs)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            # F is the same function each time, also with dropout
            torch.default_generator.manual_seed(0)
            evaluation.solve_and_record(inputs)
            self.around, stand_ins = evaluation.recorded()
        originals = (*inputs, *evaluation.captured)
        # what requires no grad is held fixed in the record, and so has no derivative there; a
        # tensor that is both passed and captured has two stand-ins
        pairs = [(t, s) for t, s in zip(originals, stand_ins, strict=True) if s.requires_grad]
        self._where = [[s for t, s in pairs if t is target] for target in targets]
        self.flat = Flat(self.around.phi)
        self.residual = self._vector(self.around.residual)

    @property
    def size(self) -> int:
        """The number of unknowns, multipliers included."""
        return self.residual.numel()

    @property
    def is_small(self) -> bool:
        """Whether dense measurements are affordable."""
        return self.size <= LARGEST

    def at(self, phi: Any) -> Local:
        """The local problem at another φ."""
        return Local(self.condition, self.args, phi, self.targets)

    @functools.cached_property
    def matrix(self) -> Tensor:
        """A, dense."""
        eye = torch.eye(self.size, dtype=self.flat.dtype, device=self.flat.device)
        with torch.no_grad():
            rows = [self._vector(self.around.transposed(self.flat.unravel(e))) for e in eye]
        return torch.stack(rows, dim=0)  # row i of A is Aᵀeᵢ

    @functools.cached_property
    def cross(self) -> list[Tensor]:
        """∂F/∂a, dense, for each target: (unknowns, elements)."""
        eye = torch.eye(self.size, dtype=self.flat.dtype, device=self.flat.device)
        rows = [self.pullback(e) for e in eye]
        return [torch.stack([row[i] for row in rows]) for i in range(len(self.targets))]

    def pullback(self, u: Tensor) -> list[Tensor]:
        """(∂F/∂a)ᵀu for each target, as a vector of float64."""
        known = [s for group in self._where for s in group]
        with torch.no_grad():
            found = iter(self.around.pullback(self.flat.unravel(u), known))
            return [
                sum((next(found) for _ in group), torch.zeros_like(t)).double().flatten()
                for group, t in zip(self._where, self.targets, strict=True)
            ]

    def along_constraints(self, u: Tensor) -> Tensor:
        """u without what the forces of constraints, which F finds anew, would do to uᵀF."""
        n = sum(p.numel() for p in self.phi)
        if n == self.size:
            return u
        across, _ = torch.linalg.qr(self.matrix[n:, :n].mT)
        return torch.cat([u[:n] - across @ (across.mT @ u[:n]), u[n:]])

    def rhs(self, v: Sequence[Tensor]) -> Tensor:
        """The right-hand side of Aᵀu = v for the outer gradient v."""
        return self._vector(self.around.augment(tuple(v)))

    def exact(self, v: Sequence[Tensor]) -> Tensor | None:
        """u with Aᵀu = v by a dense solve; None where A is singular or too large."""
        return solve_dense(self.matrix.mT, self.rhs(v)) if self.is_small else None

    def gradients(self, u: Tensor) -> list[Tensor]:
        """−(∂F/∂a)ᵀu for each target."""
        return [-g for g in self.pullback(u)]

    @functools.cached_property
    def asymmetry(self) -> float:
        """The greatest |wᵀAu − uᵀAw| over ‖A‖, for random unit vectors u and w."""
        random = torch.Generator().manual_seed(0)
        worst = 0.0
        for _ in range(3):
            u, w = (self._unit(random) for _ in range(2))
            with torch.no_grad():
                au = self._vector(self.around.transposed(self.flat.unravel(u)))
                aw = self._vector(self.around.transposed(self.flat.unravel(w)))
            size = max(float(au.norm()), float(aw.norm()))
            worst = max(worst, abs(float(w @ au - u @ aw)) / size if size else 0.0)
        return worst

    @functools.cached_property
    def least_eigenvalue(self) -> float | None:
        """Of A's symmetric part, relative to the greatest; None if A is large or bordered."""
        if not self.is_small or not self.condition.definite or not self.size:
            return None
        values = torch.linalg.eigvalsh((self.matrix + self.matrix.mT) / 2)
        largest = float(values.abs().max())
        return float(values[0]) / largest if largest else 0.0

    @functools.cached_property
    def least_singular_value(self) -> float | None:
        """Of A, relative to the greatest."""
        if not self.is_small or not self.size:
            return None
        values = torch.linalg.svdvals(self.matrix)
        return float(values[-1] / values[0]) if float(values[0]) else 0.0

    @functools.cached_property
    def jacobian_defect(self) -> float:
        """How far Aᵀw is from the derivative of wᵀF along φ, by differences, relative."""
        if self.size != sum(p.numel() for p in self.phi):
            return 0.0  # multipliers follow φ
        random = torch.Generator().manual_seed(1)
        p = self._unit(random)
        size = float(torch.cat([t.detach().double().flatten() for t in self.phi]).norm()) or 1.0
        step = self.flat.eps ** (1 / 3) * size
        there = [self.at(self.moved(sign * step * p)).residual for sign in (1, -1)]
        measured = (there[0] - there[1]) / (2 * step)
        with torch.no_grad():
            claimed = self._vector(self.around.unscaled_product(self.flat.unravel(p)))
            if self.around.scale is not None:
                scaled = self.around.with_scale(self.flat.unravel(claimed), self.flat.unravel(p))
                claimed = self._vector(scaled)
        largest = max(float(measured.norm()), float(claimed.norm()))
        return float((measured - claimed).norm()) / largest if largest else 0.0

    @functools.cached_property
    def solution(self) -> Local | None:
        """The condition around its own solution, from φ by damped Newton steps; None if none."""
        here, floor = self, 1e3 * self.flat.eps
        if not self.is_small:
            return None
        for _ in range(_NEWTON_STEPS):
            step = newton_step(here)
            if step is None:
                return None
            size = float(here._vector(here.phi).norm()) or 1.0
            if float(step.norm()) <= floor * size:
                break
            there = here._better(step)
            if there is None:
                break
            here = there
        step = newton_step(here)
        if step is None:
            return None
        size = float(here._vector(here.phi).norm()) or 1.0
        return here if float(step.norm()) <= self.flat.eps**0.5 * size else None

    def _better(self, step: Tensor) -> Local | None:
        """F a part of the step on, where it is smaller."""
        for _ in range(_HALVINGS):
            there = self.at(self.moved(step))
            if float(there.residual.norm()) < float(self.residual.norm()):
                return there
            step = step / 2
        return None

    def moved(self, step: Tensor) -> Any:
        """φ + step, in φ's form; multipliers in the step, if there are some, are left out."""
        parts = Flat(self.phi).unravel(step[: sum(p.numel() for p in self.phi)])
        return self._phi_tree.rebuild(
            [p.detach() + d.to(p.dtype) for p, d in zip(self.phi, parts, strict=True)],
            owned=True,
        )

    def distance(self, other: Local) -> float:
        """‖φ − φ'‖ over the greater of the two norms."""
        here, there = self._vector(self.phi), self._vector(other.phi)
        size = max(float(here.norm()), float(there.norm()))
        return float((here - there).norm()) / size if size else 0.0

    def _unit(self, random: torch.Generator) -> Tensor:
        vector = torch.randn(self.size, dtype=torch.float64, generator=random)
        vector /= float(vector.norm()) or 1.0
        return vector.to(self.flat.device, self.flat.dtype)

    def _vector(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.flat.ravel([t.detach() for t in tensors])


def newton_step(local: Local) -> Tensor | None:
    """d with A d = −F, in the form of F's unknowns; None where A is singular."""
    with torch.no_grad():
        solved = solve_newton(Exact(max_size=LARGEST), local.around)
    step = local.flat.ravel(solved.x)
    return step if bool(torch.isfinite(step).all()) else None


def solve_dense(matrix: Tensor, rhs: Tensor) -> Tensor | None:
    """matrix⁻¹ rhs; None where the matrix is singular."""
    x, info = torch.linalg.solve_ex(matrix, rhs)
    return x if not int(info) and bool(torch.isfinite(x).all()) else None
