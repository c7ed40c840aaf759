"""Minima under constraints: the active set, its multipliers, and the linear system they make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from implicit_grad._conditions.active_set import ActiveSet, Bounds, active_set, split
from implicit_grad._conditions.bounds import check_pair, spread
from implicit_grad._conditions.dependence import is_pushed
from implicit_grad._conditions.doubts import is_in_doubt
from implicit_grad._conditions.lagrangian import Multipliers, multipliers_at
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import GraphError, InvalidArgumentError, Status, describe
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.graph import once_differentiable
from implicit_grad._torch.missing import missing_told
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Tensors


class Evaluated(NamedTuple):
    """What came of constraints at φ.

    Attributes:
        outputs: all that was evaluated, the objective's value first.
        linearize: makes F from it.
        apart: in a batch, tells which tasks are not for F of a batch.
        n_multipliers: how many each task has there.
        lagrangian: makes ℒ from such outputs, with the multipliers of this φ.
    """

    outputs: Tensors
    linearize: Callable[[], Linearization]
    apart: Callable[[], Tensor] | None = None
    n_multipliers: int = 0
    lagrangian: Callable[[Tensors], Tensor] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Constraints:
    """lower ≤ φ ≤ upper, equality(φ) = 0 and inequality(φ) ≤ 0.

    At a minimum the constraints that hold with equality, the active set, act as equations, and the
    others not at all. With the Lagrangian ℒ = objective + μᵀc over active rows c of equality and
    inequality, φ and the multipliers μ solve (Karush, Kuhn and Tucker; Fiacco, 1976)

        ∂ℒ/∂φ = 0 for elements of φ off their bounds,    φ = bound for the others,    c(φ) = 0.
    """

    bounds: Any = None
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.bounds):
            check_pair("argmin", self.bounds)
        for name in _ROWS:
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise InvalidArgumentError(
                    f"argmin: {name} must be a function of (phi, ...), got {describe(function)}"
                )

    def __bool__(self) -> bool:
        return self.bounds is not None or self.rows

    @property
    def rows(self) -> bool:
        """Whether there are multipliers among the unknowns, so that A is indefinite."""
        return self.equality is not None or self.inequality is not None

    def for_minimizer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The constraints as a minimiser takes them: functions of φ alone."""

        def of_phi(function: Callable[..., Any]) -> Callable[[Any], Any]:
            return lambda phi: function(phi, *args, **kwargs)

        given: dict[str, Any] = {}
        if self.bounds is not None:
            given["bounds"] = self._pair(args, kwargs)
        if self.equality is not None:
            given["equality"] = of_phi(self.equality)
        if self.inequality is not None:
            given["inequality"] = of_phi(self.inequality)
        return given

    def at(
        self, objective: Objective, phi: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Evaluated:
        """The constraints at φ, beside the objective."""
        bounds, values = self._evaluated(phi, args, kwargs)
        equality, inequality = rows_of(values)
        limits = (*bounds.lower, *bounds.upper)
        outputs = [t for t in (*limits, *equality, *inequality) if t is not None]

        @functools.cache  # the check of products asks for it before a gradient does
        def held() -> tuple[Tensors, ActiveSet]:
            return forces(objective, bounds, equality, inequality)

        @functools.cache
        def multipliers() -> list[tuple[int, float]]:
            """That of each active row, with its place from the end of the outputs."""
            _, active = held()
            places = {id(row): place for place, row in enumerate(reversed(outputs), 1)}
            pairs = zip(active.rows, active.nu.tolist(), strict=True)
            return [(places[id(row)], nu) for row, nu in pairs]

        def lagrangian(outputs: Tensors) -> Tensor:
            return sum((nu * outputs[-place] for place, nu in multipliers()), outputs[0])

        def linearize() -> Linearization:
            return linearized(objective, bounds, *held())

        return Evaluated((objective.value, *outputs), linearize, lagrangian=lagrangian)

    def multipliers(
        self,
        value: Tensor,
        phi: Any,
        variables: Tensors,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Multipliers:
        """Those at φ, given the objective's value there; differentiable as far as these are."""
        bounds, values = self._evaluated(phi, args, kwargs)
        rows = rows_of(values)
        lower, upper, nu = multipliers_at(value, variables, bounds, *rows)
        parts = dict(zip(_ROWS, torch.split(nu, [len(r) for r in rows]), strict=True))
        of_rows = {name: _like(given, parts[name]) for name, given in values.items()}
        if self.bounds is None:
            return Multipliers(**of_rows)
        _, tree = pytree.flatten(phi)
        return Multipliers(tree.rebuild(lower), tree.rebuild(upper), **of_rows)

    def _evaluated(
        self, phi: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Bounds, dict[str, Any]]:
        """Bounds on each tensor of φ, and what the functions that were given return."""
        bounds = Bounds(*spread("argmin", self._pair(args, kwargs), phi))
        functions = ((name, getattr(self, name)) for name in _ROWS)
        return bounds, {name: f(phi, *args, **kwargs) for name, f in functions if f is not None}

    def check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise if bounds are wrong for these arguments, whatever φ will be."""
        if self.bounds is not None:
            with torch.no_grad():
                check_pair("argmin", self._pair(args, kwargs))

    def _pair(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self.bounds(*args, **kwargs) if callable(self.bounds) else self.bounds


def linearized(
    objective: Objective,
    bounds: Bounds,
    slope: Tensors,
    active: ActiveSet,
    more: Callable[[ActiveSet, Tensors], Status | None] = lambda active, phi: None,
) -> Linearization:
    """F around φ for the active set there; `more` may know a reason for a kink, too."""
    phi = objective.phi
    with torch.no_grad(), objective.guard():
        kink = active.kink(phi, bounds) or more(active, phi)
    kept, scale = active.kept, active.stiffness / active.lengths
    with torch.enable_grad():
        mu = (active.nu / scale)[kept].to(phi[0].dtype).requires_grad_()
        nu = torch.cat([mu * scale[kept], active.nu[~kept]]).to(phi[0].dtype)
        rows, others = active.divided()
        pull = vjp([*rows, *others], phi, nu.unbind())
        stationarity = tuple(s + p for s, p in zip(slope, pull, strict=True))
        loose = split(active.loose, phi)
        pushed = bool(active.loose.any()) and is_pushed(loose, stationarity, phi)
        if kink is None and (pushed or is_in_doubt(active, stationarity, phi)):
            kink = Status.DEGENERATE
        return KKTSystem(
            objective,
            stationarity,
            (torch.stack(rows) * scale[kept].to(phi[0].dtype),) if rows else (),
            (mu,) if rows else (),
            Held(bounds, split(active.at_lower, phi), split(active.held, phi)),
            (active.stiffness,) * len(phi),
            kink,
            _TIED if active.depends(bounds) else None,
        )


def check_bends(objective: Objective, rows: Sequence[Tensor]) -> None:
    """Raise if something between φ and the objective or the rows has no second derivative."""
    if objective.is_once_differentiable or (rows and once_differentiable(rows, objective.phi)):
        raise GraphError(_ONCE, anchor="no-second-derivative")


def forces(
    objective: Objective, bounds: Bounds, equality: list[Tensor], inequality: list[Tensor]
) -> tuple[Tensors, ActiveSet]:
    """The objective's gradient, with its graph, and the constraints that hold φ against it."""
    phi = objective.phi
    check_bends(objective, [*equality, *inequality])
    with torch.enable_grad():
        slope = gradient(objective.value, phi)
    with torch.no_grad(), objective.guard(), missing_told(_MISSING):
        return slope, active_set(slope, phi, bounds, equality, inequality)


class Held(NamedTuple):
    """Which elements of φ are held at their bounds, tensor by tensor."""

    bounds: Bounds
    at_lower: Tensors
    fixed: Tensors


class KKTSystem(Linearization):
    """F of φ and the multipliers μ: [∂ℒ/∂φ; c], with elements of φ at their bounds held there.

    A = [[∂²ℒ, Jᵀ], [J, 0]] is symmetric, on the free elements; for the others it is the identity.
    Of rows that depend on each other an independent set is in c, so that A is as regular as φ is
    determined; the others are in ℒ, with multipliers that are held fixed. All rows of A are of one
    size: those of c, and the identity, are multiplied by what makes them as large as ∂²ℒ.
    """

    curvature = "lagrangian"

    def __init__(
        self,
        objective: Objective,
        stationarity: Tensors,
        rows: Tensors,
        mu: Tensors,
        held: Held,
        unit: Sequence[float | Tensor],
        kink: Status | None = None,
        tied: str | None = None,
    ) -> None:
        """`unit`, for each tensor of φ, is the size of ∂²ℒ; `tied` why it has no derivative."""
        phi = objective.phi
        self.bounds_move, self.fixed, self._unit = held.bounds.differentiable, held.fixed, unit
        self._size = len(phi)
        self.limits = held.bounds.values(phi, held.at_lower)
        self.only_once = tied if kink is None else kink.sentence
        places = zip(held.fixed, unit, phi, self.limits, stationarity, strict=True)
        super().__init__(
            (*(torch.where(fixed, k * (p - limit), s) for fixed, k, p, limit, s in places), *rows),
            (*phi, *mu),
            (*stationarity, *rows),
            n_tasks=objective.n_tasks,
            degenerate=kink,
            guard=objective.guard,
        )

    def augment(self, v: Tensors) -> Tensors:
        """(v, 0), and 0 for the elements at bounds, which no argument but the bound can move.

        A v that has a part for the multipliers already keeps it.
        """
        multipliers = v[self._size :] or tuple(map(torch.zeros_like, self.phi[self._size :]))
        return (*self._free(v), *multipliers)

    def recover(self, u: Tensors, v: Tensors) -> Tensors:
        """u with v − Aᵀu for the elements at bounds: what moving the bounds does."""
        if not self.bounds_move:
            return u
        moved = super().smooth_transposed((*self._free(u), *u[self._size :]))
        at_bounds = tuple(
            torch.where(fixed, (w - m) / unit, x)
            for fixed, unit, w, m, x in zip(self.fixed, self._unit, v, moved, u, strict=False)
        )
        return (*at_bounds, *u[self._size :])

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu."""
        with missing_told(_MISSING):
            product = super().smooth_transposed((*self._free(u), *u[self._size :]))
        head = (
            torch.where(fixed, unit * x, p)
            for fixed, unit, x, p in zip(self.fixed, self._unit, u, product, strict=False)
        )
        return (*head, *product[self._size :])

    def smooth_product(self, x: Tensors) -> Tensors:
        """A x, which is Aᵀx, as the matrix is symmetric."""
        return self.smooth_transposed(x)

    def _free(self, v: Tensors) -> Tensors:
        return tuple(x.masked_fill(fixed, 0.0) for fixed, x in zip(self.fixed, v, strict=False))


_ONCE = (
    "between phi and the objective or a constraint, a custom Function is marked as "
    "once_differentiable, or a function is compiled (torch.compile), or F.linear_cross_entropy "
    "works in chunks: it has no second derivative, and under constraints no differences are taken "
    "in its place. Write it in torch operations"
)
_MISSING = (
    "an operation of the objective or of a constraint has no second derivative in torch, and under "
    "constraints no differences are taken in its place: use another form of the operation"
)
_TIED = (
    "active constraints depend on each other at phi, and only to first order is it known that they "
    "move together as an argument changes. Remove those that others imply"
)
_ROWS = ("equality", "inequality")


def rows_of(values: dict[str, Any]) -> list[list[Tensor]]:
    """The elements of equality and inequality; none of what was not given."""
    return [_elements(name, values[name]) if name in values else [] for name in _ROWS]


def values_of(name: str, values: Any) -> list[Tensor]:
    """The values of a constraint, one vector for each tensor."""
    tensors = pytree.leaves(values)
    if not tensors or not all(torch.is_tensor(t) and t.is_floating_point() for t in tensors):
        raise InvalidArgumentError(
            f"argmin: {name} must return floating-point tensors, got {describe(values)}"
        )
    return [t.flatten() for t in tensors]


def _elements(name: str, values: Any) -> list[Tensor]:
    """All values of a constraint, one by one."""
    return [element for t in values_of(name, values) for element in t.unbind()]


def _like(values: Any, elements: Tensor) -> Any:
    """Elements, one after another, in the form of a constraint's values."""
    leaves = pytree.leaves(values)
    parts = torch.split(elements, [t.numel() for t in leaves])
    shaped = [part.view(t.shape).to(t.dtype) for part, t in zip(parts, leaves, strict=True)]
    return optree.tree_unflatten(pytree.structure(values), shaped)
