"""What takes the place of (H + λ)⁻¹ where the loss's own curvature H is not positive."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator
from implicit_grad._linear_solvers.lanczos import Filtering
from implicit_grad._linear_solvers.minres import MINRES
from implicit_grad._options import require_count, require_fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositivePart(Filtering):
    """The solution without the loss's negative curvature: u = (λ + H₊)⁻¹ v, for `proximal`.

    H₊ is H = ∇²loss with its negative eigenvalues set to 0, the nearest positive semi-definite
    matrix (Higham, 1988, Computing a nearest symmetric positive semidefinite matrix). Where H has
    none this is the solution of A u = v, A = H + λ. Where it has, that system may be near singular
    (h ≈ −λ), and beyond that its solution has the opposite sign of what gradient steps do: a step
    of length t = 1/λ multiplies by 1 − t·h > 1, and λ/(h + λ) is negative. Here such directions
    pass as in first-order MAML, and dθ = λu is never longer than v.

    By Lanczos' process: `maxiter` products make the best polynomial of their number. With λ per
    tensor or element, H's curvatures are those in units of λ, of λ^(−1/2) H λ^(−1/2), and lengths
    those of λ^(−1/2) v. λ may not be a `LowRank` matrix.

    A solution that is differentiated again (create_graph=True) is one of A u = v, by `MINRES()`:
    negative curvature counts there, and is told of.

    Args:
        maxiter: most products to take, and vectors of φ's size to keep. This alone is a fixed
            budget, which does not warn.
        rtol: stop when the last products changed the result by less than this, relative; None
            means eps^(2/3) for the coarsest dtype among the tensors.

    >>> PositivePart(maxiter=3)
    PositivePart(maxiter=3, rtol=None)
    """

    maxiter: int = 20
    rtol: float | None = None

    needs_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count(self, "maxiter", 1)
        require_fraction(self, "rtol")

    def to_tolerance(self) -> LinearSolver:
        return MINRES()

    def _filtered(self, operator: Operator, rhs: Tensor) -> list[LinearSolution]:
        lam = operator.scale
        assert lam is not None, "implicit lets proximal pass only"
        if isinstance(lam, float):

            def inverse(curvatures: Tensor) -> Tensor:
                return 1 / curvatures.clamp(min=lam)

            return self._apply(operator, rhs, inverse)
        root = lam.sqrt()
        in_units = dataclasses.replace(operator, matvec=lambda x: operator.matvec(x / root) / root)

        def inverse_in_units(curvatures: Tensor) -> Tensor:
            return 1 / curvatures.clamp(min=1)

        found = self._apply(in_units, rhs / root, inverse_in_units)
        x = torch.stack([solution.x for solution in found]) / root
        rows = zip(found, x, lam.expand_as(rhs), strict=True)
        return [_in_own_units(solution, x, of_one) for solution, x, of_one in rows]


def _in_own_units(solution: LinearSolution, x: Tensor, lam: Tensor) -> LinearSolution:
    """A solution in units of λ as the x that it stands for."""
    sizes = [abs(h) * float(lam.max()) for h in solution.extremes or ()]
    return dataclasses.replace(solution, x=x, extremes=None, norm=max(sizes, default=None))
