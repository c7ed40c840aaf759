"""Conjugate gradients for a batch of systems: one product for all tasks, and a recurrence each.

Tasks that share no unknowns have a block-diagonal matrix, so that one product serves them all. The
scalars of the recurrences are vectors here, with a number for each task; a task that is done, for
better or worse, is left out by a mask, and ends as it would have ended alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import (
    LinearSolution,
    Operator,
    dots,
    drift,
    largest_exponent,
    waited_for,
)
from implicit_grad._linear_solvers.early_stopped import instead_of_minimum
from implicit_grad._linear_solvers.flat import MAY_BE_FLAT, is_flat, is_solved, unknown_curvature
from implicit_grad._linear_solvers.iterative import LOST, PATIENCE, RESTART_GAIN, SLACK, Iterative

# Where a number can be read from the device only by waiting for it, iterations taken between two
# looks at whether any task still needs one.
_LOOK_EVERY = 4


def solve_tasks(
    rules: Iterative, operator: Operator, rhs: Tensor, verify: bool
) -> tuple[Tensor, list[LinearSolution]]:
    """Solve operator · x = rhs, where both have a row for each task."""
    run = _Run(rules, operator, rhs)
    run.iterate(run.status == run.budget.exhausted)
    promised = verify or not run.budget.fixed
    residual = run.refine() if promised else None
    if run.before_flat() and promised:
        residual = run.refine()
    return run.solutions(residual)


def first_order(operator: Operator, rhs: Tensor) -> tuple[Tensor, list[LinearSolution]]:
    """rhs over the scale: no product is taken."""
    sizes = torch.sqrt(dots(rhs, rhs)).tolist()
    x, found = operator.over_scale(rhs).clone(), []
    for row, size in zip(x, sizes, strict=True):
        if not math.isfinite(size) and not bool(torch.isfinite(row).all()):
            row.fill_(math.nan)
            found.append(LinearSolution(row, Status.NONFINITE_RHS))
        elif not bool(row.any()):
            found.append(LinearSolution(row, Status.ZERO_RHS, residual=0.0))
        else:
            found.append(LinearSolution(row, Status.FIRST_ORDER))
    return x, found


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """CG's coefficients of one iteration, the tasks that took it, and pᵀMp/pᵀp."""

    alpha: Tensor
    beta: Tensor
    rz: Tensor
    taken: Tensor
    quotient: Tensor

    def told(self) -> Tensor:
        return torch.stack([self.alpha, self.beta, self.rz, self.taken.double()])


class _Run:
    """The iterates of all tasks, as rows, and what the recurrences carry."""

    def __init__(self, rules: Iterative, operator: Operator, rhs: Tensor) -> None:
        self.rules, self.operator = rules, operator
        # along rows, aminmax and norms are many times slower
        largest = rhs.amax(1).maximum(-rhs.amin(1)) if rhs.shape[1] else rhs.new_zeros(len(rhs))
        finite = torch.isfinite(largest)
        exponents = torch.frexp(torch.where(finite, largest, 0.0)).exponent
        limit = largest_exponent(rhs.dtype)
        ones = torch.ones_like(largest, dtype=torch.float64)
        # of integers, older torches (2.4) take the power in float32, whose range is smaller
        self.unit = torch.ldexp(ones, exponents.clamp(-limit, limit).double())
        self.rhs = self.residual = rhs / _column(self.unit, rhs)
        self.x = torch.zeros_like(rhs)
        self.size = dots(self.rhs, self.rhs).sqrt()
        self.budget = rules.relative_budget(operator, rhs, rhs.shape[1])
        self.target = (self.budget.target * self.size).maximum(rules.atol / self.unit)
        self.status = torch.full_like(exponents, self.budget.exhausted)
        self._end(largest == 0, Status.ZERO_RHS)
        self._end(~finite, Status.NONFINITE_RHS)
        self.iterations = torch.zeros_like(exponents)
        self.restarted = torch.zeros_like(finite)
        self.least = torch.full_like(ones, math.inf)
        self.greatest = torch.full_like(ones, -math.inf)
        self.residual_norm = self.gap = torch.full_like(ones, math.nan)
        self.rounding: float | None = None
        self.steps: list[_Iteration] = []
        self.stopped: dict[int, LinearSolution] = {}  # of tasks that have no strict minimum
        self.flat: set[int] = set()  # tasks that ended before curvature that is none to speak of

    def _end(self, which: Tensor, status: Status) -> Tensor:
        """Give these tasks their status; returns the others."""
        self.status = self.status.masked_fill(which, status)
        return ~which

    def iterate(self, started: Tensor) -> None:
        """Conjugate gradients on operator · d = residual for some of the tasks, adding d to x."""
        eps, scale = torch.finfo(self.rhs.dtype).eps, self._number
        going = started & ~self._end(started, self.budget.exhausted)
        self.residual = r = self.residual.clone()
        rr = dots(r, r)
        going = going & self._end(going & (rr.sqrt() <= self.target), Status.CONVERGED)
        rz, z = self._preconditioned(r, rr)
        p = self._left_out(z.clone(), going)
        energy, gains = torch.zeros_like(rz), rz.new_full((PATIENCE, len(rz)), math.inf)
        for k in range(self.budget.maxiter):
            going = going & (self.iterations < self.budget.maxiter)
            if (k % _LOOK_EVERY == 0 or not waited_for(r)) and not bool(going.any()):
                break
            product = self.operator.matvec(p)
            self.iterations = self.iterations + going
            pMp, pp = dots(p, product), dots(p, p)
            finite = torch.isfinite(pMp)
            going = going & self._end(going & ~finite, Status.NONFINITE_OPERATOR)
            quotient = pMp / pp
            self._meet(quotient, going)
            going = going & self._end(going & (pMp <= 0), Status.NEGATIVE_CURVATURE)
            alpha = rz / pMp
            lost = alpha * pp.sqrt() * self.greatest * eps > LOST * self.size
            going = going & self._end(going & lost, Status.SINGULAR)
            alpha = torch.where(going, alpha, 0.0)
            self.x.addcmul_(_column(alpha, p), p)
            r.addcmul_(_column(alpha, p), self._left_out(product, going), value=-1)
            del product  # the next one need not find it still there
            rr, before = dots(r, r), rz
            rz, z = self._preconditioned(r, rr)
            beta = torch.where(going, rz / before, 0.0)
            self.steps.append(_Iteration(alpha * scale, beta, rz / scale, going, quotient))
            going = going & self._end(going & (rr.sqrt() <= self.target), Status.CONVERGED)
            gain = alpha * before
            energy, gains = energy + gain, torch.cat([gains[1:], gain[None]])
            still = gains.sum(0) <= eps**2 * energy
            going = going & self._end(going & still, self.budget.stalled)
            p = self._left_out(torch.addcmul(z, _column(beta, p), p, out=p), going)
        self._limit(started)

    @property
    def _number(self) -> float:
        """The scale, if it is a number; CG's iterates would be the same for any."""
        scale = self.operator.scale
        return 1.0 if scale is None or isinstance(scale, Tensor) else scale

    def _preconditioned(self, r: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
        """rᵀz and z = S⁻¹r, but for a scale that is a number."""
        if not isinstance(self.operator.scale, Tensor):
            return rr, r
        z = r / self.operator.scale
        return dots(r, z), z

    def _left_out(self, rows: Tensor, going: Tensor) -> Tensor:
        """Zeros for the tasks that have ended, whatever there is: 0 times NaN is not 0."""
        if waited_for(rows) or not bool(going.all()):  # a look is cheaper than a pass on a CPU only
            rows.masked_fill_(~going[:, None], 0.0)
        return rows

    def _meet(self, quotients: Tensor, going: Tensor) -> None:
        """Remember the quotients pᵀMp/pᵀp of the tasks that go on."""
        self.least = torch.where(going, self.least.minimum(quotients), self.least)
        self.greatest = torch.where(going, self.greatest.maximum(quotients), self.greatest)

    def before_flat(self) -> bool:
        """Run tasks again, to where only flatness was left, if that solves what they did not."""
        failed = torch.isin(self.status, self.status.new_tensor(MAY_BE_FLAT))
        if self.rules.is_asked or not self.steps or not bool(failed.any()):
            return False
        unknown = torch.tensor(unknown_curvature(self.operator, len(self.rhs))).to(self.least)
        quotients = torch.stack([s.quotient for s in self.steps])  # NaN of tasks that have ended
        least, greatest = quotients.nan_to_num(math.inf).amin(0), quotients.nan_to_num(-1.0).amax(0)
        told = torch.stack([least, greatest, unknown], 1).tolist()
        which = failed & torch.tensor([is_flat(*row) for row in told], device=failed.device)
        if not bool(which.any()):
            return False
        flat = (quotients <= unknown).long().cummax(0).values.bool()
        taken = torch.stack([s.taken for s in self.steps])
        squares = torch.stack([s.rz for s in self.steps]).masked_fill(flat | ~taken, math.inf)
        before = self.x, self.residual, self.status, self.target
        iterations, rows = self.iterations, which[:, None]
        self.x, self.residual = self.x.masked_fill(rows, 0.0), self.rhs.where(rows, self.residual)
        self.target = torch.where(which, SLACK * squares.amin(0).sqrt(), self.target)
        self.iterations = iterations.masked_fill(which, 0)
        self.restarted = self.restarted | which
        self.iterate(which)
        self.iterations = torch.where(which, iterations + self.iterations, self.iterations)
        left, length = dots(self.residual, self.residual).sqrt(), dots(self.x, self.x).sqrt()
        which = which & is_solved(left, length, unknown)
        after = self.x, self.residual, self.status, self.target
        self.x, self.residual, self.status, self.target = (
            torch.where(which[:, None] if new.dim() == 2 else which, new, old)
            for old, new in zip(before, after, strict=True)
        )
        for task in which.nonzero().flatten().tolist():
            self.stopped.pop(task, None)
            self.flat.add(task)
        self.least = torch.where(which, least, self.least)  # and not what a substitute met
        self.greatest = torch.where(which, greatest, self.greatest)
        return bool(which.any())

    def _limit(self, started: Tensor) -> None:
        """After negative curvature, keep x no longer than the first-order solution."""
        stopped = started & (self.status == Status.NEGATIVE_CURVATURE)
        if self.operator.scale is None:
            return self._instead_of_minimum(stopped)
        if not waited_for(stopped) and not bool(stopped.any()):
            return
        first = self.operator.over_scale(self.rhs)
        self.x = torch.where((stopped & (self.iterations == 1))[:, None], first, self.x)
        size, most = self._scaled_norm(self.x), self._residual_norm(self.rhs)
        self.x.mul_(_column(torch.where(stopped & (size > most), most / size, 1.0), self.x))

    def _instead_of_minimum(self, which: Tensor) -> None:
        """For want of a unit, take what trainings that were stopped make of these tasks' rhs."""
        if not bool(which.any()):
            return
        rows = self.rhs.masked_fill(~which[:, None], 0.0)
        found = instead_of_minimum(self.operator, rows, self.budget.maxiter)
        for task, solution in enumerate(found):
            if solution.status is Status.ZERO_RHS:
                continue
            self.x[task], self.stopped[task] = solution.x, solution
            self.iterations[task] += solution.iterations
            if not solution.status.ok:
                self.status[task] = solution.status
            for quotient in solution.extremes or ():
                self.least[task].clamp_(max=quotient)
                self.greatest[task].clamp_(min=quotient)

    def refine(self) -> Tensor:
        """Hold the carried residuals to their word, and restart tasks where they have drifted.

        Returns the relative residuals.
        """
        before = torch.full_like(self.size, math.inf)
        ran = torch.ones_like(self.restarted)
        while True:
            carried, self.residual = self.residual, self.rhs - self.operator.matvec(self.x)
            self._measure(carried, ran)
            size = dots(self.residual, self.residual).sqrt()
            promised = (self.status == Status.CONVERGED) | (self.status == self.budget.stalled)
            small = size <= SLACK * self.target
            self._end(promised & small, Status.CONVERGED)
            self._end(promised & ~small, self.budget.stalled)
            ran = promised & ~small & (self.iterations < self.budget.maxiter)
            ran = ran & (size < RESTART_GAIN * before)
            if self.budget.fixed or not bool(ran.any()):
                return size / self.size
            before, self.restarted = torch.where(ran, size, before), self.restarted | ran
            self.iterate(ran)

    def _measure(self, carried: Tensor, ran: Tensor) -> None:
        """The true residuals and their distances from the carried ones, with rounding errors."""
        operator, away = self.operator, self.residual - carried
        length, size = dots(self.x, self.x).sqrt(), dots(away, away).sqrt()
        self.rounding = operator.rounding(self.rhs)
        sizes = size, self.greatest.clamp_min(0.0), length, self.size
        error = drift(*sizes, self.rounding)
        if operator.scale is not None:
            least = torch.as_tensor(operator.scale).to(error)
            error = error / (least.amin(1) if least.dim() else least).sqrt()
        norm = self._residual_norm(self.residual) + error
        gap = self._residual_norm(away) + error
        self.residual_norm = torch.where(ran, norm, self.residual_norm)
        self.gap = torch.where(ran, gap, self.gap)

    def _scaled_norm(self, x: Tensor) -> Tensor:
        scale = self.operator.scale
        return dots(x, x if scale is None else x * scale).sqrt()

    def _residual_norm(self, r: Tensor) -> Tensor:
        return dots(r, self.operator.over_scale(r)).sqrt()

    def solutions(self, residual: Tensor | None) -> tuple[Tensor, list[LinearSolution]]:
        """All solutions, and what is known of each: read from the device at once."""
        nothing = (self.status == Status.NONFINITE_RHS) | (self.status == Status.NONFINITE_OPERATOR)
        x = self.x.mul_(_column(torch.where(nothing, math.nan, self.unit), self.x))
        blank = torch.full_like(self.unit, math.nan)
        measured = (blank if residual is None else residual, self.residual_norm, self.gap)
        numbers = (self.status, self.iterations, self.least, self.greatest, self.restarted)
        told = torch.stack([
            *(t.double() for t in (*numbers, self.unit)),
            *(t.where(~nothing, blank) for t in measured),
        ])  # fmt: skip
        history = torch.stack([s.told() for s in self.steps]).tolist() if self.steps else []
        found = []
        for task, (status, iterations, least, greatest, restarted, unit, *sizes) in enumerate(
            told.T.tolist()
        ):
            if status in (Status.ZERO_RHS, Status.NONFINITE_RHS):
                zero = 0.0 if status == Status.ZERO_RHS else None
                found.append(LinearSolution(x[task], Status(int(status)), residual=zero))
                continue
            steps = [[row[task] for row in step] for step in history]
            relative, size, gap = (None,) * 3 if residual is None else sizes
            stopped = self.stopped.get(task)
            if stopped is not None:  # x solves nothing
                size = gap = None
            found.append(
                LinearSolution(
                    x[task],
                    Status(int(status)),
                    int(iterations),
                    relative,
                    (least, greatest) if least <= greatest else None,
                    ()
                    if restarted
                    else tuple((a, b, rz * unit * unit) for a, b, rz, taken in steps if taken),
                    residual_norm=None if size is None else size * unit,
                    gap=None if gap is None else gap * unit,
                    rounding=None if stopped else self.rounding,
                    substitute=stopped.substitute if stopped else None,
                    filter_error=stopped.filter_error if stopped else None,
                    is_flat=task in self.flat,
                )
            )
        return x, found


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each row, in the dtype of the rows."""
    return numbers.to(like.dtype)[:, None]
