"""Conjugate gradients: for symmetric positive definite systems, and when they are not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, LinearSolveError, Status
from implicit_grad._linear_solvers.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    dot,
    dots,
    norm,
    read,
    relative_residual,
    waited_for,
)
from implicit_grad._linear_solvers.cg_batched import first_order, solve_tasks
from implicit_grad._linear_solvers.early_stopped import UNKNOWN_TIME, instead_of_minimum
from implicit_grad._linear_solvers.error_bounds import ErrorWatch
from implicit_grad._linear_solvers.flat import MAY_BE_FLAT, is_flat, is_solved, unknown_curvature
from implicit_grad._linear_solvers.iterative import LOST, PATIENCE, SLACK, Budget, Iterative, Run
from implicit_grad._linear_solvers.lanczos import of_one
from implicit_grad._linear_solvers.minres import MINRES
from implicit_grad._linear_solvers.preconditioners import Precondition, Preconditioner, checked
from implicit_grad._linear_solvers.warm_start import Slot, WarmStart
from implicit_grad._options import check_one_of, require_nonnegative


@dataclasses.dataclass(frozen=True)
class _Claim:
    """The error for which a run stopped, and the μ, known or estimated, that it rests on."""

    error: float
    mu: float
    is_bound: bool


class ConjugateGradients(Run):
    """The iterate and everything that the recurrences carry.

    `precondition` approximates M⁻¹; None divides by M's scale.
    """

    def __init__(
        self,
        operator: Operator,
        rhs: Tensor,
        budget: Budget,
        precondition: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(operator, rhs, budget)
        self.precondition = precondition
        self.coefficients: list[tuple[float, float, float]] = []
        self.warm = False
        self.quotients: list[float] = []  # of each iteration
        self.residuals: list[float] = []  # after each
        self._claim: _Claim | None = None
        # With a fixed budget a look at the residual may come one product late: nothing is expected
        # to end the run. Elsewhere that would cost a product, which takes longer than a look.
        self._looks_late = waited_for(rhs) and budget.fixed and operator.rtol_error is None

    def start_at(self, x: Tensor) -> None:
        """Start from x if it is nearer than 0 in the energy norm; takes one product, and x itself.

        (x − x*)ᵀM(x − x*) − x*ᵀM x* = −xᵀ(rhs + residual). The residual's size would not tell: that
        of CG's iterates may well be larger than the right-hand side's.
        """
        residual = self.rhs - self.operator.matvec(x)
        self.iterations += 1
        if dot(x, self.rhs + residual) > 0:
            self.x, self.residual, self.warm = x, residual, True

    def iterate(self) -> None:
        """Conjugate gradients on operator · d = residual, adding d to x."""
        self.residual = r = self.residual.clone()
        self.status, self._claim = self.budget.exhausted, None
        rr = dot(r, r)
        if math.sqrt(rr) <= self.budget.target:
            self.status = Status.CONVERGED
            return
        z, weight = self._preconditioned(r)
        rz = weight * (rr if z is r else dot(r, z))
        if not rz > 0:
            return self._stop_at_preconditioner()
        p = z * weight
        self._rz, self._energy, self._gains = rz, 0.0, deque([math.inf] * PATIENCE, PATIENCE)
        self._watch = self._watched(rz)
        eps, size, alpha = torch.finfo(r.dtype).eps, norm(self.rhs), 0.0
        self._negligible = eps**2
        unread: Sequence[Tensor] = ()
        while self.iterations < self.budget.maxiter:
            product = self.operator.matvec(p)
            self.iterations += 1
            pMp, pp, *late = read(torch.dot(p, product), torch.dot(p, p), *unread)
            if late and self._ends(alpha, late[0], weight * late[-1]):
                return
            if not math.isfinite(pMp):
                return self.fail(Status.NONFINITE_OPERATOR)
            self.meet(pMp / pp)
            self.quotients.append(pMp / pp)
            if pMp <= 0:
                return self._stop_at_negative_curvature()
            alpha = self._rz / pMp
            if alpha * math.sqrt(pp) * self._extremes[1] * eps > LOST * size:
                self.status = Status.SINGULAR
                return
            self.x.add_(p, alpha=alpha)
            r.sub_(product, alpha=alpha)
            del product  # the next one need not find it still there
            z, weight = self._preconditioned(r)
            squares = (torch.dot(r, r),) if z is r else (torch.dot(r, r), torch.dot(r, z))
            beta: float | Tensor
            if self._looks_late and self.iterations < self.budget.maxiter:
                unread, beta = squares, squares[-1] * (weight / self._rz)
            else:
                unread, before, now = (), self._rz, read(*squares)
                if self._ends(alpha, now[0], weight * now[-1]):
                    return
                beta = self._rz / before
            del squares  # no number is kept during a product that is not wanted after it
            p.mul_(beta).add_(z, alpha=weight)

    def _ends(self, alpha: float, rr: float, rz: float) -> bool:
        """Take note of an iteration and the residual it left; whether the run ends with it."""
        gain, before, self._rz = alpha * self._rz, self._rz, rz
        self.coefficients.append((alpha, rz / before, rz))
        self.residuals.append(size := math.sqrt(rr))
        if size <= self.budget.target:
            self.status = Status.CONVERGED
            return True
        if not rz > 0:
            self._stop_at_preconditioner()
            return True
        if self._watch is not None and self._near_enough(self._watch):
            self.status = Status.CONVERGED
            return True
        self._energy += gain
        self._gains.append(gain)
        if sum(self._gains) <= self._negligible * self._energy:
            self.status = self.budget.stalled
            return True
        return False

    def _watched(self, rz: float) -> ErrorWatch | None:
        wanted = self.operator.rtol_error is not None
        return ErrorWatch(self.operator.mu, rz) if wanted else None

    def solution(self, residual: float | None) -> LinearSolution:
        """The result, with CG's coefficients where a single run of recurrences made it."""
        connected = self.precondition is None and not self.restarted
        return dataclasses.replace(
            super().solution(residual),
            coefficients=tuple(self.coefficients) if connected else (),
            error_is_bound=None if self._claim is None else self._claim.is_bound,
        )

    def _kept(self, size: float) -> bool:
        """The promise is a small residual, or, if the error ended the run, a small error."""
        if super()._kept(size) or self._claim is None:
            return super()._kept(size)
        return self._claim.error + (self.gap or 0.0) / self._claim.mu <= SLACK * self._error_limit

    @property
    def _missed(self) -> Status:
        return super()._missed if self._claim is None else Status.STAGNATED

    def _preconditioned(self, r: Tensor) -> tuple[Tensor, float]:
        """z and w with w·z = r preconditioned; a scale that is a number costs no vector."""
        if self.precondition is not None:
            return self.precondition(r), 1.0
        scale = self.operator.scale
        if isinstance(scale, Tensor):
            return r / scale, 1.0
        return r, 1.0 if scale is None else 1.0 / scale

    @property
    def _error_limit(self) -> float:
        return (self.operator.rtol_error or 0.0) * self.operator.scaled_norm(self.x)

    def _near_enough(self, watch: ErrorWatch) -> bool:
        """Whether the iterate's error is at most what `Operator.rtol_error` allows."""
        limit, known = self._error_limit, self.operator.mu
        if self.precondition is None:
            watch.note(*self.coefficients[-1])
            near, error, mu = watch.within(limit), watch.error, watch.mu
        else:  # the coefficients do not tell about M over its scale, but ‖e‖ ≤ ‖r‖/μ
            scale = self.operator.scale
            largest = 1.0 if scale is None else float(torch.as_tensor(scale).max())
            mu = self._extremes[0] / largest if known is None else known
            error = self.operator.residual_norm(self.residual) / mu
            near = error <= limit
        if near:
            self._claim = _Claim(error, mu, known is not None)
        return near

    def _stop_at_negative_curvature(self) -> None:
        """Keep x, a descent direction, but no longer than the first-order solution.

        Where M has no unit, that is what a training of unknown length would not exceed.
        """
        signed = self.operator.either_sign  # then no minimum was promised
        self.status = Status.INDEFINITE if signed else Status.NEGATIVE_CURVATURE
        self._at_least_first_order()
        size, limit = self.operator.scaled_norm(self.x), self.operator.residual_norm(self.rhs)
        if self.operator.scale is None:
            greatest = max(map(abs, self._extremes))
            limit = UNKNOWN_TIME * limit / greatest if greatest else size
        if size > limit:
            self.x.mul_(limit / size)

    def _stop_at_preconditioner(self) -> None:
        """Keep x, which rests on directions that were right."""
        self.status = Status.BAD_PRECONDITIONER
        self._at_least_first_order()

    def _at_least_first_order(self) -> None:
        if not self.coefficients:
            self.x = self.operator.over_scale(self.rhs).clone()


_NOT_POSITIVE = (Status.NEGATIVE_CURVATURE, Status.INDEFINITE)
OnNegativeCurvature = Literal["stop", "raise", "minres", "gauss_newton"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(Iterative):
    """Conjugate gradients for symmetric systems (Hestenes and Stiefel, 1952).

    Args:
        maxiter: most products to take. 0 takes none: with `proximal` that is first-order MAML.
        rtol: stop when the residual is at most `rtol` times the right-hand side. None with a given
            `maxiter` asks for a fixed budget, the truncation of the iMAML paper, which does not
            warn. None without `maxiter` means eps^(2/3) for the coarsest dtype among the tensors:
            4e-11 in float64, 2e-5 in float32.
        atol: or when the residual is at most `atol`, in the units of the right-hand side.
        damping: solve (A + damping·I) u = v instead. It changes the answer; off by default.
        on_negative_curvature: at the first direction p with pᵀAp ≤ 0, "stop" (see below), "raise",
            solve the same system by "minres", or one with the "gauss_newton" matrix in A's place
            (the condition has to know its `model`). The last two start again, with as many
            iterations to spend.
        preconditioner: `Jacobi()` or `Nystrom(rank=...)`; `Reuse(...)`, which keeps one of these or
            `Cholesky()` for many solves; or a function of the flat residual r (φ's tensors one
            after another) that approximates A⁻¹r, symmetric and positive definite. None divides by
            A's scale (λ of `proximal`).
        warm_start: a `WarmStart()`, to start from the last solution where that is nearer than 0.
            The results then depend on the calls before.

    A solve that stops before convergence is not linear in v: the gradient of a sum of losses is
    then not exactly the sum of their gradients.

    "stop" changes no bit where all curvature is positive. Where it is not, φ is no strict minimum,
    and what CG returns depends on the condition. With `proximal` it is the last iterate, made no
    longer than v/λ; if already the first direction is bent down, it is v/λ itself, as in
    first-order MAML. With `argmin` there is no such unit: `EarlyStopped` takes over, for at most 20
    products (or `maxiter`, if that is less). It is told how φ was trained if one of
    `implicit_grad.solvers` did that. Else it takes a time of ‖φ − φ₀‖/‖F‖ where the first argument
    is a module that was trained, or weights without grad in a container with all the names and
    shapes of φ, and so φ₀; else of ‖φ‖/‖F‖, but at least 1 over the greatest curvature met; at most
    200 over it. Always vᵀx > 0.

    Curvature of either sign that is no more than φ's own slope explains, ‖F‖/‖φ‖, is left alone
    where all else is solved: φ is then unique but for a change that the outer loss does not see, as
    in factors U Vᵀ or weights before a normalisation.

    >>> CG(maxiter=5).on_negative_curvature
    'stop'
    """

    damping: float = 0.0
    on_negative_curvature: OnNegativeCurvature = "stop"
    preconditioner: Preconditioner | Precondition | None = None
    warm_start: WarmStart | Slot | None = None

    symmetric_only: ClassVar[bool] = True
    definite_only: ClassVar[bool] = True
    tells_error: ClassVar[bool] = True
    least_maxiter: ClassVar[int] = 0
    when_indefinite: ClassVar[str] = "CG stops at the last iterate that is a descent direction"
    truncates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "damping")
        policy = self.on_negative_curvature
        check_one_of("CG", "on_negative_curvature", policy, get_args(OnNegativeCurvature))
        given = self.preconditioner
        usable = callable(given) or isinstance(given, Preconditioner)
        if given is not None and (isinstance(given, type) or not usable):
            raise InvalidArgumentError(
                f"CG(preconditioner={given!r}): expected None, Jacobi(), Nystrom(rank=...), "
                "Reuse(Cholesky()) or a function of the flat residual"
            )
        if not isinstance(self.warm_start, (WarmStart, Slot, type(None))):
            raise InvalidArgumentError(
                f"CG(warm_start={self.warm_start!r}): expected None or a WarmStart()"
            )

    def for_call(self) -> LinearSolver:
        """This solver, bound to the key that `WarmStart.at` has set now."""
        if self.warm_start is None:
            return self
        return dataclasses.replace(self, warm_start=self.warm_start.slot())

    def starting_from(self, slot: Slot) -> LinearSolver:
        if self.warm_start is not None or self.maxiter == 0:
            return self
        return dataclasses.replace(self, warm_start=slot)

    def cold(self) -> LinearSolver:
        return self if self.warm_start is None else dataclasses.replace(self, warm_start=None)

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        if self.maxiter == 0:
            return LinearSolution(operator.over_scale(rhs), Status.FIRST_ORDER)
        if operator.either_sign and dot(rhs, operator.matvec(rhs)) < 0:
            negated = operator.times(-1.0).damped(self.damping)  # away from 0 as well
            return self._positive(negated, -rhs, unit, verify).of_negated()
        return self._positive(operator.damped(self.damping), rhs, unit, verify)

    def _positive(
        self, operator: Operator, rhs: Tensor, unit: float, verify: bool
    ) -> LinearSolution:
        """Solve a system that is positive definite, if it is definite."""
        budget = self.budget(operator, rhs, unit)
        precondition = self._precondition(operator, rhs)
        slot = None if self.warm_start is None else self.warm_start.slot()
        run = ConjugateGradients(operator, rhs, budget, precondition)
        start = None if slot is None else slot.get(rhs)
        if start is not None and budget.maxiter > 1:  # the start takes one product of the budget
            run.start_at(start / unit)
        run.iterate()
        if run.warm and run.status in _NOT_POSITIVE:
            # vᵀx > 0 and the limit on ‖x‖ are promised to runs from 0 only
            warm, run = run, ConjugateGradients(operator, rhs, budget, precondition)
            run.iterate()
            run.follow(warm)
        solution = self._finish(run, verify)
        again = self._before_flat(run)
        if again is not None:
            run = again
            solution = dataclasses.replace(self._finish(run, verify), is_flat=True)
        if run.status in _NOT_POSITIVE:
            solution = self._substitute(solution, operator, rhs, unit, verify)
        if slot is not None and solution.status.ok:
            slot.put(solution.x * unit)
        return solution

    def _before_flat(self, run: ConjugateGradients) -> ConjugateGradients | None:
        """A run to where only flatness was left, if it solves what this one did not."""
        if run.status not in MAY_BE_FLAT or run.extremes is None or self.is_asked or run.warm:
            return None
        (unknown,) = unknown_curvature(run.operator, 1)
        if not is_flat(*run.extremes, unknown):
            return None
        curved = itertools.takewhile(lambda quotient: quotient > unknown, run.quotients)
        left = [size for _, size in zip(curved, run.residuals, strict=False)]
        if not left:
            return None
        near = run.budget._replace(target=SLACK * min(left))
        again = ConjugateGradients(run.operator, run.rhs, near, run.precondition)
        again.iterate()
        again.follow(run)
        return again if is_solved(norm(again.residual), norm(again.x), unknown) else None

    def _stopped(self, solution: LinearSolution, operator: Operator, rhs: Tensor) -> LinearSolution:
        """The last iterate, or, for want of a unit, what a training that was stopped makes of v."""
        if operator.scale is not None or operator.either_sign:
            return solution
        (found,) = instead_of_minimum(of_one(operator), rhs[None], self.maxiter)
        told = solution.residual is not None and found.status.ok
        return dataclasses.replace(
            _after(solution, found),
            status=solution.status if found.status.ok else found.status,
            residual=relative_residual(operator, found.x, rhs) if told else None,
            coefficients=solution.coefficients,
        )

    @property
    def needs_convex(self) -> bool:  # type: ignore[override]
        """Whether Gauss-Newton products may take over."""
        return self.on_negative_curvature == "gauss_newton"

    @property
    def takes_tasks(self) -> bool:  # type: ignore[override]
        """Whether nothing is asked for that batches do not have."""
        plain = self.preconditioner is None and self.warm_start is None
        return plain and self.on_negative_curvature in ("stop", "raise")

    def solve_tasks(
        self, operator: Operator, rhs: Tensor, verify: bool
    ) -> tuple[Tensor, list[LinearSolution]]:
        if self.maxiter == 0:
            return first_order(operator, rhs)
        signs = _signs(operator, rhs) if operator.either_sign else None
        if signs is not None:
            operator, rhs = operator.times(signs), signs * rhs
        x, solutions = solve_tasks(self, operator.damped(self.damping), rhs, verify)
        if signs is not None:
            pairs = zip(signs[:, 0].tolist(), solutions, strict=True)
            solutions = [s if sign > 0 else s.of_negated() for sign, s in pairs]
        if self.on_negative_curvature == "raise":
            for solution in solutions:
                if solution.status == Status.NEGATIVE_CURVATURE:
                    raise _refusal(solution)
        return x, solutions

    def _precondition(self, operator: Operator, rhs: Tensor) -> Precondition | None:
        given = self.preconditioner
        if given is None:
            return None
        made = given.build(operator, rhs) if isinstance(given, Preconditioner) else given
        precondition = checked(made, rhs, "CG")
        if operator.either_sign and dot(rhs, precondition(rhs)) < 0:
            return lambda r: -precondition(r)  # of a negative definite matrix's inverse
        return precondition

    def _finish(self, run: ConjugateGradients, verify: bool) -> LinearSolution:
        """The run's solution; the residual is recomputed where something was promised about it."""
        promised = not run.budget.fixed or run.operator.rtol_error is not None
        return run.solution(run.refine() if verify or promised else None)

    def _substitute(
        self,
        solution: LinearSolution,
        operator: Operator,
        rhs: Tensor,
        unit: float,
        verify: bool,
    ) -> LinearSolution:
        """What to return where negative curvature was met."""
        policy = self.on_negative_curvature
        if policy == "raise":
            raise _refusal(solution)
        if policy == "stop":
            return self._stopped(solution, operator, rhs)
        again: LinearSolver
        if policy == "minres":
            again = MINRES(maxiter=self.maxiter, rtol=self.rtol, atol=self.atol)
        else:
            if operator.convex is None:
                raise LinearSolveError(
                    'CG(on_negative_curvature="gauss_newton") met negative curvature and has no '
                    "Gauss-Newton products to go on with: give the condition its model=, or pass "
                    'curvature="gauss_newton" where it is offered',
                    anchor="negative-curvature",
                )
            operator = dataclasses.replace(
                operator, matvec=operator.convex, rmatvec=operator.convex
            )
            again = dataclasses.replace(
                self, damping=0.0, on_negative_curvature="stop", warm_start=None
            )
        second = again._solve(operator, rhs, unit, verify)
        return dataclasses.replace(_after(solution, second), substitute=policy)


def _signs(operator: Operator, rhs: Tensor) -> Tensor:
    """−1 for each task whose M can be no positive definite matrix, but the negative of one."""
    largest = rhs.abs().amax(1, keepdim=True)
    ordinary = (largest > 0) & largest.isfinite()
    unit = torch.where(ordinary, rhs / largest, 0.0)
    return torch.where(dots(unit, operator.matvec(unit)) < 0, -1.0, 1.0).to(rhs)[:, None]


def _after(first: LinearSolution, second: LinearSolution) -> LinearSolution:
    """The second solution, with the products of a first attempt and the extremes that it met."""
    met = (*(first.extremes or ()), *(second.extremes or ()))
    iterations = first.iterations + second.iterations
    return dataclasses.replace(second, iterations=iterations, extremes=(min(met), max(met)))


def _refusal(solution: LinearSolution) -> LinearSolveError:
    said, anchor = f"CG met negative curvature: {solution.status.sentence}", solution.status.anchor
    return LinearSolveError(said, anchor=anchor)
