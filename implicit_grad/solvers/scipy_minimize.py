"""scipy.optimize.minimize, all its methods, with derivatives by autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError
from implicit_grad._options import require, require_options, require_tolerance
from implicit_grad._warnings import tell
from implicit_grad.solvers._flat import Coordinates, FlatBounds, FlatFunction, Vector, flat_bounds
from implicit_grad.solvers._neighbours import needed_by
from implicit_grad.solvers._objective import ObjectiveFunction

_METHODS = {
    name.lower(): name
    for name in (
        "Nelder-Mead Powell CG BFGS Newton-CG L-BFGS-B TNC COBYLA COBYQA SLSQP trust-constr "
        "dogleg trust-ncg trust-exact trust-krylov"
    ).split()
}
_WITHOUT_GRADIENT = {"Nelder-Mead", "Powell", "COBYLA", "COBYQA"}
_WITH_HESSIAN_PRODUCTS = {"Newton-CG", "trust-ncg", "trust-krylov", "trust-constr"}
_WITH_HESSIAN = {"dogleg", "trust-exact"}
_WITH_ROWS = {"SLSQP", "trust-constr", "COBYLA", "COBYQA"}
_WITH_BOUNDS = {"Nelder-Mead", "Powell", "L-BFGS-B", "TNC", *_WITH_ROWS}
# These also stop when the objective or φ hardly changes, and take `tol` for that as well, which
# leaves a gradient of about its square root.
_BY_GRADIENT_ONLY = {"L-BFGS-B": {"ftol": 0.0}, "TNC": {"ftol": 0.0, "xtol": 0.0}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyMinimize:
    """`scipy.optimize.minimize` on φ as one flat float64 vector.

    Gradients are autograd's, as are Hessians and products with them where the method uses them.
    Where SciPy calls a run unsuccessful, an `ImplicitGradWarning` passes its message on, unless φ
    meets the conditions of a minimum: line searches often end at rounding level.

    Args:
        method: any of SciPy's, by name.
        tol: as SciPy's, whose meaning depends on the method; for L-BFGS-B, TNC, CG, BFGS and the
            trust-region methods the size of the gradient (in the objective's units over φ's) and
            nothing else. SciPy's own default, None, is coarse: 1e-5 for most.
        options: the method's, such as {"maxiter": 1000}; they have precedence over `tol`.
        bounds: (lower, upper), each None, a number, a tensor, or a container in the form of φ;
            `minimize` takes them as well.

    >>> import torch
    >>> bowl = lambda phi: ((phi - torch.arange(3)) ** 2).sum()
    >>> SciPyMinimize(tol=1e-6, bounds=(None, 1.0)).minimize(bowl, torch.zeros(3))
    tensor([0., 1., 1.])
    """

    method: str = "L-BFGS-B"
    tol: float | None = None
    options: dict[str, Any] | None = None
    bounds: Any = None

    def __post_init__(self) -> None:
        known = isinstance(self.method, str) and self.method.lower() in _METHODS
        require(self, "method", known, f"one of {', '.join(_METHODS.values())}")
        require_tolerance(self, "tol")
        require_options(self, "options")

    def minimize(
        self,
        objective: Callable[[Any], Tensor],
        init: Any,
        *,
        bounds: Any = None,
        equality: Callable[[Any], Any] | None = None,
        inequality: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The minimum near init, with equality(phi) = 0, inequality(phi) ≤ 0 and within bounds."""
        with needed_by(self):
            from scipy.optimize import Bounds, minimize
        method = _METHODS[self.method.lower()]
        with torch.inference_mode(False), torch.no_grad():
            seen = ObjectiveFunction(self, objective, init)
            at = Coordinates(seen)
            limits = self._limits(bounds, seen, at)
            rows = {
                name: at.function(name, function)
                for name, function in (("equality", equality), ("inequality", inequality))
                if function is not None
            }
            _check_method(method, bool(limits), bool(rows))
            start = limits.clip(at.start)
            slope = self._slope(seen, at, start)
            if not len(start):
                return at.result(start)
            result = minimize(
                **_with_derivatives(method, seen, at),
                x0=start,
                method=method,
                tol=self.tol,
                options=self._options(method),
                bounds=Bounds(limits.lower, limits.upper) if limits else None,
                constraints=_constraints(method, rows),
            )
            phi = at.result(result.x)
            if not np.isfinite(result.fun):
                raise InvalidSolutionError(
                    f"SciPyMinimize: {method} ended where the objective is {result.fun:g}: it is "
                    "not defined everywhere on the way. Start elsewhere"
                )
            if not result.success and not _solved(seen, at, limits, rows, result.x, slope):
                said = (
                    f"SciPyMinimize: {method} stopped after {result.nfev} evaluations without "
                    f"success: {result.message}"
                )
                tell(said, anchor="solver-missed", of=type(self).__name__)
            return phi

    def _limits(self, bounds: Any, seen: ObjectiveFunction, at: Coordinates) -> FlatBounds:
        own, given = (flat_bounds(pair, seen, at) for pair in (self.bounds, bounds))
        if self.bounds is None or bounds is None:
            return given if self.bounds is None else own
        if not own.same(given):
            raise InvalidArgumentError(
                "SciPyMinimize: this minimiser's own bounds differ from those of the problem; "
                "give one of them"
            )
        return own

    def _options(self, method: str) -> dict[str, Any]:
        alone = {} if self.tol is None else _BY_GRADIENT_ONLY.get(method, {})
        return {**alone, **(self.options or {})}

    def _slope(self, seen: ObjectiveFunction, at: Coordinates, x: Vector) -> Vector:
        here = seen.at(at.tensors(x))
        seen.check(here, 0)
        return at.vector(here.slope)


def _solved(
    seen: ObjectiveFunction,
    at: Coordinates,
    limits: FlatBounds,
    rows: dict[str, FlatFunction],
    x: Vector,
    first: Vector,
) -> bool:
    """Whether x is a solution to rounding level, whatever the method says of itself.

    Then the gradient is made of what pushes against active constraints (Karush, Kuhn and Tucker);
    a line search that finds no lower value, or a step that vanishes, says nothing else.
    """
    slope = at.vector(seen.at(at.tensors(x)).slope)
    if not rows:
        return at.negligible(x - limits.clip(x - slope), first)
    from scipy.optimize import nnls

    lower, upper = (at.touching(x - bound, x) for bound in (limits.lower, limits.upper))
    pushes = [-np.eye(len(x))[lower], np.eye(len(x))[upper]]
    beyond = [x - limits.clip(x)]
    for name, function in rows.items():
        values, jacobian = function(x), function.jacobian(x)
        if name == "equality":
            pushes += [jacobian, -jacobian]
            beyond.append(values)
        else:
            pushes.append(jacobian[at.touching(values, x) | (values > 0)])
            beyond.append(values.clip(min=0))
    columns = np.concatenate(pushes).T
    multipliers = nnls(columns, -slope)[0] if columns.size else np.zeros(columns.shape[1])
    return at.negligible(slope + columns @ multipliers, first) and at.negligible(
        np.concatenate(beyond), x
    )


def _check_method(method: str, bounds: bool, rows: bool) -> None:
    for given, able, what in (
        (bounds, _WITH_BOUNDS, "bounds"),
        (rows, _WITH_ROWS, "equality and inequality"),
    ):
        if given and method not in able:
            raise InvalidArgumentError(
                f"SciPyMinimize(method={method!r}) cannot handle {what}; these can: "
                f"{', '.join(sorted(able))}"
            )


def _with_derivatives(method: str, seen: ObjectiveFunction, at: Coordinates) -> dict[str, Any]:
    """The objective for SciPy, with the derivatives that the method uses."""
    if method in _WITHOUT_GRADIENT:
        return {"fun": lambda x: seen.value(at.tensors(x))}

    def value_and_slope(x: Vector) -> tuple[float, Vector]:
        here = seen.at(at.tensors(x))
        return here.value, at.vector(here.slope)

    given: dict[str, Any] = {"fun": value_and_slope, "jac": True}
    if method in _WITH_HESSIAN_PRODUCTS:
        given["hessp"] = at.objective(seen).hessian_product
    elif method in _WITH_HESSIAN:
        given["hess"] = at.objective(seen).hessian
    return given


def _constraints(method: str, rows: dict[str, FlatFunction]) -> list[Any]:
    """The constraints for SciPy, in the newer form for trust-constr and the older for the rest."""
    from scipy.optimize import NonlinearConstraint

    def newer(f: FlatFunction, lower: float) -> Any:
        return NonlinearConstraint(f, lower, 0.0, f.jacobian, f.hessian)

    def older(f: FlatFunction, kind: str) -> Any:  # an inequality is at least 0 there
        return {"type": kind, "fun": lambda x: -f(x), "jac": lambda x: -f.jacobian(x)}

    if method == "trust-constr":
        lower = {"equality": 0.0, "inequality": -np.inf}
        return [newer(f, lower[name]) for name, f in rows.items()]
    kinds = {"equality": "eq", "inequality": "ineq"}
    return [older(f, kinds[name]) for name, f in rows.items()]
