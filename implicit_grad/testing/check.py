"""`check_implicit`: a solver's gradients against a reference, and why they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_grad._conditions.base import Condition
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import check_one_of, check_value, is_integer, is_number
from implicit_grad.testing.check_report import ArgumentCheck, CheckReport, GradientCheckError
from implicit_grad.testing.diagnosis import Diagnosis, is_finite
from implicit_grad.testing.local_problem import LARGEST, Local
from implicit_grad.testing.reference import Comparison, Differences, Reference, Whole
from implicit_grad.testing.subject import Subject

REFERENCES = ("finite-difference", "unrolled", "exact")


def check_implicit(
    solve: Callable[..., Any],
    args: Sequence[Any],
    *,
    outer: Callable[[Any], Tensor] | None = None,
    reference: Literal["finite-difference", "unrolled", "exact"] = "finite-difference",
    unrolled: Callable[..., Any] | None = None,
    condition: Condition | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    directions: int = 2,
    raise_on_failure: bool = True,
) -> CheckReport:
    """Check a solver's gradients at one point, and if they are wrong say why.

    The gradients of outer(solve(*args)) are compared with a reference: those by every argument that
    requires grad (by every floating-point tensor, if none does), by the condition's own tensors
    such as λ, and by tensors that the functions involved capture. Where they differ,
    measurements tell why: calls are repeated, ‖F‖ and A's symmetry and curvature are looked at, the
    derivatives of F are held against differences of F, and the system is solved anew by a dense
    solver, at φ and at the exact solution next to it. All elements of a tensor are moved
    independently: a solver that takes a matrix for symmetric has to make it so.

    Args:
        solve: what `implicit` returned, or any differentiable function `solve(*args) -> phi`.
        args: the arguments to call it with.
        outer: `outer(phi)` returns a scalar tensor; by default a random linear function of φ.
        reference: "finite-difference" through the solver as a black box, with steps chosen by its
            noise; "unrolled", autograd through `unrolled`; "exact", a dense solve at the exact
            solution of the condition.
        unrolled: the same solver made of differentiable operations: `unrolled(*args) -> phi`.
        condition: what φ solves, for a `solve` that `implicit` did not make: it lets the check
            measure why a gradient is wrong.
        rtol: the relative error allowed in each tensor's gradient, beside thrice the reference's
            own uncertainty.
        atol: a tensor counts as having no influence where its share in the outer loss's relative
            change is below atol times that of the most influential one.
        directions: random directions per tensor along which to take differences.
        raise_on_failure: raise if a gradient is wrong, or return the report.

    Returns:
        The report; `print` it to read it.

    Raises:
        GradientCheckError: a gradient is wrong or could not be verified (an `AssertionError`).
        InvalidArgumentError: an argument cannot work.

    >>> import torch, implicit_grad as ig
    >>> def objective(w, X, lam):
    ...     return (X @ w - 1).square().sum() + lam * w.square().sum()
    >>> def fit(X, lam):  # forgets half of the regulariser
    ...     return torch.linalg.solve(X.T @ X + lam / 2 * torch.eye(2), X.sum(0))
    >>> X, lam = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor(0.5)
    >>> report = check_implicit(
    ...     ig.implicit(fit, ig.argmin(objective)), (X, lam), raise_on_failure=False
    ... )
    >>> report.ok, report.cause.name
    (False, 'WRONG_CONDITION')
    """
    __tracebackhide__ = True
    _check_arguments(reference, unrolled, rtol, directions)
    subject = Subject(solve, args, outer, condition)
    if reference == "exact" and subject.condition is None:
        raise InvalidArgumentError(
            'check_implicit: reference="exact" needs to know what phi solves: pass condition='
        )
    with torch.random.fork_rng():
        report = _checked(subject, reference, unrolled, rtol, atol, directions)
    if raise_on_failure and not report.ok:
        raise GradientCheckError(report)
    return report


def _checked(
    subject: Subject,
    kind: str,
    unrolled: Callable[..., Any] | None,
    rtol: float,
    atol: float,
    directions: int,
) -> CheckReport:
    # a call before, and one between forward and backward: state that they share would show
    subject.visit()
    gradients = subject.gradients(between=subject.visit)
    reports = subject.reports()
    values = [subject.value() for _ in range(3)]
    compared: Reference
    if kind == "exact":
        compared = Whole(subject, "a dense solve at the exact solution", _exact(subject))
    elif kind == "unrolled":
        assert unrolled is not None
        whole = subject.gradients(unrolled)
        compared = Whole(subject, "autograd through the unrolled solver", whole)
    else:
        compared = Differences(subject, values, rtol, directions, gradients)
    everything = range(len(subject.variables))
    influences = _influences(subject, [compared.compare(i, gradients[i]) for i in everything])
    floors = [atol * influence for influence in influences]

    def is_right(i: int, gradient: Tensor | None) -> bool:
        return is_finite(gradient) and compared.compare(i, gradient).is_right(rtol, floors[i])

    for i in everything:
        if not is_right(i, gradients[i]):
            compared.confirm(i)
    found = [compared.compare(i, gradients[i]) for i in everything]
    vague = {i for i in everything if found[i].is_vague(rtol * influences[i])}
    failed = [i for i in everything if i in vague or not is_right(i, gradients[i])]
    diagnosis = Diagnosis(subject, compared, is_right, gradients, reports, values, rtol)
    causes = diagnosis.run(failed, vague) if failed else {}
    checks = []
    for i, variable in enumerate(subject.variables):
        c, gradient = found[i], gradients[i]
        unit = c.size or 1.0
        checks.append(
            ArgumentCheck(
                name=variable.name,
                kind=variable.kind,
                shape=tuple(variable.tensor.shape),
                gradient=None if gradient is None else float(gradient.norm()),
                reference=c.reference,
                error=c.error / unit,
                uncertainty=c.uncertainty / unit,
                tolerance=rtol + floors[i] / unit,
                ok=i not in failed,
                cause=causes.get(i),
            )
        )
    distinct = sorted(set(causes.values()), key=lambda cause: cause.rank)
    return CheckReport(
        tuple(checks), compared.name, tuple(distinct), tuple(diagnosis.evidence), tuple(reports)
    )


def _influences(subject: Subject, found: list[Comparison]) -> list[float]:
    """For each variable, the derivative that would give it the influence of the greatest one."""
    sizes = [v.size for v in subject.variables]
    known = [c.reference * size for c, size in zip(found, sizes, strict=True)]
    largest = max((influence for influence in known if math.isfinite(influence)), default=0.0)
    return [largest / size for size in sizes]


def _exact(subject: Subject) -> list[Tensor | None]:
    """The gradients at the exact solution next to the solver's φ."""
    assert subject.condition is not None
    phi = subject.phi()
    solution = Local(subject.condition, subject.args, phi, subject.targets).solution
    u = None if solution is None else solution.exact(subject.cotangent(solution.value))
    if solution is None or u is None:
        raise InvalidArgumentError(
            'check_implicit: reference="exact" found no isolated solution of the condition from '
            f"this phi by Newton's method (or phi has more than {LARGEST} elements); use "
            'reference="finite-difference"'
        )
    return list(solution.gradients(u))


def _check_arguments(reference: object, unrolled: object, rtol: float, directions: int) -> None:
    check_one_of("check_implicit", "reference", reference, REFERENCES)
    if (reference == "unrolled") != (unrolled is not None) or (
        unrolled is not None and not callable(unrolled)
    ):
        raise InvalidArgumentError(
            'check_implicit: reference="unrolled" goes with unrolled=, a differentiable function '
            f"of the same arguments, got {describe(unrolled)}"
        )
    good = is_number(rtol) and 0 < rtol < 1
    check_value("check_implicit", "rtol", rtol, good, "a number between 0 and 1")
    good = is_integer(directions, 1)
    check_value("check_implicit", "directions", directions, good, "an integer of at least 1")
