"""How far CG's iterate is from the solution: bounds and estimates from its coefficients.

CG on M x = rhs, preconditioned by M's scale S, is the Lanczos process for S^(-1/2) M S^(-1/2): its
coefficients are Gauss quadrature for the spectrum that the right-hand side sees. With a lower bound
μ on that spectrum, Gauss-Radau quadrature bounds the energy of the error from above (Golub and
Meurant, 1997), for three operations an iteration and no product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from implicit_grad._linear_solvers.base import LinearSolution

Coefficients = Sequence[tuple[float, float, float]]


def error_bound(solution: LinearSolution, mu: float) -> float | None:
    """A bound on √(eᵀSe), e = x − M⁻¹rhs, if M ⪰ μS; rounding errors are included.

    The carried residual r̂ and the true one r differ by the gap, and so e = M⁻¹r has
    ‖e‖ ≤ ‖M⁻¹r̂‖ + gap/μ, of which the first is bounded by quadrature. ‖r‖/μ is a bound as well:
    looser, but it needs no coefficients.

    With rounding, CG's coefficients are those of exact CG on a larger matrix, whose eigenvalues lie
    within rounding of M's (Greenbaum, 1989, Behavior of slightly perturbed Lanczos and
    conjugate-gradient recurrences): the quadrature takes a μ that is smaller by so much.
    """
    if solution.residual_norm is None or not math.isfinite(solution.residual_norm):
        return None
    if solution.substitute or (solution.extremes and solution.extremes[0] <= 0):
        return None  # then M ⪰ μS is not true
    rounding, below = solution.rounding or torch.finfo(solution.x.dtype).eps, mu
    if ritz := ritz_values(solution.coefficients):
        if ritz[0] < mu - 10 * rounding * ritz[-1]:
            return None  # nor here: Ritz values lie within the spectrum
        below = mu - rounding * ritz[-1]
    simple = solution.residual_norm / mu
    energy = radau_bound(solution, below) if below > 0 else None
    if energy is None or solution.gap is None:
        return simple
    return min(simple, (1 + rounding) * math.sqrt(energy / below) + solution.gap / mu)


def radau_bound(solution: LinearSolution, mu: float) -> float | None:
    """A bound on eᵀMe without rounding errors, e = x − M⁻¹rhs, if M ⪰ μS.

    The Gauss-Radau quadrature of Golub and Meurant, in the form of Meurant and Tichý (2013, On
    computing quadrature-based bounds for the A-norm of the error in conjugate gradients).
    """
    if not solution.coefficients:
        return None
    gamma = 1 / mu
    for alpha, beta, _ in solution.coefficients:
        gamma = _radau_step(gamma, alpha, beta, mu)
    return None if math.isnan(gamma) else gamma * solution.coefficients[-1][2]


def _radau_step(gamma: float, alpha: float, beta: float, mu: float) -> float:
    """The factor γ in eᵀMe ≤ γ rᵀS⁻¹r, one iteration on; NaN if the coefficients deny M ⪰ μS."""
    beyond = gamma - alpha
    return beyond / (mu * beyond + beta) if beyond > 0 else math.nan


def ritz_values(coefficients: Coefficients) -> list[float]:
    """Eigenvalues of the Lanczos matrix behind CG's coefficients, in ascending order."""
    size = len(coefficients)
    if not size:
        return []
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for j, (alpha, beta, _) in enumerate(coefficients):
        matrix[j, j] += 1 / alpha
        if j + 1 < size:
            matrix[j + 1, j + 1] = beta / alpha
            matrix[j, j + 1] = matrix[j + 1, j] = math.sqrt(beta) / alpha
    values: list[float] = torch.linalg.eigvalsh(matrix).tolist()
    return values


class ErrorWatch:
    """The error of the iterate while CG runs: a bound where μ is known, else an estimate.

    Known μ: Gauss-Radau, as in `radau_bound`. Unknown μ: the simpler form of Meurant and Tichý
    (2019, Approximating the extreme Ritz values and upper bounds for the A-norm of the error in
    CG), eᵀMe ≤ (rᵀS⁻¹r)²/(μ pᵀSp), which bears a μ that is only the least Ritz value.
    """

    def __init__(self, mu: float | None, rz: float) -> None:
        """`rz` is rᵀS⁻¹r of the first residual."""
        self.is_bound = mu is not None
        self._known, self.mu = mu, math.inf if mu is None else mu
        self._gamma = 1 / self.mu if self.is_bound else 0.0
        self._rz = self._p_norm = rz
        self._diagonal = 0.0  # what the last iteration adds to the next diagonal element
        self._coefficients: list[tuple[float, float, float]] = []

    def note(self, alpha: float, beta: float, rz: float) -> None:
        """Follow one iteration."""
        self._rz, self._p_norm = rz, rz + beta * beta * self._p_norm
        if self._known is not None:
            self._gamma = _radau_step(self._gamma, alpha, beta, self._known)
            return
        self._coefficients.append((alpha, beta, rz))
        self.mu = min(self.mu, 1 / alpha + self._diagonal)  # of the Lanczos matrix: ≥ Ritz value
        self._diagonal = beta / alpha

    def within(self, limit: float) -> bool:
        """Whether √(eᵀSe) is at most `limit`."""
        if self.error > limit:
            return False
        if self._known is None:  # a smaller μ makes a larger error: worth its price only now
            self.mu = min(self.mu, ritz_values(self._coefficients)[0])
        return self.error <= limit

    @property
    def error(self) -> float:
        """The bound on √(eᵀSe), or the estimate."""
        if not self.mu > 0:
            return math.inf
        if self._known is None:
            return self._rz / (self.mu * math.sqrt(self._p_norm)) if self._p_norm else 0.0
        gamma = 1 / self.mu if math.isnan(self._gamma) else self._gamma
        return math.sqrt(gamma * self._rz / self.mu)
