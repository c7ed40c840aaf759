"""Which active constraints press on φ, where their multipliers are not unique.

At a minimum, −∇f is a sum of the active constraints' gradients (rows, and ∓eᵢ for bounds), with a
multiplier ν ≥ 0 for each inequality and any for each equation (Karush, Kuhn and Tucker). Where the
gradients depend on each other there are many such ν, a polyhedron M. To first order φ may move in
the critical cone: by the d with ∇c·d = 0 for constraints that have a positive multiplier in some
ν ∈ M, the *pressing* ones, and ∇c·d ≤ 0 for the other active ones. M being convex, one ν is
positive for all pressing constraints at once; and for each of the others there is a d in the cone
with ∇c·d < 0 (strict complementarity: Goldman and Tucker, 1956, Theory of linear programming).
Hence

- where all active constraints press, the cone is the subspace on which their gradients vanish, and
  φ is differentiable as under as many independent equations (Fiacco, 1976);
- where one does not, the cone ends there, and φ has a kink: the constraint is active by chance.

An active constraint whose gradient is a combination of pressing ones presses itself: add a little
of the combination's relation to the ν that is positive for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

# Gradients that are this close to a combination of others count as one, and a multiplier as zero
# where it is this part of the forces around it: powers of the dtype's eps.
DEPENDENT, NO_FORCE = 0.5, 0.4
# Nonnegative least squares end where no constraint would explain more than this part of the slope.
ROUNDING = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Touched:
    """Constraints that φ touches: rows, and bounds of single elements.

    Attributes:
        rows: the gradients of the rows, one each.
        equations: which rows may have a multiplier of any sign.
        lower, upper: which elements are at a bound; those at both are fixed.
        eps: rounding error of the dtype.
    """

    rows: Tensor
    equations: Tensor
    lower: Tensor
    upper: Tensor
    eps: float

    @property
    def sign(self) -> Tensor:
        """The direction of each element's bound: 1 upwards, −1 downwards, 0 for none or both."""
        return self.upper.to(self.rows.dtype) - self.lower.to(self.rows.dtype)

    @property
    def fixed(self) -> Tensor:
        """The elements that cannot move either way."""
        return self.lower & self.upper

    def units(self) -> tuple[Tensor, Tensor]:
        """The rows on elements that are not fixed, scaled to norm 1 or 0, and their norms."""
        rows, whole = self.rows * ~self.fixed, self.rows.norm(dim=1)
        norms = rows.norm(dim=1)
        none = norms <= self.eps**DEPENDENT * whole
        norms = norms.masked_fill(none, 1.0)
        return rows.masked_fill(none[:, None], 0.0) / norms[:, None], norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pressing:
    """Those of the touched constraints that have a positive multiplier in some right ν.

    Attributes:
        nu: the multipliers of all rows in one ν.
        rows: which rows press.
        held: which elements are held at a bound.
        idle: which of the others, rows and then elements, have a multiplier of 0, rather than one
            of the wrong sign.
        explained: whether the multipliers account for all of ∇f.
    """

    nu: Tensor
    rows: Tensor
    held: Tensor
    idle: Tensor
    explained: bool


def pressing(slope: Tensor, noise: Tensor, touched: Touched) -> Pressing:
    """The constraints that press, given ∇f and, element by element, what it is uncertain by."""
    (unit, norms), sign, free = touched.units(), touched.sign, ~touched.fixed
    # what is uncertain of forces goes along with equations, as from x − a to x
    carried = unit[touched.equations].abs()
    noise = noise + carried.mT @ (carried @ noise)
    nu, push = nonnegative(slope * free, unit, touched.equations, sign, touched.eps)
    rest = slope * free + nu @ unit + sign * push
    forces = slope.abs() + nu.abs() @ unit.abs()
    explained = rest.abs() <= noise + touched.eps**ROUNDING * forces
    noise = noise + touched.eps**NO_FORCE * forces
    # a force is one if it can be told from noise at some element that it acts on
    rows = touched.equations | (nu[:, None] * unit.abs() > noise).any(1)
    held = touched.fixed | (push > noise)
    rows, held = _with_implied(rows, held, unit, sign, touched.eps)
    return Pressing(
        nu=nu / norms,
        rows=rows,
        held=held,
        idle=torch.cat(
            [
                ~rows & ((unit @ rest).abs() <= unit.abs() @ noise),
                (sign != 0) & ~held & (rest.abs() <= noise),
            ]
        ),
        explained=bool(explained.all()),
    )


def nonnegative(
    target: Tensor, rows: Tensor, signed: Tensor, sign: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x and b that minimise ‖target + rowsᵀx + sign·b‖, both ≥ 0, but for x where `signed`.

    By an active set (Lawson and Hanson, 1974, Solving least squares problems, chapter 23) that
    starts from all variables less those that come out negative. b stands for as many variables as
    there are bounds, each for one element, which are eliminated: where b is free, the rest is 0.
    """
    k, bounded = len(rows), sign != 0
    always = torch.cat([signed, torch.zeros_like(bounded)])

    def fitted(passive: Tensor) -> Tensor:
        chosen, held = passive[:k], passive[k:]
        x = target.new_zeros(k)
        if bool(chosen.any()):
            x[chosen] = least_squares((rows[chosen] * ~held).mT, -target * ~held, eps)
        return torch.cat([x, -sign * (target + x @ rows) * held])

    def rest(z: Tensor) -> Tensor:
        return target + z[:k] @ rows + sign * z[k:]

    passive = torch.cat([torch.ones_like(signed), bounded])
    z = fitted(passive)
    while bool((below := passive & ~always & (z <= 0)).any()):
        passive = passive & ~below
        z = fitted(passive)
    enough = eps**ROUNDING * float(target.abs().max()) if len(target) else 0.0
    while True:
        left = rest(z)
        gain = torch.cat([-(rows @ left), -sign * left]).masked_fill(passive, 0.0)
        if not len(gain) or float(gain.max()) <= enough:
            return z[:k], z[k:]
        entering = gain.argmax()
        passive[entering] = True
        z = _within(z, passive, always, fitted)
        if not bool(passive[entering]):  # its gain was rounding error
            return z[:k], z[k:]


def least_squares(matrix: Tensor, rhs: Tensor, eps: float) -> Tensor:
    """The least of the x that minimise ‖matrix x − rhs‖, where columns may depend on each other."""
    solution: Tensor = torch.linalg.lstsq(  # which finds the rank on the CPU only
        # not "gelsy", which older torches start from memory that they did not set (2.4 measured)
        matrix.cpu(),
        rhs.cpu()[:, None],
        rcond=eps**DEPENDENT,
        driver="gelsd",
    ).solution[:, 0]
    return solution.to(rhs.device)


def _within(
    z: Tensor, passive: Tensor, always: Tensor, fitted: Callable[[Tensor], Tensor]
) -> Tensor:
    """From z towards the fit as far as it is not negative; what becomes 0 leaves `passive`."""
    while True:
        fit = fitted(passive)
        below = passive & ~always & (fit <= 0)
        if not bool(below.any()):
            return fit
        steps = torch.where(z > 0, z / (z - fit), 0.0).masked_fill(~below, torch.inf)
        step = steps.min()
        passive &= steps > step
        z = torch.where(passive, z + step * (fit - z), 0.0)


def _with_implied(
    rows: Tensor, held: Tensor, unit: Tensor, sign: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Which rows and elements press: those with a force, and those that they imply."""
    close, k = eps**DEPENDENT, len(rows)
    while k and bool((others := torch.cat([~rows, (sign != 0) & ~held])).any()):
        basis = span(unit[rows] * ~held, close)
        outward = torch.cat([unit[others[:k]], _one_each(sign, others[k:])])
        outward = outward * ~held - (outward * ~held) @ basis.mT @ basis
        implied = outward.norm(dim=1) <= close
        if not bool(implied.any()):
            implied = _balanced(outward, eps)
        if not bool(implied.any()):
            break
        others[others.clone()] = implied
        rows, held = rows | others[:k], held | others[k:]
    return rows, held


def _one_each(values: Tensor, chosen: Tensor) -> Tensor:
    """The rows of the diagonal matrix of values that are chosen."""
    places = chosen.nonzero()
    rows = values.new_zeros(len(places), len(values))
    return rows.scatter_(1, places, values[places])


def _balanced(outward: Tensor, eps: float) -> Tensor:
    """Which of the vectors have a positive weight in a sum that is 0 (Gordan, 1873), if any."""
    count, n = outward.shape
    unit = outward / outward.norm(dim=1, keepdim=True)
    target = torch.cat([unit.new_zeros(n), -unit.new_ones(1)])
    columns = torch.cat([unit, unit.new_ones(count, 1)], 1)
    none = torch.zeros(count, dtype=torch.bool, device=unit.device)
    weights, _ = nonnegative(target, columns, none, torch.zeros_like(target), eps)
    rest, zero = target + weights @ columns, eps**DEPENDENT
    balanced: Tensor = (weights > zero) & (rest.norm() <= zero)
    return balanced


def span(rows: Tensor, close: float) -> Tensor:
    """An orthonormal basis, one vector a row, of the space that rows of norm at most 1 span."""
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vectors[sizes > close]
    return basis


def independent(rows: Tensor, first: Tensor, close: float) -> Tensor:
    """Which of the rows, of norm at most 1, are kept so that none depends on the others.

    By pivoting: always the row that is farthest from the space of those that were kept, and
    those marked as `first` before the rest.
    """
    kept, left = torch.zeros_like(first), rows.clone()
    for group in (first, ~first):
        while bool(group.any()):
            sizes = left.norm(dim=1).masked_fill(~group | kept, 0.0)
            if float(sizes.max()) <= close:
                break
            pivot = sizes.argmax()
            direction = left[pivot] / sizes[pivot]
            kept[pivot] = True
            for _ in range(2):  # once more for what rounding leaves
                left = left - (left @ direction)[:, None] * direction
    return kept
