"""How the library speaks of trouble: statuses with their sentences, exceptions and the warning.

A failed solve is a value with a sentence attached (`Status`); the caller decides whether it warns,
raises or stays quiet. Bad input is an exception at once, before any work.
"""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Iterable

import numpy as np
from torch import Tensor

PAGE = "docs/why.md"  # from what is seen to cause and cure; anchors are places there


def anchor_of(name: str) -> str:
    """The place on the page for a status or a cause."""
    return name.lower().replace("_", "-")


class ImplicitGradWarning(UserWarning):
    """Numerical trouble in a hypergradient: it was computed, but should not be trusted blindly.

    Its `anchor` is the place in docs/why.md that says more.
    """

    anchor = "implicit-grad-warning"

    def __init__(self, message: str = "", anchor: str | None = None) -> None:
        super().__init__(message)
        self.anchor = anchor or self.anchor

    def __str__(self) -> str:
        return f"{super().__str__()} (see {PAGE}#{self.anchor})"


class ImplicitGradError(RuntimeError):
    """Base class of every exception that the library raises on purpose.

    Its `anchor` is the place in docs/why.md that says more; a note to the exception names it where
    that place is about this very message.
    """

    anchor = "implicit-grad-error"

    def __init__(self, message: str = "", anchor: str | None = None) -> None:
        super().__init__(message)
        if anchor is not None:
            self.anchor = anchor
            if sys.version_info >= (3, 11):
                self.add_note(f"see {PAGE}#{anchor}")


class InvalidArgumentError(ImplicitGradError, ValueError):
    """An argument has a value that cannot work; nothing has been computed or changed."""

    anchor = "invalid-argument-error"


class InvalidSolutionError(ImplicitGradError):
    """The solver returned something that is not a solution of the inner problem's form."""

    anchor = "invalid-solution-error"


class GraphError(ImplicitGradError):
    """The gradient that autograd asks for does not exist, or can no longer be computed."""

    anchor = "graph-error"


class MissingPackageError(ImplicitGradError, ModuleNotFoundError):
    """A minimiser needs a package that is not installed; `name` is the package."""

    anchor = "missing-package-error"


class LinearSolveError(ImplicitGradError):
    """The backward solve failed and `on_failure="raise"`; `report` holds what is known about it."""

    anchor = "linear-solve-error"

    def __init__(self, message: str, report: object = None, anchor: str | None = None) -> None:
        super().__init__(message, anchor)
        self.report = report


@enum.unique
class Status(enum.IntEnum):
    """How a backward solve ended: positive is success, negative is trouble (PETSc's convention)."""

    CONVERGED = 1
    ZERO_RHS = 2
    EXACT = 3
    TRUNCATED = 4
    FIRST_ORDER = 5
    MAX_ITER = -1
    NEGATIVE_CURVATURE = -2
    STAGNATED = -3
    SINGULAR = -4
    NONFINITE_RHS = -5
    NONFINITE_OPERATOR = -6
    INNER_NOT_STATIONARY = -7
    DEGENERATE = -8
    DIVERGED = -9
    BAD_PRECONDITIONER = -10
    DEPENDENT_CONSTRAINTS = -11
    WRONG_PRODUCT = -12
    UNSOLVED = -13
    INDEFINITE = -14
    NOT_SYMMETRIC = -15

    @staticmethod
    def worst(statuses: Iterable[Status]) -> Status:
        """One for several solves: the trouble that is last in the list, else the least exact."""
        return min(statuses, key=lambda status: (status.ok, -abs(status)))

    @property
    def ok(self) -> bool:
        """Whether the solve did what was asked of it."""
        return self > 0

    @property
    def sentence(self) -> str:
        """What happened, the likely cause, and what to change."""
        return _SENTENCES[self]

    @property
    def anchor(self) -> str:
        """The place in docs/why.md that says more."""
        return anchor_of(self.name)

    def __str__(self) -> str:
        if self.ok:
            return f"{self.name}: {self.sentence}"
        happened = re.split(r": |\. |; | \(", self.sentence, maxsplit=1)[0]
        return f"{self.name}: {happened} (see {PAGE}#{self.anchor})"


_SENTENCES = {
    Status.CONVERGED: "the linear solve reached its tolerance",
    Status.ZERO_RHS: "the incoming gradient is zero, and so is the implicit gradient",
    Status.EXACT: "the linear system was solved by a dense factorisation",
    Status.TRUNCATED: "the linear solve used its fixed budget of iterations, as asked",
    Status.FIRST_ORDER: "no product was taken: this is the first-order gradient, as asked",
    Status.MAX_ITER: (
        "the linear solve ran out of iterations before it reached rtol: the system is badly "
        "conditioned for this budget. Allow it more and say how accurate it has to be, such as "
        "maxiter=5000, rtol=1e-6 (to CG and MINRES, maxiter alone is a fixed budget); "
        "take a linear solver that needs fewer (CG with a preconditioner; for root and "
        "fixed_point GMRES(), or symmetric=True where that is so); or regularise the inner "
        "problem (a larger lam)"
    ),
    Status.NEGATIVE_CURVATURE: (
        "the inner objective has non-positive curvature at phi, so phi is not a strict minimum "
        "and the implicit gradient is not that of a minimum. Solve the inner problem further, "
        'raise lam, or use curvature="gauss_newton" where it is offered'
    ),
    Status.STAGNATED: (
        "the linear solve stopped improving above rtol: rounding error is the floor for this "
        "condition number and dtype, or GMRES keeps too few vectors (restart). Loosen rtol, raise "
        "restart, or regularise the inner problem"
    ),
    Status.SINGULAR: (
        "the linear system is singular to working precision: the inner solution is not locally "
        "unique. Add a regulariser to the inner problem"
    ),
    Status.NONFINITE_RHS: (
        "the incoming gradient holds NaN or Inf, and so does the implicit gradient: look at the "
        "outer loss"
    ),
    Status.NONFINITE_OPERATOR: (
        "a product with the inner problem's Jacobian gave NaN or Inf, so the implicit gradient is "
        "NaN: look at the inner objective's second derivatives at phi (sqrt or norm at 0?)"
    ),
    Status.INNER_NOT_STATIONARY: (
        "phi does not solve the inner problem (its residual is not small, or is so only where "
        "curvature is), so the implicit gradient is not the derivative of this phi. Run the solver "
        "longer, or check that the condition describes what the solver solves (a minimum at a "
        "kink, as an L1 norm has it, is for prox_gradient)"
    ),
    Status.DIVERGED: (
        "the terms of the Neumann series grow instead of shrinking: an eigenvalue of scale times "
        "the matrix lies outside the circle of radius 1 around 1 (negative curvature, or a scale "
        "too large). Take a smaller scale, or CG(), MINRES() or GMRES()"
    ),
    Status.BAD_PRECONDITIONER: (
        "the preconditioner cannot serve: for a residual r it gave a z that is not finite or, with "
        "CG, has r·z <= 0. It has to approximate the inverse of the system's matrix, and CG needs "
        "one that is symmetric and positive definite"
    ),
    Status.WRONG_PRODUCT: (
        "the implicit gradient is wrong, because torch's derivatives of the condition's function "
        "are not those of its values (a custom Function whose backward detaches, uses .data or "
        "NumPy, or keeps an argument as a constant?). Write that backward in operations of torch "
        'on what ctx.saved_tensors holds, or mark it once_differentiable; curvature="auto" or '
        '"finite_difference" takes differences of gradients where they are right'
    ),
    Status.UNSOLVED: (
        "what the function given as linear_solver returned does not solve the system: "
        "b - matvec(x) is not small. The matrix is that of matvec, A transposed in a backward "
        "pass (a factorisation of A has to be used as its transpose, and be that of this call), "
        "and an iteration has to run to its tolerance"
    ),
    Status.INDEFINITE: (
        "the Jacobian that was promised to be symmetric has curvature of both signs, and CG is "
        "for definite matrices: use MINRES(), the default with symmetric=True, or Exact()"
    ),
    Status.NOT_SYMMETRIC: (
        "the Jacobian is not symmetric, though symmetric=True says so, and a linear solver for "
        "symmetric systems was used: the gradient is not right. Leave symmetric=True out, or "
        "multiply the residual by what makes its Jacobian symmetric"
    ),
    Status.DEGENERATE: (
        "a constraint of the inner problem is active by chance (its multiplier is zero, or, at the "
        "apex of a cone, on the cone's boundary), so phi has a kink there and no derivative; the "
        "gradient is that of one side. Or a weight that a gradient is asked for is 0, or so small "
        "that the solver left out what it weighs; or a parameter at 0 has an infinite slope"
    ),
    Status.DEPENDENT_CONSTRAINTS: (
        "active constraints depend on each other at phi, but part ways as an argument changes or "
        "phi moves along them, so phi may have a kink there; the gradient is that for some of them "
        "as equations. Remove those that others imply, or let one argument move them together"
    ),
}


def describe(value: object) -> str:
    """A few words on a value, for error messages."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        kind = f"{dtype} tensor of shape {tuple(value.shape)}"
    elif isinstance(value, np.ndarray):
        kind = f"{value.dtype} array of shape {value.shape}"
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def in_pairs(value: object) -> str:
    """What to do about a complex tensor where reals are expected; nothing for other values."""
    if not (isinstance(value, Tensor) and value.is_complex()):
        return ""
    return (
        ". Give it as pairs of real numbers: torch.view_as_real outside, and "
        "torch.view_as_complex(phi) in the condition's function"
    )
