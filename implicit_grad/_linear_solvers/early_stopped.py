"""What takes the place of A⁻¹ where φ was trained for a while and then stopped."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, Status
from implicit_grad._linear_solvers.base import Filter, LinearSolution, Operator, Times
from implicit_grad._linear_solvers.lanczos import Filtering, apply_filter
from implicit_grad._options import (
    is_number,
    require,
    require_count,
    require_flag,
    require_fraction,
    require_positive,
)

# Of a training that nothing is known of: its time, in units of 1 over the greatest curvature.
UNKNOWN_TIME = 200.0
_PRODUCTS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopped(Filtering):
    """For φ that were trained by gradient steps, and stopped before they solved anything.

    One step is φ⁺ = φ − lr F(φ, a). Differentiate n of them, with A = ∂F/∂φ held fixed:

        dφ/da = −g(A) ∂F/∂a,    g(h) = (1 − p(h))/h,    p(h) = (1 − lr·h)ⁿ ≈ exp(−t·h),    t = n·lr.

    A solution would have A⁻¹ in the place of g(A). The derivative by the starting point, which is θ
    with `proximal`, is p(A) = I − A g(A). g(h) is 1/h where training has settled, t where it has
    only begun, and finite everywhere: early stopping is a regularisation, close to a ridge of 1/t
    (Landweber's filter, in Engl, Hanke and Neubauer, 1996, Regularization of Inverse Problems, 6.1;
    Ali, Kolter and Tibshirani, 2019, A continuous-time view of early stopping for least squares
    regression). `Neumann(terms=n, scale=lr)` takes n products for the same polynomial (Lorraine et
    al., 2020); here `maxiter` products make the best polynomial of their number.

    Where h < 0 the steps' own factor would grow as exp(t|h|), which no training follows, for A
    changes on the way. So g is taken at |h|. In the median of small networks this is 40 % off the
    unrolled derivative; nothing else that was tried came closer, and it is never far too long.

    `imaml` counts its steps: `EarlyStopped()` there is the derivative of the steps themselves, with
    A from the one in the middle, where g(h) is right for h < 0 too.

    Args:
        time: t, the sum of all step lengths over 1 − momentum, in the units of φ² over the
            objective's: see `training_time`. Then p(h) = exp(−t·h).
        steps: or n, with
        lr: the length of a step, for the exact polynomial. Where steps are too long for a curvature
            (lr·h ≥ 2 without momentum), training counts as settled.
        momentum: β of v⁺ = βv + F, φ⁺ = φ − lr v⁺, from v = 0 (heavy ball, as torch.optim.SGD has
            it), 0 ≤ β < 1.
        nesterov: F is taken ahead, at φ + β(φ − φ⁻), as by Nesterov.
        maxiter: most products to take, and vectors of φ's size to keep. This alone is a fixed
            budget, which does not warn.
        rtol: stop when the last products changed the result by less than this, relative; None
            means eps^(2/3) for the coarsest dtype among the tensors.

    >>> EarlyStopped(steps=100, lr=0.1, momentum=0.9).maxiter
    20
    """

    time: float | None = None
    steps: int | None = None
    lr: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    maxiter: int = _PRODUCTS
    rtol: float | None = None

    keeps_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = (self.time is not None, self.steps is not None, self.lr is not None)
        if given not in ((True, False, False), (False, True, True), (False, False, False)):
            raise InvalidArgumentError(
                f"EarlyStopped(time={self.time!r}, steps={self.steps!r}, lr={self.lr!r}): give "
                "time, or both steps and lr (or with imaml, which counts the steps, none of them)"
            )
        if self.time is not None:
            require_positive(self, "time")
        if self.steps is not None:
            require_count(self, "steps", 0)
            require_positive(self, "lr")
        good = is_number(self.momentum) and 0 <= self.momentum < 1
        require(self, "momentum", good, "a number from 0 to below 1")
        require_flag(self, "nesterov")
        if self.steps is None and (self.momentum or self.nesterov):
            raise InvalidArgumentError(
                "EarlyStopped: momentum and nesterov go with steps and lr; in time they are "
                "counted already (the sum of step lengths over 1 - momentum)"
            )
        require_count(self, "maxiter", 1)
        require_fraction(self, "rtol")

    @property
    def counts_nothing(self) -> bool:
        """Whether the steps are for somebody else to count."""
        return self.time is None and self.steps is None

    def of_steps(self, steps: int, lr: float) -> EarlyStopped:
        """The derivative of so many steps that were counted, around one among them."""
        return _AmongSteps(steps=steps, lr=lr, maxiter=self.maxiter, rtol=self.rtol)

    def _filtered(self, operator: Operator, rhs: Tensor) -> list[LinearSolution]:
        return self._apply(operator, rhs, self.weigh)

    def weigh(self, curvatures: Tensor) -> Tensor:
        """g(|h|) for curvatures h."""
        sizes = curvatures.abs()
        return self._polynomial(sizes) if self.time is None else exponential(self.time, sizes)

    def _polynomial(self, sizes: Tensor) -> Tensor:
        """g(h)/lr = s_n of a recurrence like the steps' own, in x = lr·h, for s = (1 − p)/x.

        p follows p⁺ = (1 + β − x) p − β p⁻ from p = p⁻ = 1, and with Nesterov's look ahead
        p⁺ = (1 − x)((1 + β) p − β p⁻). So nothing is cancelled where x is small.
        """
        assert self.steps is not None and self.lr is not None
        beta, x = self.momentum, self.lr * sizes
        longest = 2 * (1 + beta) / (1 + 2 * beta * self.nesterov)
        ahead = 1 - x * self.nesterov
        step = x.new_zeros(len(x), 3, 3)  # of (s, s⁻, 1)
        step[:, 0, 0] = 1 + beta * ahead - x
        step[:, 0, 1] = -beta * ahead
        step[:, 0, 2] = step[:, 1, 0] = step[:, 2, 2] = 1.0
        s: Tensor = torch.linalg.matrix_power(step, self.steps)[:, 0, 2]
        return torch.where(x < longest, self.lr * s, 1 / sizes)


class _AmongSteps(EarlyStopped):
    """With A from among the steps, and not from where they ended, h < 0 is what they followed."""

    def weigh(self, curvatures: Tensor) -> Tensor:
        return self._polynomial(curvatures)


def instead_of_minimum(operator: Operator, rhs: Tensor, most: int | None) -> list[LinearSolution]:
    """g(|M|) rhs for each row of rhs, where M is not definite, by the g that is known best.

    That of φ's own training; else that of the longest time that φ and F allow (`Times`), but of at
    most 200 over the greatest curvature met: 200 is 1/h for curvatures h above 1 % of that one. At
    most 20 products, or `most`.
    """
    known = None if operator.training is None else operator.training()
    filters = [known] * len(rhs) if known else _unknown_trainings(operator, len(rhs))
    target = operator.precision(rhs) ** (2 / 3)
    products = _PRODUCTS if most is None else min(_PRODUCTS, most)
    found = apply_filter(operator, rhs, filters, products, target, Status.TRUNCATED)
    return [dataclasses.replace(solution, substitute="early_stopped") for solution in found]


def _unknown_trainings(operator: Operator, rows: int) -> list[Filter]:
    known = [Times()] * rows if operator.spans is None else operator.spans(rows)
    return [functools.partial(_unknown_training, times) for times in known]


def _unknown_training(times: Times, curvatures: Tensor) -> Tensor:
    sizes = curvatures.abs()
    greatest = float(sizes.max())
    if not greatest:
        return torch.ones_like(sizes)
    time = min(max(times.least, times.longest * greatest), UNKNOWN_TIME)
    return exponential(time / greatest, sizes)


def exponential(time: float, sizes: Tensor) -> Tensor:
    """(1 − exp(−t·h))/h for h ≥ 0, and t at h = 0."""
    growing = -torch.expm1(-time * sizes)
    return torch.where(sizes > 0, growing / sizes, time)
