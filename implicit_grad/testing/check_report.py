"""What `check_implicit` found, as values and as text: each cause of a wrong gradient has a name."""

from __future__ import annotations

import dataclasses
import enum
import textwrap

from implicit_grad._errors import PAGE, anchor_of
from implicit_grad._theorem.report import Report


@enum.unique
class Cause(enum.Enum):
    """What measurements say is wrong; the earlier members explain away the later ones."""

    NOT_FINITE = (
        "the gradient or the outer loss is NaN or infinite. Look for 0/0, roots and logarithms at "
        "0, and overflow: in phi, in the linear solve, and in the derivatives of F there"
    )
    NON_DETERMINISTIC = (
        "the solver returns another phi when it is called again with the same arguments, by more "
        "than rounding. Seed it in each call, or solve far enough that the start does not matter"
    )
    REFERENCE_TOO_NOISY = (
        "the reference itself is too uncertain to tell: phi jumps or jitters as the arguments "
        "change. Tighten the solver's tolerance, use float64, or stay away from kinks"
    )
    STALE_STATE = (
        "the gradient belongs to another call: state is kept outside of the graph and overwritten "
        "or reused. Keep what backward needs in ctx, per call"
    )
    CAPTURED_TENSOR = (
        "a function closes over a tensor that phi depends on, and its gradient is lost there. "
        "Pass the tensor as an argument (and do not detach it)"
    )
    MISSING_CROSS_DERIVATIVE = (
        "F depends on this argument in a way that the gradient does not know of: a term of ∂F/∂a "
        "is dropped. Look for detach(), item(), NumPy or no_grad in the condition, or for a "
        "missing term in a backward written by hand"
    )
    WRONG_JACOBIAN = (
        "products with A are not the derivative of F along phi. Look for detach() or no_grad on "
        "phi in the condition, or a custom Function with a wrong second derivative"
    )
    INNER_NOT_SOLVED = (
        "phi does not solve the inner problem, so the implicit gradient is not the derivative of "
        "this phi. Run the solver longer or to a tighter tolerance, or use polish=1; if phi stays "
        "where it is, the condition describes another problem"
    )
    WRONG_CONDITION = (
        "the solver solves another problem than the condition describes. Compare signs, factors "
        "(λ against λ/2, sum against mean), terms and constraints of the two (inequalities are at "
        "most 0)"
    )
    NOT_ISOLATED = (
        "A is singular to working precision: the inner solution is not locally unique, and has no "
        "derivative. Add a regulariser to the inner problem"
    )
    NEGATIVE_CURVATURE = (
        "the inner objective has negative curvature at phi, so phi is no minimum, and CG does not "
        "solve the linear system. Solve the inner problem further, raise lam, or use Exact()"
    )
    ASYMMETRIC_OPERATOR = (
        "A is not symmetric, but a solver for symmetric systems was used. Use GMRES(), "
        "NormalCG(), Neumann() or Exact(); under argmin, check custom Functions in the objective"
    )
    MISSING_TRANSPOSE = (
        "the linear system was solved with A where the theorem asks for Aᵀ. Take vector-Jacobian "
        "products, not Jacobian-vector products"
    )
    BLOCK_DIAGONAL = (
        "the linear system was solved for each tensor of phi by itself: what couples the tensors "
        "was left out. Solve for all tensors of phi at once"
    )
    WRONG_SIGN = "the gradient has the wrong sign: it is −(∂F/∂a)ᵀu with Aᵀu = v"
    SHIFTED_OPERATOR = (
        "the linear system was solved with a multiple of the identity added to A (or with another "
        "λ in it). Take out the damping, and compare λ's scale in the loss and in the system"
    )
    APPROXIMATION = (
        "an approximation was asked for that changes the answer (damping, Gauss-Newton, "
        "EarlyStopped or PositivePart): the gradient is not that of the solution, on purpose"
    )
    LINEAR_SOLVE_NOT_CONVERGED = (
        "the linear system Aᵀu = v is not solved: a dense solve of the same system agrees with the "
        "reference. Give the linear solver more iterations or a tighter rtol, or regularise"
    )
    STRUCTURALLY_ZERO = (
        "the gradient is exactly zero (or there is none), although phi changes with this tensor. "
        "Nothing connects the two in the graph: detached, converted, or not in the condition"
    )
    WRONG_SCALE = "the gradient is a constant factor away from the right one"
    UNEXPLAINED = (
        "none of the measurements explains it. Pass condition= for a solver that implicit() did "
        "not make, and compare with reference='unrolled'"
    )

    @property
    def rank(self) -> int:
        """Its place in the list; the lower, the more fundamental."""
        return list(Cause).index(self)

    @property
    def sentence(self) -> str:
        """What it means, and what to change."""
        return self.value

    @property
    def anchor(self) -> str:
        """The place in docs/why.md that says more."""
        return anchor_of(self.name)


@dataclasses.dataclass(frozen=True)
class ArgumentCheck:
    """One tensor's gradient against the reference.

    Attributes:
        name: the argument's, such as `theta['weight']`, or where a captured tensor is held.
        kind: "argument", "parameter" (of the condition, such as λ) or "captured".
        shape: of the tensor.
        gradient: ‖gradient‖₂ as autograd computes it; None if it computes none.
        reference: the greatest directional derivative of the reference (a norm, where the
            reference is a whole gradient).
        error: the greatest difference from the reference, relative to the greater of the two.
        uncertainty: of the reference, in the same unit.
        tolerance: what the error was held to, without the uncertainty.
        ok: whether the gradient is right.
        cause: why not; None if it is right.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    gradient: float | None
    reference: float
    error: float
    uncertainty: float
    tolerance: float
    ok: bool
    cause: Cause | None = None

    def __str__(self) -> str:
        mark = "ok  " if self.ok else "FAIL"
        size = "none" if self.gradient is None else f"{self.gradient:.3g}"
        return (
            f"{mark} {self.name} {list(self.shape)}: error {self.error:.2g} "
            f"± {self.uncertainty:.1g} (tolerance {self.tolerance:.1g}), |gradient| {size}"
            + (f" -> {self.cause.name}" if self.cause else "")
        )


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The verdict of `check_implicit`.

    Attributes:
        arguments: one check for each tensor.
        reference: what the gradients were compared with.
        causes: why it failed, the most fundamental first; empty if it did not.
        evidence: what was measured, one sentence each.
        reports: those of the solver's own backward solves (of solvers made by `implicit`).
    """

    arguments: tuple[ArgumentCheck, ...]
    reference: str
    causes: tuple[Cause, ...] = ()
    evidence: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every gradient is right."""
        return all(a.ok for a in self.arguments)

    @property
    def cause(self) -> Cause | None:
        """The most fundamental cause; None if all is well."""
        return self.causes[0] if self.causes else None

    def __str__(self) -> str:
        lines = [f"implicit gradients against {self.reference}:"]
        lines += [f"  {a}" for a in self.arguments]
        for cause in self.causes:
            lines += _wrapped(f"{cause.name}: {cause.sentence}", "  why  ")
            lines += [f"  see  {PAGE}#{cause.anchor}"]
        for sentence in self.evidence:
            lines += _wrapped(sentence, "  seen ")
        return "\n".join(lines)


class GradientCheckError(AssertionError):
    """A gradient is wrong; `report` holds what was measured."""

    anchor = "gradient-check-error"

    def __init__(self, report: CheckReport) -> None:
        super().__init__(str(report))
        self.report = report


def _wrapped(text: str, mark: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False
    )
