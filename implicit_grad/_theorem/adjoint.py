"""The linear systems around φ, as linear solvers see them: one flat vector, one flat operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_grad._errors import GraphError, Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator
from implicit_grad._linear_solvers.flat import told_flat
from implicit_grad._theorem.linearization import Linearization, SwitchedToDifferences
from implicit_grad._torch.pytree import Flat, Tensors


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What is known of, and asked from, a solve: `mu` and `rtol_error` of `Operator`."""

    mu: float | None = None
    rtol_error: float | None = None


class Solved(NamedTuple):
    """What came of solving a system around φ.

    Attributes:
        x: the solution, in the form of φ.
        solutions: how it was found: one for each task, or for the only one.
        products: with A, that were taken for all of them.
        solver: what solved it.
        convex: what stood in for `around`, if products with it were taken.
    """

    x: Tensors
    solutions: tuple[LinearSolution, ...]
    products: int
    solver: LinearSolver
    convex: Linearization | None = None

    @property
    def damping(self) -> float:
        """What the linear solver added to A's diagonal."""
        return self.solver.damping

    def status(self, around: Linearization) -> Status:
        """The worst of all solves."""
        return Status.worst(judged(solution, around) for solution in self.solutions)


def judged(solution: LinearSolution, around: Linearization) -> Status:
    """How one solve ended, in the light of what it is for."""
    least, _ = solution.extremes or (0.0, 0.0)
    if around.is_wrong and solution.status is not Status.ZERO_RHS:
        return Status.WRONG_PRODUCT  # and what else was seen may come of that
    if not solution.status.ok:
        return solution.status
    filtered = solution.filter_error is not None  # then φ need not be a minimum
    met = least < 0 and not (solution.is_flat or solution.substitute or filtered)
    if around.is_hessian and met:
        return Status.NEGATIVE_CURVATURE  # whatever the system's solution is, φ is no minimum
    return around.degenerate or solution.status


def solve_adjoint(
    solver: LinearSolver,
    around: Linearization,
    v: Tensors,
    verify: bool,
    accuracy: Accuracy = Accuracy(),
) -> Solved:
    """Solve Aᵀu = v; to a tolerance where u is differentiated, or v is itself a derivative.

    Raises:
        GraphError: v is itself a derivative, and u would not be linear in it; or the linear solver
            is for a diagonal λ, and it is a matrix.
    """
    if solver.needs_scale and around.linear_part:
        raise GraphError(
            f"{type(solver).__name__} is for a lam that is a number, or one for each tensor or "
            "element, and not for a LowRank matrix: use CG() or MINRES()"
        )
    if around.is_differentiated or around.is_adjoint:
        solver = solver.to_tolerance()
    with torch.no_grad():
        solved = _solve(solver, around, around.augment(v), verify, accuracy, transposed=True)
        truncated = {Status.TRUNCATED, Status.FIRST_ORDER} & {s.status for s in solved.solutions}
        if around.is_adjoint and solver.keeps_start:
            raise GraphError(
                "second derivatives through EarlyStopped are not available: use CG(rtol=...) and "
                "train until the inner problem is solved",
                anchor="second-derivatives",
            )
        if around.is_adjoint and (truncated or solved.damping):
            raise GraphError(
                "second derivatives of a truncated or damped solve would not be those of its first "
                "derivatives: solve to a tolerance, such as CG() without damping",
                anchor="second-derivatives",
            )
        return solved._replace(x=around.recover(solved.x, v))


def solve_newton(solver: LinearSolver, around: Linearization) -> Solved:
    """Solve A d = −F: the way from φ to a solution of the inner problem, to first order."""
    with torch.no_grad():
        rhs = tuple(-f for f in around.residual)  # which has nothing to do with gradients' v
        return _solve(solver.cold(), around, rhs, False, Accuracy(), transposed=False)


def _solve(
    solver: LinearSolver,
    around: Linearization,
    rhs: Tensors,
    verify: bool,
    accuracy: Accuracy,
    transposed: bool,
) -> Solved:
    flat = Flat(rhs, around.n_tasks)
    system = _System(around, flat)
    solve = solver.solve if around.n_tasks is None else solver.solve_tasks
    while True:
        operator, vector = system.operator(accuracy, transposed), flat.ravel(rhs)
        try:
            found = solve(operator, vector, verify)
        except SwitchedToDifferences:
            continue
        x, solutions = (found.x, [found]) if isinstance(found, LinearSolution) else found
        if around.is_hessian:
            solutions = told_flat(solutions, operator, vector)
        if around.said_symmetric and solver.symmetric_only:
            solutions = _held_to_symmetry(solutions, operator, vector)
        products, convex = system.products, system.convex
        return Solved(flat.unravel(x), tuple(solutions), products, solver, convex)


def _held_to_symmetry(
    found: list[LinearSolution], operator: Operator, like: Tensor
) -> list[LinearSolution]:
    """Solutions, which the user's word may have spoilt; a small residual needs nobody's word."""
    proven = [s.status.ok and s.status != Status.TRUNCATED for s in found]
    if all(proven):
        return found
    return [
        s if fine or symmetric else dataclasses.replace(s, status=Status.NOT_SYMMETRIC)
        for s, fine, symmetric in zip(found, proven, operator.is_symmetric(like), strict=True)
    ]


class _System:
    """A flat operator for a linearisation, with a count of its products."""

    def __init__(self, around: Linearization, flat: Flat) -> None:
        self._around, self._flat, self.products = around, flat, 0
        self.convex: Linearization | None = None
        self._scale = _flat_scale(around.scale, around.phi, flat)

    def operator(self, accuracy: Accuracy, transposed: bool) -> Operator:
        """Aᵀ, or A."""
        pair = self._around.unscaled_transposed, self._around.unscaled_product
        there, back = pair if transposed else reversed(pair)
        return Operator(
            matvec=self._flat_product(there),
            rmatvec=self._flat_product(back),
            scale=self._scale,
            eps=max(self._flat.eps, self._around.precision),
            convex=self._convex(),
            mu=accuracy.mu,
            rtol_error=accuracy.rtol_error,
            is_hessian=self._around.is_hessian,
            training=self._around.training,
            spans=self._around.training_times,
            either_sign=self._around.said_symmetric,
            matrix=self._around.matrix,
        )

    def _convex(self) -> Callable[[Tensor], Tensor] | None:
        make = self._around.convex
        if make is None:
            return None

        def product(u: Tensors) -> Tensors:
            if self.convex is None:  # its graph is built only if a product is asked for
                self.convex = make()
            return self.convex.unscaled_transposed(u)

        return self._flat_product(product)

    def _flat_product(self, smooth: Callable[[Tensors], Tensors]) -> Callable[[Tensor], Tensor]:
        flat, scale = self._flat, self._scale

        def matvec(x: Tensor) -> Tensor:
            self.products += 1
            product = flat.ravel(smooth(flat.unravel(x)))
            if scale is None:
                return product
            if isinstance(scale, float):
                return product.add_(x, alpha=scale)
            return product.addcmul_(scale, x)

        return matvec


def _flat_scale(scale: Tensors | None, like: Tensors, flat: Flat) -> float | Tensor | None:
    if not scale:
        return None
    if all(s is scale[0] and s.dim() == 0 for s in scale):
        return float(scale[0].detach())
    return flat.ravel([s.detach().expand_as(x) for s, x in zip(scale, like, strict=True)])
