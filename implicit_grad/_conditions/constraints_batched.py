"""Minima under constraints, many at once: where all that each φ touches presses on it, one system.

Which constraints are active differs from task to task. So all of them stay in the system, and the
equation of one that is not active is μ = 0. What a single problem decides with care (constraints
that depend on each other, are violated, or touched by chance) is not decided here: such a task is
told apart, and goes its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import BESIDE, CLOSE, NEARBY, TOUCHING, Bounds
from implicit_grad._conditions.batching import batched
from implicit_grad._conditions.bounds import check_order, check_pair, spread
from implicit_grad._conditions.constraints import (
    Constraints,
    Evaluated,
    Held,
    KKTSystem,
    check_bends,
    values_of,
)
from implicit_grad._conditions.dependence import is_pushed, scattered
from implicit_grad._conditions.multipliers import DEPENDENT, NO_FORCE, ROUNDING
from implicit_grad._curvature.objective import Objective
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._torch.transforms import CannotBatch

# Gradients are independent beyond doubt where their Gram matrix has no eigenvalue below this power
# of the dtype's eps.
_INDEPENDENT = 0.4


class ConstraintsOfTasks(Constraints):
    """Those of single problems, for a batch of them."""

    def for_minimizer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A minimiser is handed the constraints of one problem."""
        if self:
            raise CannotBatch
        return {}

    def check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise if bounds are wrong for some of the tasks, whatever φ will be."""
        if self.bounds is not None:
            with torch.no_grad():
                check_pair("argmin", batched(lambda *a, **k: self._pair(a, k))(*args, **kwargs))

    def at(
        self, objective: Objective, phi: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Evaluated:
        """The constraints at all φ, beside the objectives."""

        def of_one(phi: Any, *args: Any, **kwargs: Any) -> Any:
            rows = (
                torch.cat(values_of(name, function(phi, *args, **kwargs)))
                for name, function in (("equality", self.equality), ("inequality", self.inequality))
                if function is not None
            )
            return spread("argmin", self._pair(args, kwargs), phi), tuple(rows)

        (lower, upper), rows = batched(of_one)(phi, *args, **kwargs)
        check_order("argmin", phi, lower, upper)
        equations = rows[0].shape[1] if self.equality is not None else 0
        together = torch.cat(rows, 1) if rows else None
        touching = _Touching(objective, Bounds(lower, upper), together, equations)
        count = 0 if together is None else together.shape[1]
        outputs = tuple(t for t in (*lower, *upper, *rows) if t is not None)

        def lagrangian(outputs: Tensors) -> Tensor:
            return touching.lagrangian(outputs[0], outputs[len(outputs) - len(rows) :])

        outputs = (objective.value, *outputs)
        return Evaluated(outputs, touching.linearize, touching.apart, count, lagrangian)


class _Touching:
    """What all φ touch, found when it is asked for, and once."""

    def __init__(
        self, objective: Objective, bounds: Bounds, rows: Tensor | None, equations: int
    ) -> None:
        self._objective, self._bounds = objective, bounds
        self._rows, self._equations = rows, equations

    @functools.cached_property
    def _slope(self) -> Tensors:
        with torch.enable_grad():
            return gradient(self._objective.value, self._objective.phi)

    @functools.cached_property
    def _active(self) -> ActiveSets:
        with torch.no_grad(), self._objective.guard():
            return _active_sets(
                self._slope, self._objective, self._bounds, self._rows, self._equations
            )

    def apart(self) -> Tensor:
        """Which tasks are not for a batch."""
        sets = self._active
        return ~sets.clear | sets.loose.any(1) if self._is_pushed else ~sets.clear

    @functools.cached_property
    def _is_pushed(self) -> bool:
        """Whether arguments move the force on what is loose in some task."""
        sets, phi = self._active, self._objective.phi
        if not bool(sets.loose.any()):
            return False
        force = self._slope
        if self._rows is not None:
            with torch.enable_grad():
                pull = vjp([self._rows], phi, [(sets.nu * sets.active).to(self._rows.dtype)])
                force = tuple(s + p for s, p in zip(force, pull, strict=True))
        return is_pushed(_split(sets.loose, phi), force, phi)

    def lagrangian(self, value: Tensor, rows: Tensors) -> Tensor:
        """ℒ of all tasks, summed, with the multipliers of these φ."""
        if not rows:
            return value
        nu = self._active.nu * self._active.active
        return value + (nu.to(rows[0].dtype) * torch.cat(rows, 1)).sum()

    def linearize(self) -> Linearization:
        """F around all φ: with an equation for each row, active or not."""
        objective, sets, rows = self._objective, self._active, self._rows
        check_bends(objective, [] if rows is None else [rows])
        phi, unit = objective.phi, sets.stiffness
        at_lower, fixed = (_split(m, phi) for m in (sets.at_lower, sets.at_lower | sets.at_upper))
        units = [unit.to(p.dtype).view(-1, *[1] * (p.dim() - 1)) for p in phi]
        held = Held(self._bounds, at_lower, fixed)
        with torch.enable_grad():
            if rows is None:
                return _KKTSystems(objective, self._slope, (), (), held, units)
            active, idle = sets.active, (unit[:, None] * ~sets.active).to(rows.dtype)
            scale = unit[:, None] / sets.lengths
            mu = torch.where(active, sets.nu / scale, 0.0).to(rows.dtype).requires_grad_()
            scale = (scale * active).to(rows.dtype)
            pull = vjp([rows], phi, [mu * scale])
            stationarity = tuple(s + p for s, p in zip(self._slope, pull, strict=True))
            tail = rows * scale + idle * mu
            systems = _KKTSystems(objective, stationarity, (tail,), (mu,), held, units)
            systems.border = scale[:, :, None] * sets.gradients, idle
            return systems


class _KKTSystems(KKTSystem):
    """The systems of all tasks; `border` are their rows' gradients, and what stands for idle ones.

    So a matrix of them takes products with ∂²ℒ only.
    """

    border: tuple[Tensor, Tensor] | None = None

    def matrix(self) -> Tensor:
        """A of each task."""
        phi, smooth = self.phi[: self._size], self.smooth[: self._size]
        flat = Flat(phi, self.n_tasks)
        free = ~flat.ravel(self.fixed).bool()
        columns = []
        for j in range(free.shape[1]):
            unit = torch.zeros_like(free, dtype=flat.dtype)
            unit[:, j] = 1.0
            columns.append(flat.ravel(vjp(smooth, phi, flat.unravel(unit * free))))
        inner = torch.stack(columns, 2) * free[:, :, None]
        units = flat.ravel([torch.ones_like(p) * u for u, p in zip(self._unit, phi, strict=True)])
        inner = inner + torch.diag_embed(units * ~free)
        if self.border is None:
            return inner
        rows, idle = self.border
        rows = rows * free[:, None, :]
        return torch.cat([
            torch.cat([inner, rows.mT], 2),
            torch.cat([rows, torch.diag_embed(idle)], 2),
        ], 1)  # fmt: skip


class ActiveSets(NamedTuple):
    """The constraints that press on each φ, a row for each task; see `ActiveSet`.

    Attributes:
        clear: in which tasks they are these beyond doubt.
        active: which rows of equality and inequality.
        nu, lengths: of all these rows; 0 and 1 where they are not active.
        at_lower, at_upper: which elements of φ are held at their bounds.
        stiffness: of the objectives.
        gradients: of all rows.
        loose: which elements neither the objective's curvature nor an active row holds.
    """

    clear: Tensor
    active: Tensor
    nu: Tensor
    lengths: Tensor
    at_lower: Tensor
    at_upper: Tensor
    stiffness: Tensor
    gradients: Tensor
    loose: Tensor

    def where(self, good: Tensor, other: ActiveSets) -> ActiveSets:
        """These for some tasks, the others for the rest."""
        mixed = (
            torch.where(good.view(-1, *[1] * (a.dim() - 1)), a, b)
            for a, b in zip(self, other, strict=True)
        )
        return ActiveSets(*mixed)


def _active_sets(
    slope: Tensors, objective: Objective, bounds: Bounds, rows: Tensor | None, equations: int
) -> ActiveSets:
    """All that is touched, if all of it presses: as `active_set` decides it for one task."""
    phi = objective.phi
    flat = Flat(phi, objective.n_tasks)
    x, force = flat.ravel(phi), flat.ravel(slope)
    way = scattered(x[0]).expand_as(x)
    stiffness = flat.ravel(vjp(slope, phi, flat.unravel(way))).abs()
    if rows is None:
        rows = x.new_zeros(len(x), 0)
    measured = _Measured(
        x=x,
        force=force,
        stiffness=stiffness,
        lower=_side(flat, phi, bounds.lower, -torch.inf),
        upper=_side(flat, phi, bounds.upper, torch.inf),
        values=rows.detach().to(x.dtype),
        gradients=_jacobian(rows, phi, flat),
        equations=equations,
        eps=flat.eps,
    )
    first = measured.within(TOUCHING)
    if bool(first.clear.all()):
        return first
    return first.where(first.clear, measured.within(CLOSE))


class _Measured(NamedTuple):
    """The numbers by which it is decided, with a row for each task."""

    x: Tensor
    force: Tensor
    stiffness: Tensor
    lower: Tensor
    upper: Tensor
    values: Tensor
    gradients: Tensor
    equations: int
    eps: float

    def within(self, power: float) -> ActiveSets:
        """The active sets if φ touches what is nearer than this power of eps."""
        eps, force = self.eps, self.force
        size = self.x.abs().amax(1, keepdim=True).clamp(min=eps**CLOSE)
        reach, close = eps**power * size, eps**CLOSE * size
        lengths = self.gradients.norm(dim=2)
        near = self.values >= -reach * lengths
        near[:, : self.equations] = True
        below, above = self.x - self.lower, self.upper - self.x
        at_lower, at_upper = below <= reach, above <= reach
        sign = at_upper.to(force.dtype) - at_lower.to(force.dtype)
        held = at_lower | at_upper
        beyond = (below <= -close) | (above <= -close)
        odd = (beyond | (at_lower & at_upper)).any(1)
        odd |= (near & ((lengths == 0) | (self.values.abs() > reach * lengths))).any(1)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        unit = self.gradients / lengths[:, :, None] * near[:, :, None]
        nu, independent = _multipliers(unit * ~held[:, None, :], force, near, eps)
        pulled = force + (nu[:, None, :] @ unit)[:, 0]
        push = -sign * pulled * held
        forces = force.abs() + (nu.abs()[:, None, :] @ unit.abs())[:, 0]
        noise = reach * self.stiffness
        explained = ((pulled + sign * push).abs() <= noise + eps**ROUNDING * forces).all(1)
        noise = noise + eps**NO_FORCE * forces
        presses = (nu[:, :, None] * unit.abs() > noise[:, None, :]).any(2)
        presses[:, : self.equations] = True
        nearby = NEARBY * size
        rows = ~near & (self.values >= -nearby * lengths)
        odd |= self._pushed(nearby, rows, pulled * ~held, eps**ROUNDING * forces)
        clear = ~odd & independent & explained
        clear &= (presses | ~near).all(1) & ((push > noise) | ~held).all(1)
        hardly = BESIDE * torch.cat([nu, push], 1).norm(dim=1, keepdim=True)
        faint = near & (self.values < 0) & (nu <= hardly)
        clear &= ~faint[:, self.equations :].any(1)
        apart = torch.where(at_lower, below, above) > 0
        clear &= ~(held & apart & (push <= hardly)).any(1)
        greatest = self.stiffness.amax(1)
        instead = force.abs().amax(1) / size[:, 0]
        instead = torch.where(instead > 0, instead, 1.0)
        return ActiveSets(
            clear=clear,
            active=near,
            nu=nu / lengths,
            lengths=lengths,
            at_lower=at_lower,
            at_upper=at_upper,
            stiffness=torch.where(greatest > 0, greatest, instead),
            gradients=self.gradients,
            loose=(self.stiffness == 0) & ~held & (unit.abs() <= eps**DEPENDENT).all(1),
        )

    def _pushed(self, nearby: Tensor, rows: Tensor, free: Tensor, rounding: Tensor) -> Tensor:
        """In which tasks the force on what is free leads to a bound nearby, or to these rows."""
        below = (self.x - self.lower <= nearby) & (free > rounding)
        above = (self.upper - self.x <= nearby) & (-free > rounding)
        push = -self.gradients @ free[:, :, None]
        pushed = rows & (push > self.gradients.abs() @ rounding[:, :, None])[:, :, 0]
        return (below | above).any(1) | pushed.any(1)


def _multipliers(rows: Tensor, force: Tensor, near: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Those of least squares, rowsᵀν ≈ −force, and whether the rows are independent.

    By normal equations; two corrections by the residual make up for the squared condition.
    """
    if not rows.shape[1]:
        return near.to(rows.dtype), torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    gram = rows @ rows.mT + torch.diag_embed((~near).to(rows.dtype))
    factor, failed = torch.linalg.cholesky_ex(gram)
    one = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    factor = torch.where((failed == 0)[:, None, None], factor, one)
    independent = torch.linalg.matrix_norm(torch.cholesky_inverse(factor)) < eps**-_INDEPENDENT
    nu = torch.zeros_like(rows[:, :, :1])
    for _ in range(3):
        rest = -force[:, :, None] - rows.mT @ nu
        nu = nu + torch.cholesky_solve(rows @ rest, factor)
    return nu[:, :, 0], independent & (failed == 0)


def _jacobian(rows: Tensor, phi: Tensors, flat: Flat) -> Tensor:
    """The gradients of all rows by each task's φ, one after another."""
    if not rows.shape[1]:
        return flat.ravel(phi).new_zeros(len(rows), 0, flat.ravel(phi).shape[1])
    found = []
    for j in range(rows.shape[1]):
        one = torch.zeros_like(rows)
        one[:, j] = 1.0
        found.append(flat.ravel(vjp([rows], phi, [one])))
    return torch.stack(found, 1)


def _side(flat: Flat, phi: Tensors, limits: list[Tensor | None], nowhere: float) -> Tensor:
    """Bounds as one vector for each task; infinite where there is none."""
    full = [
        torch.full_like(p, nowhere) if b is None else b for b, p in zip(limits, phi, strict=True)
    ]
    return flat.ravel([b.detach() for b in full])


def _split(mask: Tensor, phi: Tensors) -> Tensors:
    """A mask with a row for each task in the form of φ."""
    parts = torch.split(mask, [p[0].numel() for p in phi], dim=1)
    return tuple(part.view(p.shape) for part, p in zip(parts, phi, strict=True))
