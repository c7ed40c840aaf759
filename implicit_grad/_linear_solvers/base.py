"""The contract of linear solvers: find x with M x = rhs, M given by products."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.warm_start import Slot

# Longer rows are multiplied one by one on a CPU: that makes no vector, and calls are cheap then.
_LONG_ROW = 2**13


def waited_for(x: Tensor) -> bool:
    """Whether to read a number of this tensor is to wait for all that was launched before."""
    return x.is_cuda


def read(*numbers: Tensor) -> list[float]:
    """The numbers, with one wait for the device."""
    if waited_for(numbers[0]):
        told: list[float] = torch.stack(numbers).tolist()
        return told
    return [float(number) for number in numbers]


def dots(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy for each task, in double precision: what follows from it is small."""
    if waited_for(x) or x.shape[1] < _LONG_ROW:
        products: Tensor = torch.linalg.vecdot(x, y)
    else:
        products = torch.stack([torch.dot(a, b) for a, b in zip(x, y, strict=True)])
    return products.double()


class Times(NamedTuple):
    """Between which times an unknown training lies.

    Attributes:
        longest: way over ‖F‖, the way from φ₀ to φ, or ‖φ‖ if φ₀ is not known: a training that was
            longer would have taken φ farther.
        least: in units of 1 over the greatest curvature.
        bend: ‖F‖/‖φ‖, the curvature along a symmetry of the objective; 0 where not known.
    """

    longest: float = math.inf
    least: float = 1.0
    bend: float = 0.0


T = TypeVar("T", float, Tensor)
# A function of a symmetric matrix, by its values at eigenvalues.
Filter = Callable[[Tensor], Tensor]
# More terms than these do not make a sum less precise: see `Operator.rounding`.
_LONG_SUM = 16


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square matrix M known by its products with flat vectors.

    Attributes:
        matvec: x ↦ M x.
        rmatvec: x ↦ Mᵀx.
        scale: S, its natural unit (λ of a proximal term, as a number or per element): what the
            matrix would be if it were diagonal. None means 1.
        eps: the relative precision of the products; None means that of the vectors.
        convex: x ↦ C x for a positive semi-definite matrix C that may stand in for M where M is
            indefinite (Gauss-Newton, S included); None where there is none.
        mu: μ > 0 with M ⪰ μS, where it is known.
        rtol_error: x is good enough when ‖x − M⁻¹rhs‖ ≤ rtol_error·‖x‖, ‖x‖² = xᵀSx.
        is_hessian: whether M is an objective's second derivative, or stands for it.
        training: makes the filter g of a training that was stopped, g(M) rhs for M⁻¹rhs, where it
            is known how φ was trained; None, or one that makes None, where it is not.
        spans: what φ and its slope F tell of how long it was trained, for each row of a batch of
            this size. None where not known.
        either_sign: whether M is symmetric but no objective's Hessian: it may be negative definite
            as well as positive definite.
        matrix: makes M of each task of a batch, or None, at less than a product for each unknown.
    """

    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    scale: float | Tensor | None = None
    eps: float | None = None
    convex: Callable[[Tensor], Tensor] | None = None
    mu: float | None = None
    rtol_error: float | None = None
    is_hessian: bool = False
    training: Callable[[], Filter | None] | None = None
    spans: Callable[[int], list[Times]] | None = None
    either_sign: bool = False
    matrix: Callable[[], Tensor | None] | None = None

    def precision(self, like: Tensor) -> float:
        """The relative precision of products with vectors like this one."""
        return torch.finfo(like.dtype).eps if self.eps is None else self.eps

    def rounding(self, like: Tensor) -> float:
        """How far rounding may take M x, relative to ‖M‖‖x‖, for vectors like this one.

        The precision of the products, and Higham's γₙ = n u/(1 − n u), u = eps/2, for sums of n
        products of numbers (Higham, 2002, Accuracy and Stability of Numerical Algorithms, §3.1).
        Longer sums than `_LONG_SUM` are made of blocks, and their errors cancel (Higham and Mary,
        2019, A new approach to probabilistic rounding error analysis): γₙ would be far too large.
        """
        nu = (min(like.shape[-1], _LONG_SUM) + 1) * torch.finfo(like.dtype).eps / 2
        return self.precision(like) + nu / (1 - nu)

    def over_scale(self, x: Tensor) -> Tensor:
        """S⁻¹x: the solution if the matrix were just its scale; no product taken."""
        return x if self.scale is None else x / self.scale

    def scaled_norm(self, x: Tensor) -> float:
        """√(xᵀSx), the norm in which distances between solutions are measured."""
        return norm(x) if self.scale is None else math.sqrt(dot(x, x * self.scale))

    def residual_norm(self, r: Tensor) -> float:
        """√(rᵀS⁻¹r), the norm of residuals that belongs to `scaled_norm`."""
        return math.sqrt(dot(r, self.over_scale(r)))

    def dense(self, like: Tensor) -> Tensor:
        """M itself, by a product for each unknown of vectors like this one."""
        identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
        return torch.stack([self.matvec(column) for column in identity], dim=1)

    def is_symmetric(self, like: Tensor) -> list[bool]:
        """Whether wᵀM u = uᵀM w, to rounding, for two random vectors; takes two products.

        One answer for each row of a batch, or for the only vector.
        """
        random = torch.Generator().manual_seed(0)  # of its own: no draw of the user's changes
        n = like.shape[-1]
        draws = (torch.randn(n, generator=random).to(like) for _ in range(2))
        vectors = [draw.expand_as(like).contiguous() for draw in draws]
        w, u, image, other = (
            t.reshape(-1, n) for t in (*vectors, *(self.matvec(x) for x in vectors))
        )
        size = (dots(w, w) * dots(other, other)).sqrt() + (dots(u, u) * dots(image, image)).sqrt()
        away = (dots(w, other) - dots(u, image)).abs()
        return [not off for off in (away > self.precision(like) ** (2 / 3) * size).tolist()]

    def times(self, signs: float | Tensor) -> Operator:
        """M, or each task's, times 1 or −1."""
        return dataclasses.replace(
            self,
            matvec=lambda x: signs * self.matvec(x),
            rmatvec=lambda x: signs * self.rmatvec(x),
        )

    def damped(self, damping: float) -> Operator:
        """M + damping·I, and likewise for the matrix that may stand in for M."""
        if not damping:
            return self

        def shifted(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: product(x) + damping * x

        return dataclasses.replace(
            self,
            matvec=shifted(self.matvec),
            rmatvec=shifted(self.rmatvec),
            convex=None if self.convex is None else shifted(self.convex),
        )


@dataclasses.dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found, and how it knows.

    Attributes:
        x: the solution.
        status: how the solve ended.
        iterations: products taken by the iteration, those of a first attempt included; not those
            that build a preconditioner or recompute the residual.
        residual: ‖rhs − M x‖/‖rhs‖, computed from x and not carried along; None if not computed.
        extremes: the least and greatest Rayleigh quotient pᵀMp/pᵀp met.
        coefficients: CG's: for each iteration alpha, beta and the new residual's rᵀS⁻¹r; Ritz
            values and error bounds follow from them. Empty where a restart or a preconditioner of
            another kind than S breaks the connection.
        residual_norm: √(rᵀS⁻¹r) of the recomputed residual r, at most: with the rounding error of
            recomputing it.
        gap: the same norm of the difference between r and the residual that was carried along.
        substitute: what was solved instead because M has negative curvature: "minres" for the
            same system by MINRES, "gauss_newton" for C x = rhs (then `residual` is that of C),
            "early_stopped" for g(|M|) rhs.
        error_is_bound: where the error (`Operator.rtol_error`) ended the iteration: whether it
            was a bound, or an estimate for want of μ.
        norm: an estimate of ‖M‖₂ where the extremes are not known.
        filter_error: where x is another function of M times rhs than M⁻¹rhs (`EarlyStopped`,
            `PositivePart`), an estimate of its relative error as that; None for solutions.
        rounding: `Operator.rounding`, where the residual was recomputed.
        is_flat: whether the negative curvature that was met cannot be told from 0.
    """

    x: Tensor
    status: Status
    iterations: int = 0
    residual: float | None = None
    extremes: tuple[float, float] | None = None
    coefficients: tuple[tuple[float, float, float], ...] = ()
    residual_norm: float | None = None
    gap: float | None = None
    substitute: Literal["minres", "gauss_newton", "early_stopped"] | None = None
    error_is_bound: bool | None = None
    norm: float | None = None
    rounding: float | None = None
    filter_error: float | None = None
    is_flat: bool = False

    def of_negated(self) -> LinearSolution:
        """The solution of M x = rhs, found as that of (−M) x = −rhs."""
        least, greatest = self.extremes or (math.inf, -math.inf)
        return dataclasses.replace(
            self,
            extremes=None if self.extremes is None else (-greatest, -least),
            coefficients=tuple((-a, b, rr) for a, b, rr in self.coefficients),
        )

    def in_units_of(self, unit: float) -> LinearSolution:
        """The solution for a right-hand side that is `unit` times as large; x is overwritten."""
        return dataclasses.replace(
            self,
            x=self.x.mul_(unit),
            coefficients=tuple((a, b, rr * unit * unit) for a, b, rr in self.coefficients),
            residual_norm=None if self.residual_norm is None else self.residual_norm * unit,
            gap=None if self.gap is None else self.gap * unit,
        )


class LinearSolver(abc.ABC):
    """Solves M x = rhs.

    Attributes:
        symmetric_only: whether M has to be symmetric.
        definite_only: whether M has to be positive definite, or near a multiple of the identity.
        tells_error: whether it can stop by `Operator.rtol_error`.
        takes_tasks: whether it has `solve_tasks`, with its present options.
        takes_small_tasks: whether it has `solve_tasks` for systems that are small enough.
        needs_convex: whether it may ask for `Operator.convex`.
        keeps_start: whether it is for φ that still depend on where their training started.
        needs_scale: whether it is for systems H + S only, S being the operator's scale (λ).
        takes_both_products: whether it needs products with Mᵀ as well as with M.
        damping: what it adds to M's diagonal.
    """

    symmetric_only: ClassVar[bool]
    definite_only: ClassVar[bool] = False
    tells_error: ClassVar[bool] = False
    when_indefinite: ClassVar[str] = ""  # what it does with negative curvature, in a sentence
    takes_tasks: bool = False
    takes_small_tasks: bool = False
    needs_convex: bool = False
    keeps_start: ClassVar[bool] = False
    needs_scale: ClassVar[bool] = False
    takes_both_products: ClassVar[bool] = False
    damping: float = 0.0

    def for_call(self) -> LinearSolver:
        """The solver for the backward pass of one call; asked for when that call runs forward."""
        return self

    def starting_from(self, slot: Slot) -> LinearSolver:
        """This solver, started from the solution that is kept there, if it can be."""
        return self

    def cold(self) -> LinearSolver:
        """This solver, but with no start from, or for, solves of other right-hand sides."""
        return self

    def to_tolerance(self) -> LinearSolver:
        """What solves for a solution that is differentiated: this solver, without a fixed budget.

        The derivative of A⁻¹v is not that of what a number of iterations leave of it.
        """
        return self

    def solve(self, operator: Operator, rhs: Tensor, verify: bool = True) -> LinearSolution:
        """Solve operator · x = rhs.

        Zero and non-finite right-hand sides are dealt with here, and the others are brought to
        magnitude 1 by a power of two, which changes no bit unless something would over- or
        underflow. `verify=False` allows to skip the product that recomputes the residual where
        nothing was promised about it.
        """
        ready = prepared(rhs)
        if isinstance(ready, LinearSolution):
            return ready
        rhs, unit = ready  # the caller may have kept no other
        return self._solve(operator, rhs, unit, verify).in_units_of(unit)

    def takes(self, n_tasks: int, unknowns: int) -> bool:
        """Whether so many systems of this size are solved by `solve_tasks`, or one by one."""
        return self.takes_tasks

    def solve_tasks(
        self, operator: Operator, rhs: Tensor, verify: bool
    ) -> tuple[Tensor, list[LinearSolution]]:
        """Solve a batch of systems: rhs, x and products have a row for each task."""
        raise NotImplementedError

    @abc.abstractmethod
    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        """Solve for a right-hand side of magnitude 1, which stands for `unit` times as much."""


def prepared(rhs: Tensor) -> LinearSolution | tuple[Tensor, float]:
    """The solution where there is nothing to solve; else rhs over a power of two, and that."""
    largest = float(rhs.abs().max()) if rhs.numel() else 0.0
    if largest == 0.0:
        return LinearSolution(torch.zeros_like(rhs), Status.ZERO_RHS, residual=0.0)
    if not math.isfinite(largest):
        return LinearSolution(torch.full_like(rhs, math.nan), Status.NONFINITE_RHS)
    limit = largest_exponent(rhs.dtype)
    unit = 2.0 ** max(-limit, min(limit, math.frexp(largest)[1]))
    return rhs / unit, unit


def largest_exponent(dtype: torch.dtype) -> int:
    """Of a power of two that can be divided by as well as multiplied with."""
    return 126 if dtype == torch.float32 else 1022


def drift(size: T, greatest: T, length: T, rhs: T, rounding: float) -> T:
    """How far a recomputed residual may be from rhs − M x itself, by rounding.

    A measured part and a modelled one. `size` is the distance between the residual that an
    iteration carried along and the recomputed one: a sample of the errors that products with M
    make, of one for each iteration and of the recomputing. It counts twice, as any sample may be
    smaller than what it is a sample of. Where unknowns are few it may be small by chance; there
    `rounding` (see `Operator`) of ‖M‖ times `length` = ‖x‖ and of ‖rhs‖ is enough, with the
    greatest quotient met in place of ‖M‖.
    """
    return 2 * size + rounding * (greatest * length + rhs)


def relative_residual(operator: Operator, x: Tensor, rhs: Tensor) -> float:
    """‖rhs − M x‖/‖rhs‖."""
    return norm(rhs - operator.matvec(x)) / norm(rhs)


def dot(x: Tensor, y: Tensor) -> float:
    """xᵀy, in the precision of the vectors (float32 or better)."""
    return torch.dot(x, y).item()


def norm(x: Tensor) -> float:
    """‖x‖₂."""
    return math.sqrt(dot(x, x))
