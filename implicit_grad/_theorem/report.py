"""What is known about each backward solve: a `Report`, for a `Monitor` or as a warning."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import textwrap
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from implicit_grad._errors import (
    InvalidArgumentError,
    LinearSolveError,
    Status,
)
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, dot, dots, norm
from implicit_grad._linear_solvers.error_bounds import error_bound, ritz_values
from implicit_grad._theorem.adjoint import Accuracy, Solved, judged, solve_adjoint
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.pytree import Flat, Tensors, length
from implicit_grad._warnings import Place, warn

OnFailure = Literal["warn", "raise", "ignore"]
# φ counts as unsolved when it is certainly farther than this from a solution, relative to its size.
INNER_TOLERANCE = 1e-2
# Or, so that φ = 0 can be a solution, farther than this relative to how far all of its arguments,
# taken away, would move it.
_NEAR_ZERO = 1e-5
# Under constraints the least size of φ, in the user's units: a corner at 0 need not depend on
# arguments. But an F that is this part of what they make of it is no rounding error there either.
_CORNER, _LARGE = 1e-3, 1e-2
# CG's steps along F: in nearly solved problems, two told of 259, and three of 261 of the 261 φ that
# were farther than that.
_STEPS = 3
# A curvature of this many eps times the greatest one may be a zero.
_ZERO = 100.0


@dataclasses.dataclass(frozen=True)
class Report:
    """One backward solve.

    Attributes:
        status: how it ended; `status.sentence` says what that means.
        iterations: of the linear solver.
        products: products with A or Aᵀ that the solve took, all told.
        linear_residual: ‖v − Aᵀu‖/‖v‖, recomputed from u; None where there was nothing to check.
        inner_residual: ‖F(φ)‖₂, in the units of F; 0 if the inner problem is solved exactly.
        min_curvature: least pᵀAp/pᵀp that the solver met (`NormalCG`: least ‖Aᵀp‖/‖p‖); below 0, A
            is not positive definite.
        ritz_min: least Ritz value from CG's coefficients: an estimate, from above, of A's least
            eigenvalue in units of A's scale (λ for `proximal`, else 1).
        ritz_max: greatest Ritz value, from below, likewise.
        solve_error_bound: a bound on the 2-norm of the error of dθ that the linear solve makes
            (for other conditions than `proximal`, of u); None unless the strong convexity is known,
            and for a `LowRank` λ.
        error_is_bound: whether `rtol_gradient` ended the solve by a bound (True) or, for want of a
            known strong convexity, by an estimate (False); None if something else did.
        outer_loss_error: −uᵀF, the first-order estimate of how much the outer loss would change
            if the inner problem were solved exactly.
        curvature: the operator: "hessian", "gauss_newton", "finite_difference", "lagrangian" (of
            a minimum under constraints) or "jacobian".
        substitute: what CG solved instead, once it had met negative curvature: "minres" or
            "gauss_newton" where it was told to, "early_stopped" with `argmin`; None if nothing.
        filter_error: with `EarlyStopped` and `PositivePart`, an estimate of u's relative error: by
            how much the last products changed it, or rounding in them may have (0 for the steps of
            a `Neumann` series whose scale was given). None for solutions of the linear system.
        damping: added to A's diagonal by the linear solver; not 0 means that the answer differs.
        check: what the check of products found (see `implicit`), None if nothing: why they are
            differences of gradients, or why the status is WRONG_PRODUCT.
        batches: how many batches the condition's `batches=` gave, if it has them.
        warm_started: with `implicit(..., warm_start=...)`, whether the solver started where the
            last call ended; None without it, and for a function that does not ask for `start`.
        evaluations: with it, how often a solver that is handed the objective, or residual,
            evaluated it: what a warm start saves is what this falls by.
    """

    status: Status
    iterations: int
    products: int
    linear_residual: float | None
    inner_residual: float
    min_curvature: float | None
    ritz_min: float | None
    ritz_max: float | None
    solve_error_bound: float | None
    error_is_bound: bool | None
    outer_loss_error: float
    curvature: str
    substitute: str | None
    damping: float
    check: str | None = None
    filter_error: float | None = None
    batches: int | None = None
    warm_started: bool | None = None
    evaluations: int | None = None

    def __str__(self) -> str:
        known = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        figures = ", ".join(
            f"{name}={value:.2g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in known
            if value is not None and name not in ("status", "check")
        )
        lines = [str(self.status), *textwrap.wrap(figures, 98, break_on_hyphens=False)]
        return "\n  ".join(lines if self.check is None else [*lines, f"check: {self.check}"])


class Monitor:
    """Collects one `Report` for each backward solve, from whatever thread runs it.

    A solve for a batch of tasks has one for each task; its products are those of all together.

    >>> monitor = Monitor()
    >>> monitor.reports, monitor.last
    ([], None)
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None

    def clear(self) -> None:
        """Forget all reports."""
        self.reports.clear()

    def __str__(self) -> str:
        if self.last is None:
            return "no backward solve yet"
        counts = collections.Counter(report.status for report in self.reports)
        how_often = ", ".join(f"{n} {status.name}" for status, n in counts.most_common())
        solves = f"{len(self.reports)} backward solve{'s' * (len(self.reports) > 1)}"
        troubles = [str(status) for status in counts if not status.ok]
        return "\n".join([f"{solves}: {how_often}", *troubles, f"The last one: {self.last}"])

    def __repr__(self) -> str:
        return f"<Monitor: {str(self).partition(chr(10))[0]}>"


class _Judgement(NamedTuple):
    """How one solve ended, ‖F(φ)‖, −uᵀF, and whether φ is certainly no solution."""

    status: Status
    inner: float
    outer_error: float
    unsolved: bool


@dataclasses.dataclass(frozen=True)
class Reporting:
    """Where news of a backward solve goes, and what is known beforehand.

    `strong_convexity` is μ relative to the operator's scale; `inner_solved` says whether φ was
    meant to solve the inner problem (a few adaptation steps do not mean to). What nobody here will
    read is `measured_anyway` where other processes do, which need this one to take part.
    """

    monitor: Monitor | None = None
    on_failure: OnFailure = "warn"
    strong_convexity: float | None = None
    rtol_gradient: float | None = None
    inner_solved: bool = True
    measured_anyway: bool = False

    def __post_init__(self) -> None:
        if self.monitor is not None and not isinstance(self.monitor, Monitor):
            raise InvalidArgumentError(
                f"monitor must be an implicit_grad.Monitor(), got {self.monitor!r}"
            )
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise InvalidArgumentError(
                f'on_failure={self.on_failure!r}: expected "warn", "raise" or "ignore"'
            )

    @property
    def wants_residual(self) -> bool:
        """Whether someone will read a residual that costs a product to recompute."""
        return self.monitor is not None or self.measured_anyway

    def accuracy(self, around: Linearization) -> Accuracy:
        """What is known of, and asked from, a solve around φ."""
        return Accuracy(self._mu(around), self.rtol_gradient)

    def say(self, sentence: str, anchor: str, of: str = "", place: Place | None = None) -> None:
        """Warn of trouble, or raise, as was asked for; `of` and `place` are those of `warn`."""
        if self.on_failure == "raise":
            raise LinearSolveError(sentence, anchor=anchor)
        if self.on_failure == "warn":
            warn(sentence, anchor, place, of)

    def record(
        self, solved: Solved, around: Linearization, v: Tensors, place: Place | None
    ) -> None:
        """Keep a report of each solve for the monitor, and warn or raise if one failed."""
        fine = all(judged(s, around).ok for s in solved.solutions)
        if not self.wants_residual and (
            (fine and not self.inner_solved) or self.on_failure == "ignore"
        ):
            return  # nobody would read a report: measure nothing
        along = _AlongResidual(around)
        judged_all = self._judged(solved, along, v)
        if self.monitor is None and all(judgement.status.ok for judgement in judged_all):
            return  # and whatever else a report tells need not be found out
        reports = [
            self._report(solution, solved, around, judgement, solved.products + along.products)
            for solution, judgement in zip(solved.solutions, judged_all, strict=True)
        ]
        if self.monitor is not None:
            self.monitor.reports.extend(reports)
        if self.on_failure == "ignore":
            return
        for report, solution, judgement in zip(reports, solved.solutions, judged_all, strict=True):
            if report.status.ok:
                continue
            sentence, anchor = _sentence(report, solution, solved, around), report.status.anchor
            if judgement.unsolved and report.status is not Status.INNER_NOT_STATIONARY:
                sentence = _BOTH.format(sentence)
            if judgement.unsolved and (around.batches or 0) > 1:
                sentence += _SUMMED
            if judgement.unsolved and around.curvature == "lagrangian":
                sentence += _CONSTRAINED
            if self.on_failure == "raise":
                raise LinearSolveError(f"{sentence} ({_figures(report)})", report, anchor)
            # no figures here: Python shows a warning once only if its text does not change
            warn(sentence, anchor, place)

    def _judged(self, solved: Solved, along: _AlongResidual, v: Tensors) -> list[_Judgement]:
        """What each task's solve, or the only one, came to."""
        around = along.around
        flat, count = Flat(around.phi, around.n_tasks), len(solved.solutions)
        with torch.no_grad():
            F, phi, u = (
                flat.ravel(t).view(count, -1) for t in (around.residual, around.phi, solved.x)
            )
            w = Flat(v, around.n_tasks).ravel(v).view(count, -1)
            if count == 1 and not F.is_cuda:
                rows = [[norm(F[0]), norm(phi[0]), -dot(u[0], F[0]), norm(w[0])]]
            else:
                sizes = [dots(x, x).sqrt() for x in (F, phi, w)]
                rows = torch.stack([*sizes[:2], -dots(u, F), sizes[2]], 1).tolist()
        found = []
        for task, (solution, row) in enumerate(zip(solved.solutions, rows, strict=True)):
            status, unsolved = judged(solution, around), False
            inner, size, outer_error, steep = row
            if status.ok or status in _MAY_COME_OF_PHI:
                way = abs(outer_error) / steep if steep and _solves(solution, around) else 0.0
                unsolved = self._is_unsolved(
                    solution, solved, along, task, inner, size, way, u[task]
                )
                if unsolved and status.ok:
                    status = Status.INNER_NOT_STATIONARY
            found.append(_Judgement(status, inner, outer_error, unsolved))
        return found

    def _is_unsolved(
        self,
        solution: LinearSolution,
        solved: Solved,
        along: _AlongResidual,
        task: int,
        inner: float,
        size: float,
        way: float,
        u: Tensor,
    ) -> bool:
        """Whether φ is farther from a solution than was meant.

        `way` is |uᵀF|/‖v‖, to first order how far it is along v: where curvature is small, F is.
        """
        around = along.around
        least, greatest = solution.extremes or (None, None)
        size_of_A = solution.norm
        if size_of_A is None and least is not None and greatest is not None:
            size_of_A = max(abs(least), abs(greatest))
        filtered = solution.filter_error is not None and not solution.substitute
        # a solver that needs λ filters curvature, and not the steps of a training that was stopped
        promised = self.inner_solved and not (filtered and not solved.solver.needs_scale)
        if not promised or size_of_A is None or around.is_adjoint:
            return False
        # ‖F‖ ≤ ‖A‖·‖φ − φ*‖: a residual this large means a φ at least that far away
        reach, constrained = INNER_TOLERANCE * size_of_A, around.curvature == "lagrangian"
        rounding = _ZERO * around.precision * size_of_A * size
        is_off = way > INNER_TOLERANCE * size and inner > rounding
        if inner <= reach * size and not is_off:
            # a residual this small may still be a long way where curvature is small
            nearest = INNER_TOLERANCE * size * (0.0 if least is None else least)
            may_be = _solves(solution, around) and not solved.damping
            if not (may_be and inner > max(nearest, rounding)):
                return False
            if not along.leads_beyond(INNER_TOLERANCE * size, task, u):
                return False
            is_off = True
        at_stake = _at_stake(around)
        if constrained:
            if inner <= reach * _CORNER:
                return 0.0 < _LARGE * at_stake < inner
            size = max(size, _CORNER)
        if inner <= _NEAR_ZERO * at_stake:
            return False
        if is_off:
            return True
        # v need not have met the greatest curvatures, and so A may be larger: look along F
        return not inner <= INNER_TOLERANCE * along.sizes[task] * size

    def _report(
        self,
        solution: LinearSolution,
        solved: Solved,
        around: Linearization,
        judgement: _Judgement,
        products: int,
    ) -> Report:
        least, _ = solution.extremes or (None, None)
        ritz = ritz_values(solution.coefficients)
        return Report(
            status=judgement.status,
            iterations=solution.iterations,
            products=products,
            linear_residual=solution.residual,
            inner_residual=judgement.inner,
            min_curvature=least,
            ritz_min=ritz[0] if ritz else None,
            ritz_max=ritz[-1] if ritz else None,
            solve_error_bound=self._error_bound(solution, solved, around),
            error_is_bound=solution.error_is_bound,
            outer_loss_error=judgement.outer_error,
            curvature=around.curvature,
            substitute=solution.substitute,
            damping=solved.damping,
            check=None if around.finding is None else around.finding.sentence,
            filter_error=solution.filter_error,
            batches=around.batches,
            warm_started=around.warm_started,
            evaluations=around.evaluations,
        )

    def _mu(self, around: Linearization) -> float | None:
        return None if around.is_adjoint else self.strong_convexity

    def _error_bound(
        self, solution: LinearSolution, solved: Solved, around: Linearization
    ) -> float | None:
        mu = self._mu(around)
        if mu is None or solved.damping or around.linear_part:
            return None
        bound = error_bound(solution, mu)
        if bound is None:
            return None
        # dθ = S u, so ‖S e‖₂ ≤ √(max S)·√(eᵀSe)
        largest = max((float(s.max()) for s in around.scale or () if s.numel()), default=1.0)
        return math.sqrt(largest) * bound


def _solves(solution: LinearSolution, around: Linearization) -> bool:
    """Whether it is a solution, of A's own system, and nothing in the place of one."""
    if around.curvature == "gauss_newton":  # which may have next to no curvature where A has much
        return False
    exact = solution.status in (Status.CONVERGED, Status.EXACT)
    return exact and solution.filter_error is None and solution.substitute is None


def _at_stake(around: Linearization) -> float:
    """Σ |wᵀ(∂F/∂a) a|/‖w‖, element by element: how much of F is there by the arguments a."""
    own = {id(p) for p in around.phi}
    a = [t for t in leaves_behind(around.residual) if id(t) not in own]
    w = tuple(torch.arange(p.numel()).cos().to(p).view_as(p) for p in around.phi)  # any vector
    with torch.no_grad():
        pulled = around.pullback(w, a)
        shares = sum(float((g * t).abs().sum()) for g, t in zip(pulled, a, strict=True))
    return shares / length(w) / math.sqrt(around.n_tasks or 1)


class _AlongResidual:
    """‖AᵀF‖/‖F‖ ≤ ‖A‖ of each task, by one product for all of them, where anyone asks."""

    def __init__(self, around: Linearization) -> None:
        self.around, self.products = around, 0

    @functools.cached_property
    def sizes(self) -> list[float]:
        self.products += 1
        around = self.around
        with torch.no_grad():
            F = tuple(t.detach() for t in around.residual)
            flat = Flat(F, around.n_tasks)
            rows = around.n_tasks or 1
            there, there_to = (
                flat.ravel(t).view(rows, -1).double() for t in (F, around.transposed(F))
            )
            sizes: list[float] = (there_to.norm(dim=1) / there.norm(dim=1)).tolist()
            return sizes

    def leads_beyond(self, distance: float, task: int, u: Tensor) -> bool:
        """Whether a solution is farther than that, where u, and so the outer loss, has a part."""
        return float((self._steps[task] * u).norm()) > distance * float(u.abs().max())

    @functools.cached_property
    def _steps(self) -> Tensor:
        """Where a few steps of CG for A d = F lead, for each task: less far than a solution is.

        Where A is positive definite, each leads farther than the last (Steihaug, 1983, The
        conjugate gradient method and trust regions in large scale optimization, Theorem 2.1).
        """
        around, rows = self.around, self.around.n_tasks or 1
        if not around.is_hessian or around.curvature == "lagrangian":
            return torch.zeros(rows, 1)
        flat = Flat(around.residual, around.n_tasks)
        with torch.no_grad():
            r = flat.ravel(around.residual).view(rows, -1)
            x, p, rr = torch.zeros_like(r), r, dots(r, r)
            for _ in range(_STEPS):
                self.products += 1
                Ap = flat.ravel(around.transposed(flat.unravel(p.reshape(-1)))).view(rows, -1)
                curved = dots(p, Ap)
                alpha = (rr / curved).where(curved > 0, 0).view(-1, 1).to(r)
                x, r = x + alpha * p, r - alpha * Ap
                before, rr = rr, dots(r, r)
                p = r + (rr / before).where(before > 0, 0).view(-1, 1).to(r) * p
            return x


def solve_and_report(
    solver: LinearSolver,
    around: Linearization,
    v: Tensors,
    reporting: Reporting,
    place: Place | None = None,
) -> Tensors:
    """u with Aᵀu = v; what came of the solve goes where news of it is wanted.

    `place` is the line of the call whose backward pass this is: warnings point there.
    """
    verify = reporting.wants_residual
    solved = solve_adjoint(solver, around, v, verify, reporting.accuracy(around))
    reporting.record(solved, around, v, place)
    if reporting.on_failure != "ignore" and (remark := (solved.convex or around).remark):
        reporting.say(remark, anchor="gauss-newton-bends", place=place)
    return solved.x


# What is seen of A, or of a solve with it, where φ may be to blame.
_MAY_COME_OF_PHI = {
    Status.NEGATIVE_CURVATURE,
    Status.MAX_ITER,
    Status.STAGNATED,
    Status.SINGULAR,
    Status.DEGENERATE,
    Status.DIVERGED,
    Status.INDEFINITE,
}
_BOTH = (
    "two things are wrong, of which the first may make the second. First: phi does not solve the "
    "inner problem (its residual is not small). See that the condition describes what the solver "
    "solves, and run the solver longer (testing.check_implicit tells which it is). Then, if it is "
    "still so: {}"
)
_SUMMED = (
    ". The condition's objective is a sum over batches: where the solver averages within each, "
    "divide by the number of batches, or the regularizer weighs too little"
)
_CONSTRAINED = (
    ". Of its constraints, an inequality is to be at most 0 (SciPy's 'ineq' is at least 0), and "
    "phi to lie on those that are active (a barrier keeps it off them)"
)
_NO_DIFFERENCES = (
    ". (Under constraints no differences are taken, and only to write it in operations of torch "
    "helps)"
)
_MAXIMUM = "If phi is a maximum, give argmin the negative of what it maximises"
_FLAT = (
    "the inner objective has zero curvature, to rounding, along a direction that the outer loss "
    "sees (non-positive curvature at phi): phi is not unique along it. Regularise the inner "
    "problem, or use MINRES(), which gives the derivative of least norm"
)
_STOPPED = (
    "CG gave the derivative of a training that was stopped, {}: if gradient steps trained phi, "
    "linear_solver=EarlyStopped(time=...) or (steps=, lr=) is right, and says nothing of this "
    "(see training_time)"
)
_OWN_TIME = "the minimiser's own number of steps"
_UNKNOWN_TIME = (
    "with a time of |phi|/|F|, of 1 to 200 over the greatest curvature, for want of its own (far "
    "too long after a few steps from weights that were there before: hand them in as the first "
    "argument)"
)
_TIME_OF_WAY = (
    "with a time of |phi - phi_0|/|F|, phi_0 what was handed in first, at most 200 over the "
    "greatest curvature, for want of its own"
)


def _sentence(
    report: Report, solution: LinearSolution, solved: Solved, around: Linearization
) -> str:
    """What the status means for this solver, this matrix and these tensors."""
    status, sentence = report.status, report.status.sentence
    if status is Status.WRONG_PRODUCT:
        if around.curvature == "lagrangian":
            sentence += _NO_DIFFERENCES
        complete = around.finding is not None and around.finding.complete
        return f"{report.check}" if complete else f"{report.check}. So {sentence}"
    if status is Status.NEGATIVE_CURVATURE and solution.extremes is not None:
        least, greatest = solution.extremes
        if least >= -_ZERO * Flat(around.phi).eps * greatest:
            sentence = _FLAT
        elif greatest < 0 and around.scale is None:
            sentence = f"{sentence}. {_MAXIMUM}"
    if solution.substitute == "early_stopped":
        known = around.training is not None and around.training() is not None
        time = _OWN_TIME if known else _TIME_OF_WAY if around.starts else _UNKNOWN_TIME
        return f"{sentence}. {_STOPPED.format(time)}"
    if sentence is _FLAT:
        return sentence
    if status is Status.NEGATIVE_CURVATURE and solved.solver.when_indefinite:
        return f"{sentence}. {solved.solver.when_indefinite}"
    coarse = any(p.dtype != torch.float64 for p in around.phi)
    if status is Status.STAGNATED and coarse:
        return f"{sentence}. Or use float64"
    return sentence


def _figures(report: Report) -> str:
    parts = [f"status {report.status.name}", f"{report.iterations} iterations"]
    for name in ("linear_residual", "inner_residual", "min_curvature"):
        value = getattr(report, name)
        if value is not None:
            parts.append(f"{name} {value:.2g}")
    return ", ".join(parts)
