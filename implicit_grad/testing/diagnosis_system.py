"""A wrong gradient at a φ where a dense solve gives the right one: which system was solved?"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._theorem.report import Report
from implicit_grad.testing.check_report import Cause
from implicit_grad.testing.local_problem import Local, solve_dense

_SAME = 1e-4  # how well a suspect has to explain the gradients, relative
_ASYMMETRIC, _NEGATIVE = 1e3, -1e2  # times rounding


class System:
    """The gradients as they are against those of other, wrong systems.

    Where ∂F/∂a has full rank, the u behind the gradients −(∂F/∂a)ᵀu is recovered from them and put
    into Aᵀu = v.
    """

    def __init__(
        self,
        local: Local,
        v: Tensor,
        u: Tensor,
        gradients: list[Tensor | None],
        right: list[bool],
        solver: LinearSolver | None,
        reports: list[Report],
        see: Callable[[str], None],
    ) -> None:
        self.local, self.v, self.u, self.right = local, v, u, right
        self.solver, self.reports, self._see = solver, reports, see
        self.gradients = [
            torch.zeros(t.numel(), dtype=torch.float64) if g is None else g.cpu()
            for g, t in zip(gradients, local.targets, strict=True)
        ]

    def cause(self, i: int) -> Cause:
        """Why the gradient of target i is wrong."""
        return self._approximation() or self._operator() or self._suspect() or self._of_target(i)

    def _approximation(self) -> Cause | None:
        """One that the reports own up to."""
        for report in self.reports[-1:]:
            if report.substitute == "early_stopped":  # nobody asked for it: A is indefinite
                continue
            if report.damping or report.curvature == "gauss_newton" or report.substitute:
                self._see(
                    f"the report says: damping {report.damping}, curvature {report.curvature}, "
                    f"substitute {report.substitute}"
                )
                return Cause.APPROXIMATION
            if report.filter_error is not None and report.filter_error <= _SAME:
                self._see("the linear solver is for another function of A than its inverse")
                return Cause.APPROXIMATION
        return None

    def _operator(self) -> Cause | None:
        """A matrix that the linear solver is not made for."""
        if self.solver is None or not self.solver.symmetric_only:
            return None
        if self._sees_asymmetry():
            return Cause.ASYMMETRIC_OPERATOR
        least = self.local.least_eigenvalue
        if least is not None and least < _NEGATIVE * self.local.flat.eps:
            self._see(f"A's least eigenvalue over its greatest in size is {least:.2g}")
            return Cause.NEGATIVE_CURVATURE
        return None

    def _sees_asymmetry(self) -> bool:
        defect = self.local.asymmetry
        if defect <= _ASYMMETRIC * self.local.flat.eps:
            return False
        self._see(f"|wᵀAu − uᵀAw| is {defect:.2g} of ‖A‖ for random unit vectors u and w")
        return True

    @functools.cache  # noqa: B019  (one per failed check)
    def _suspect(self) -> Cause | None:
        """A known mistake that explains the gradients of all targets at once."""
        if not bool(torch.isfinite(torch.cat(self.gradients)).all()):
            return None
        if self._explains(-self.u):
            self._see("all gradients are the negative of those of a dense solve")
            return Cause.WRONG_SIGN
        matrix, v = self.local.matrix, self.v
        other = solve_dense(matrix, v)
        if other is not None and self._explains(other):
            self._see("the gradients are those of A u = v")
            return Cause.MISSING_TRANSPOSE
        blocks = self._block_diagonal()
        if blocks is not None and self._explains(blocks):
            self._see("the gradients are those of A's diagonal blocks, one for each tensor of φ")
            return Cause.BLOCK_DIAGONAL
        if self._explains(v):
            self._see("the gradients are those of u = v: no system was solved")
            return Cause.LINEAR_SOLVE_NOT_CONVERGED
        for k, iterate in enumerate(_conjugate_gradients(matrix.mT, v, 4 * len(v))):
            if self._explains(iterate):
                self._see(
                    f"the gradients are those of CG after {k} iterations on {len(v)} unknowns"
                )
                if self._sees_asymmetry():
                    return Cause.ASYMMETRIC_OPERATOR
                return Cause.LINEAR_SOLVE_NOT_CONVERGED
        return self._recovered()

    def _recovered(self) -> Cause | None:
        """What the u that the gradients came from does solve."""
        cross, gradients = torch.cat(self.local.cross, dim=1), torch.cat(self.gradients)
        factor = self._common_factor()
        if factor is not None:
            self._see(f"all gradients are {factor:.4g} times those of a dense solve")
            return Cause.WRONG_SCALE
        if int(torch.linalg.matrix_rank(cross)) < len(self.v):
            return None
        u = torch.linalg.lstsq(cross.mT.double(), -gradients[:, None]).solution[:, 0]
        if float((cross.mT.double() @ u + gradients).norm()) > _SAME * float(gradients.norm()):
            return None  # there is no such u
        v, product = self.v.double(), self.local.matrix.mT.double() @ u
        size = float(v.norm())
        if len(v) > 2:
            pair = torch.stack([product, u], dim=1)
            weights = torch.linalg.lstsq(pair, v[:, None]).solution[:, 0]
            if float((pair @ weights - v).norm()) <= _SAME * size:
                a, c = weights.tolist()
                self._see(f"the u behind the gradients solves ({a:.4g} Aᵀ + {c:.4g} I) u = v")
                return Cause.SHIFTED_OPERATOR
        residual = float((v - product).norm()) / size
        self._see(f"the u behind the gradients has ‖v − Aᵀu‖/‖v‖ = {residual:.2g}")
        if self.local.condition.symmetric and self._sees_asymmetry():
            return Cause.ASYMMETRIC_OPERATOR
        return Cause.LINEAR_SOLVE_NOT_CONVERGED

    def _of_target(self, i: int) -> Cause:
        """A mistake in the last product, with ∂F/∂a of one target."""
        expected, found = self.local.gradients(self.u)[i].cpu(), self.gradients[i]
        if float((expected + found).norm()) <= _SAME * float(found.norm()):
            self._see("this gradient alone is the negative of that of a dense solve")
            return Cause.WRONG_SIGN
        if any(self.right):
            self._see("other gradients are right, so that the linear solve was: ∂F/∂a is not")
            return Cause.MISSING_CROSS_DERIVATIVE
        cross = torch.cat(self.local.cross, dim=1)
        if int(torch.linalg.matrix_rank(cross)) == len(self.v):
            self._see("no u at all gives these gradients as −(∂F/∂a)ᵀu: ∂F/∂a is not right")
            return Cause.MISSING_CROSS_DERIVATIVE
        return Cause.LINEAR_SOLVE_NOT_CONVERGED

    def _explains(self, u: Tensor) -> bool:
        """Whether the gradients are −(∂F/∂a)ᵀu."""
        expected, found = torch.cat(self.local.gradients(u)).cpu(), torch.cat(self.gradients)
        return float((expected - found).norm()) <= _SAME * float(found.norm())

    def _common_factor(self) -> float | None:
        expected, found = torch.cat(self.local.gradients(self.u)).cpu(), torch.cat(self.gradients)
        square = float(expected @ expected)
        if len(found) < 2 or not square:
            return None
        factor = float(expected @ found) / square
        misfit = float((factor * expected - found).norm())
        return factor if factor and misfit <= _SAME * float(found.norm()) else None

    def _block_diagonal(self) -> Tensor | None:
        """The solution of the system without what couples the tensors of φ."""
        sizes = [p.numel() for p in self.local.around.phi]
        if len(sizes) < 2:
            return None
        blocks, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            block = solve_dense(self.local.matrix[part, part].mT, self.v[part])
            if block is None:
                return None
            blocks.append(block)
            start += size
        return torch.cat(blocks)


def _conjugate_gradients(matrix: Tensor, rhs: Tensor, most: int) -> list[Tensor]:
    """The textbook iterates of CG from 0, for any matrix."""
    x, r = torch.zeros_like(rhs), rhs.clone()
    p, iterates = r.clone(), [torch.zeros_like(rhs)]
    for _ in range(most):
        rr, product = r @ r, matrix @ p
        pMp = p @ product
        if not float(pMp) or float(rr) < 1e-28 * float(rhs @ rhs):
            break
        x = x + rr / pMp * p
        r = r - rr / pMp * product
        p = r + (r @ r) / rr * p
        if not bool(torch.isfinite(x).all()):
            break
        iterates.append(x)
    return iterates
