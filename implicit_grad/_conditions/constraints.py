"""Minima under constraints: the active set, its multipliers, and the linear system they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._conditions.bounds import spread
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Flat, Tensors

# A constraint counts as active when it is this close to its limit, relative to the size of what it
# limits, and its multiplier as zero when it is this small, relative to the objective's gradient.
_CLOSE = 0.4  # as a power of the dtype's eps: 5e-7 in float64, 2e-3 in float32


# Closer than this without a multiplier, it is active by chance: 1e-8 in float64, 3e-4 in float32.
_TOUCHING = 0.5


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
        pair = isinstance(self.bounds, tuple) and len(self.bounds) == 2
        if self.bounds is not None and not pair and not callable(self.bounds):
            raise InvalidArgumentError(
                "argmin: bounds must be a pair (lower, upper), either of which may be None, or a "
                f"function of the solver's arguments that returns one; got {describe(self.bounds)}"
            )
        for name in ("equality", "inequality"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise InvalidArgumentError(
                    f"argmin: {name} must be a function of (phi, ...), got {describe(function)}"
                )

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.bounds, self.equality, self.inequality))

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
    ) -> tuple[Tensors, Callable[[], Linearization]]:
        """All that was evaluated at φ, and F from it."""
        pair = self._pair(args, kwargs) if self.bounds is not None else (None, None)
        lower, upper = (spread(bound, phi) for bound in pair)
        equality, inequality = (
            [] if function is None else _elements(name, function(phi, *args, **kwargs))
            for name, function in (("equality", self.equality), ("inequality", self.inequality))
        )
        outputs = [t for t in (*lower, *upper, *equality, *inequality) if t is not None]
        return (objective.value, *outputs), lambda: _linearize(
            objective, _Bounds(lower, upper), equality, inequality
        )

    def _pair(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        lower, upper = self.bounds(*args, **kwargs) if callable(self.bounds) else self.bounds
        return lower, upper


class _Bounds(NamedTuple):
    """For each tensor of φ its lower and its upper bound."""

    lower: list[Tensor | None]
    upper: list[Tensor | None]

    def at(self, phi: Tensors, close: float) -> tuple[Tensor, Tensor]:
        """Which elements of the flat φ lie at their lower, and which at their upper bound."""

        def near(bound: Tensor | None, p: Tensor, sign: int) -> Tensor:
            if bound is None:
                return torch.zeros_like(p, dtype=torch.bool)
            return sign * (p - bound) <= close * p.abs().clamp_min(1.0)

        return tuple(  # type: ignore[return-value]
            torch.cat([near(b, p, s).flatten() for b, p in zip(bounds, phi, strict=True)])
            for bounds, s in ((self.lower, 1), (self.upper, -1))
        )

    def values(self, phi: Tensors, at_lower: Tensors) -> Tensors:
        """For elements at a bound, the bound."""
        return tuple(
            torch.where(down, p if lo is None else lo, p if up is None else up)
            for p, down, lo, up in zip(phi, at_lower, self.lower, self.upper, strict=True)
        )

    @property
    def differentiable(self) -> bool:
        """Whether a bound requires grad."""
        return any(b is not None and b.requires_grad for b in (*self.lower, *self.upper))


def _linearize(
    objective: Objective, bounds: _Bounds, equality: list[Tensor], inequality: list[Tensor]
) -> Linearization:
    """F around φ for the active set there."""
    phi = objective.phi
    flat = Flat(phi)
    close = flat.eps**_CLOSE
    with torch.no_grad():
        slope = flat.ravel(gradient(objective.value, phi))
        size = close * float(slope.abs().max()) if slope.numel() else 0.0
        near_lower, near_upper = bounds.at(phi, close)
        beyond_lower, beyond_upper = bounds.at(phi, -close)
        # what is violated has to be felt in F, whatever its multiplier
        values = torch.stack(inequality).tolist() if inequality else []
        near = [g for g, value in zip(inequality, values, strict=True) if abs(value) <= close]
        equality = [*equality, *(g for g, v in zip(inequality, values, strict=True) if v > close)]
        free = ~(near_lower | near_upper)
        jacobian = _jacobian([*equality, *near], phi, flat)
        mu, kept = _multipliers(slope, jacobian, len(equality), free, size)
        rows = [g for g, stays in zip([*equality, *near], kept.tolist(), strict=True) if stays]
        force = slope + mu @ jacobian[kept]
        if _rank(jacobian[kept] * free) < _rank(jacobian[kept]):
            # a corner: there are too few free elements to tell the multipliers of the rows from
            # those of the bounds, but enough constraints to hold all elements where they are
            at_lower, at_upper = near_lower, near_upper
        else:
            # at a bound the force pushes outwards; where there is none, the bound does not act
            at_lower = (near_lower & (force > size)) | beyond_lower
            at_upper = (near_upper & (force < -size)) | beyond_upper
        touching = flat.eps**_TOUCHING
        resting = torch.logical_or(*bounds.at(phi, touching)) & ~(at_lower | at_upper)
        acting = kept[len(equality) :].tolist()
        idle = [g for g, acts in zip(near, acting, strict=True) if not acts]
        degenerate = any(bool(g.abs() <= touching) for g in idle)
        degenerate = degenerate or bool((resting & (force.abs() <= size)).any())
    return KKTSystem(objective, bounds, rows, mu, at_lower, at_upper, degenerate)


def _multipliers(
    slope: Tensor, jacobian: Tensor, equations: int, free: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """μ by least squares on the free elements, and which rows act: the first ones always do."""
    kept = torch.ones(len(jacobian), dtype=torch.bool, device=jacobian.device)
    always = torch.arange(len(jacobian), device=jacobian.device) < equations
    while True:
        acting = jacobian[kept] * free
        mu = torch.linalg.pinv(acting.T) @ -slope
        idle = (mu * acting.norm(dim=1) <= size) & ~always[kept]
        if not bool(idle.any()):
            return mu, kept
        kept[kept.clone()] = ~idle


def _jacobian(rows: list[Tensor], phi: Tensors, flat: Flat) -> Tensor:
    """The gradients of constraints, one a row."""
    if not rows:
        return flat.ravel(phi).detach().new_zeros(0, sum(p.numel() for p in phi))
    return torch.stack([flat.ravel(vjp([c], phi, [torch.ones_like(c)])) for c in rows])


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0


class KKTSystem(Linearization):
    """F of φ and the multipliers μ: [∂ℒ/∂φ; c], with elements of φ at their bounds held there.

    A = [[∂²ℒ, Jᵀ], [J, 0]] is symmetric, on the free elements; for the others it is the identity.
    """

    curvature = "lagrangian"

    def __init__(
        self,
        objective: Objective,
        bounds: _Bounds,
        rows: list[Tensor],
        mu: Tensor,
        at_lower: Tensor,
        at_upper: Tensor,
        degenerate: bool,
    ) -> None:
        phi = objective.phi
        self._bounds, self._size = bounds, len(phi)
        self._fixed = _split(at_lower | at_upper, phi)
        with torch.enable_grad():
            mu = mu.detach().to(phi[0].dtype).requires_grad_()
            unknowns: Tensors = (*phi, mu) if rows else phi
            value, constraint = objective.value, torch.stack(rows) if rows else mu
            if rows:
                value = value + (mu * constraint).sum()
            stationarity = gradient(value, phi)
            limits = bounds.values(phi, _split(at_lower, phi))
            held = tuple(
                torch.where(fixed, p - limit, s)
                for fixed, p, limit, s in zip(self._fixed, phi, limits, stationarity, strict=True)
            )
        tail = (constraint,) if rows else ()
        super().__init__(
            (*held, *tail),
            unknowns,
            (*stationarity, *tail),
            degenerate=degenerate,
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
        if not self._bounds.differentiable:
            return u
        moved = super().smooth_transposed((*self._free(u), *u[self._size :]))
        at_bounds = tuple(
            torch.where(fixed, w - m, x)
            for fixed, w, m, x in zip(self._fixed, v, moved, u, strict=False)
        )
        return (*at_bounds, *u[self._size :])

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu."""
        product = super().smooth_transposed((*self._free(u), *u[self._size :]))
        head = (
            torch.where(fixed, x, p) for fixed, x, p in zip(self._fixed, u, product, strict=False)
        )
        return (*head, *product[self._size :])

    def smooth_product(self, x: Tensors) -> Tensors:
        """The same: the matrix is symmetric."""
        return self.smooth_transposed(x)

    def _free(self, v: Tensors) -> Tensors:
        return tuple(x.masked_fill(fixed, 0.0) for fixed, x in zip(self._fixed, v, strict=False))


def _split(mask: Tensor, phi: Tensors) -> Tensors:
    parts = torch.split(mask, [p.numel() for p in phi])
    return tuple(part.view(p.shape) for part, p in zip(parts, phi, strict=True))


def _elements(name: str, values: Any) -> list[Tensor]:
    """All values of a constraint, one by one."""
    tensors = pytree.leaves(values)
    if not tensors or not all(torch.is_tensor(t) and t.is_floating_point() for t in tensors):
        raise InvalidArgumentError(
            f"argmin: {name} must return floating-point tensors, got {describe(values)}"
        )
    return [element for t in tensors for element in t.flatten().unbind()]
