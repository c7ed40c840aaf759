"""An inner problem as recorded at its solution: linearised, solved and derived from the record."""

from __future__ import annotations

import abc
import dataclasses
from typing import TypeVar

from implicit_grad._curvature.checks import Checks
from implicit_grad._errors import GraphError
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._theorem.reattached import reattached
from implicit_grad._theorem.report import Reporting, solve_and_report
from implicit_grad._torch.pytree import Tensors
from implicit_grad._warnings import Place

M = TypeVar("M", bound="Method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How gradients are taken, chosen once for all calls: what makes A, and what solves Aᵀu = v."""

    linear_solver: LinearSolver
    reporting: Reporting
    curvature: Curvature = "auto"
    checks: Checks = dataclasses.field(default_factory=Checks)  # shared by all calls

    def for_call(self: M) -> M:
        """The method for the backward pass of one call."""
        solver = self.linear_solver.for_call()
        if solver is self.linear_solver:
            return self
        return dataclasses.replace(self, linear_solver=solver)


class Recorded(abc.ABC):
    """F around one φ, whose graph was made when φ was found; what `Problem` asks of it.

    Attributes:
        method: how gradients are taken.
        finding: what a check of products found.
        place: the user's line that asked for φ.
    """

    method: Method
    finding: Finding | None
    place: Place

    @property
    def curvature(self) -> Curvature:
        """The kind of products: that asked for, or differences if it was found to be wrong."""
        if self.finding is not None and self.finding.differences_take_over:
            return "finite_difference"
        return self.method.curvature

    def recorded(self, curvature: Curvature | None = None) -> tuple[Linearization, Tensors]:
        """F around φ from the record, and the tensors that stand for the arguments in it."""
        around, inputs = self._from_record(curvature or self.curvature)
        around.finding = self.finding
        return around, inputs

    def linearize(self, phi: Tensors, inputs: Tensors) -> Linearization:
        """F around φ as recorded, differentiable with respect to φ and the inputs."""
        self._check_twice()
        return reattached(self.recorded, self.method.curvature, phi, inputs)

    def solve_adjoint(self, around: Linearization, v: Tensors) -> Tensors:
        """u with Aᵀu = v; what came of it is reported."""
        return solve_and_report(
            self.method.linear_solver, around, v, self.method.reporting, self.place
        )

    def _check_twice(self) -> None:
        """Raise if there are no derivatives of derivatives."""
        refusal = self._refusal()
        if refusal is None and (found := self.finding or self._third()) is not None:
            refusal = f"second derivatives are not available: {found.sentence}"
        if refusal is not None:
            raise GraphError(refusal, anchor="second-derivatives")

    @abc.abstractmethod
    def _from_record(self, curvature: Curvature) -> tuple[Linearization, Tensors]:
        """F around φ by this kind of products, and the tensors that stand for the arguments."""

    def _refusal(self) -> str | None:
        """Why the record has no second derivatives, whatever was found, if it has none."""
        return None

    @abc.abstractmethod
    def _third(self) -> Finding | None:
        """What a check of third derivatives found."""
