"""What `check_implicit` found, as values and as text."""

from __future__ import annotations

import dataclasses
import textwrap

from implicit_grad.monitor import Report
from implicit_grad.testing._causes import Cause


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
        for sentence in self.evidence:
            lines += _wrapped(sentence, "  seen ")
        return "\n".join(lines)


class ImplicitGradientError(AssertionError):
    """A gradient is wrong; `report` holds what was measured."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(str(report))
        self.report = report


def _wrapped(text: str, mark: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False
    )
