"""The default where nothing is known of a matrix: GMRES, and NormalCG where that gets nowhere."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from implicit_grad._errors import GraphError, Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator
from implicit_grad._linear_solvers.gmres import GMRES
from implicit_grad._linear_solvers.normal_cg import NormalCG
from implicit_grad._linear_solvers.small_systems import TogetherIfSmall


@dataclasses.dataclass(frozen=True, kw_only=True)
class General(TogetherIfSmall):
    """`GMRES()`, and `NormalCG()` for the few systems on which that fails.

    GMRES takes a third to a thirtieth of the products (measured), and none that differentiate the
    residual twice. But with fewer vectors than unknowns it stands still where the matrix turns
    vectors around, and a singular matrix can leave it without a solution that there is.
    """

    symmetric_only: ClassVar[bool] = False

    def target(self, operator: Operator, rhs: Tensor) -> float:
        """The relative residual at which GMRES ends."""
        return GMRES().target(operator, rhs)

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        first = GMRES()._solve(operator, rhs, unit, verify)
        if first.status.ok or first.status == Status.NONFINITE_OPERATOR:
            return first
        try:
            second = NormalCG()._solve(operator, rhs, unit, verify)
        except GraphError:  # the residual cannot be differentiated twice
            return first
        better = _residual(second) < _residual(first) or second.status.ok
        return dataclasses.replace(
            second if better else first, iterations=first.iterations + second.iterations
        )


def _residual(solution: LinearSolution) -> float:
    return float("inf") if solution.residual is None else solution.residual
