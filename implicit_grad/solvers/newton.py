"""Newton's method for roots, with Jacobians by autograd."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._curvature.jacobian import Jacobian
from implicit_grad._errors import InvalidArgumentError
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.given import SolveFunction, as_linear_solver
from implicit_grad._linear_solvers.gmres import GMRES
from implicit_grad._theorem.adjoint import solve_newton
from implicit_grad.solvers._roots import Method, Residual, RootFinding

# As many unknowns, in each task, have a dense Jacobian by default.
_DENSE = 100
# Beyond, a step may take as many products: with fewer digits it still leads downhill.
_PRODUCTS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton(RootFinding):
    """φ ← φ + t d with (∂residual/∂φ) d = −residual, t = 1 or halved until ‖residual‖ falls.

    Near a root with a regular Jacobian the digits double with each step. Up to 100 unknowns (in
    each task) the Jacobian is dense, one product a row; beyond, `GMRES` solves for d to three
    digits, or as far as 60 products lead (Dembo, Eisenstat and Steihaug, 1982, Inexact Newton
    methods).

    Args:
        linear_solver: for d, in the place of these two: `ig.MINRES()` where the Jacobian is
            symmetric, `ig.Exact()`, or a function `solve(matvec, b)`.
        maxiter: the most steps.
        tol: stop when ‖residual‖₂ is at most this.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1. Without either,
            when it has fallen by eps^(3/4): 2e-12 in float64, 6e-6 in float32.
        tasks: φ is a batch of separate problems along the first dimension of its tensors; each
            has a step length of its own, and stops by itself.

    >>> import torch
    >>> Newton().find_root(lambda phi: phi**3 - 8, torch.tensor([1.0]))
    tensor([2.])
    """

    linear_solver: LinearSolver | SolveFunction | None = None
    maxiter: int = 50
    halvings: ClassVar[int] = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        self._given()

    def method(self, at: Residual, x: Tensor, f: Tensor) -> Method:
        given = self._given()
        if given is not None:
            return _Iterative(at, given)
        return (
            _Dense(at)
            if x.shape[1] <= _DENSE
            else _Iterative(at, GMRES(rtol=1e-3, maxiter=_PRODUCTS))
        )

    def _given(self) -> LinearSolver | None:
        if self.linear_solver is None:
            return None
        return as_linear_solver(self.linear_solver, "Newton", "GMRES(), MINRES(), Exact()")


class _Dense(Method):
    def __init__(self, at: Residual) -> None:
        self._at = at

    def direction(self, x: Tensor, f: Tensor) -> Tensor:
        around = _linearised(self._at, x)
        jacobian = f.new_empty(*f.shape, f.shape[1])
        for i in range(f.shape[1]):
            row = torch.zeros_like(f)
            row[:, i] = 1.0
            jacobian[:, i] = self._at.rows(around.smooth_transposed(self._at.tensors(row)))
        solution: Tensor
        solution, info = torch.linalg.solve_ex(jacobian, -f[:, :, None])
        singular = (info != 0) | ~torch.isfinite(solution).all(dim=(1, 2))
        if bool(singular.any()) and bool(torch.isfinite(jacobian).all()):
            least = torch.linalg.pinv(jacobian[singular]) @ -f[singular][:, :, None]
            solution[singular] = least
        return solution[:, :, 0]


class _Iterative(Method):
    def __init__(self, at: Residual, solver: LinearSolver) -> None:
        self._at, self._solver = at, solver

    def direction(self, x: Tensor, f: Tensor) -> Tensor:
        return self._at.rows(solve_newton(self._solver, _linearised(self._at, x)).x)


def _linearised(at: Residual, x: Tensor) -> Jacobian:
    phi, residual = at.recorded(x)
    if not any(f.requires_grad for f in residual):
        raise InvalidArgumentError(
            "Newton: torch sees no way from phi to the residual (was phi detached, or converted to "
            "NumPy, inside it?): Broyden() and FixedPoint() need no derivatives"
        )
    return Jacobian(residual, phi)
