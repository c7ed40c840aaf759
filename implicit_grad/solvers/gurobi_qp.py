"""Gurobi on quadratic programs that are written as torch functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError
from implicit_grad._options import require_options
from implicit_grad._warnings import tell
from implicit_grad.solvers._flat import Coordinates, FlatBounds, FlatFunction, Vector, flat_bounds
from implicit_grad.solvers._neighbours import needed_by
from implicit_grad.solvers._objective import ObjectiveFunction

# The simplex method ends in a corner of the active constraints: they hold to rounding error, and
# can be told from the others. Barrier, Gurobi's own choice, leaves 1e-8.
_ACCURATE = {
    "Method": 1,
    "FeasibilityTol": 1e-9,
    "OptimalityTol": 1e-9,
    "BarConvTol": 1e-12,
    "DualReductions": 0,  # tell infeasible from unbounded
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GurobiQP:
    """The minimum of φᵀQφ/2 + cᵀφ with Aφ = b, Gφ ≤ h and bounds.

    The functions are ordinary torch functions: Q, c and the rows are their derivatives at init,
    which are exact for quadratic objectives and affine constraints. Two more points
    show whether they are. Q is dense, so φ should not have more than a few thousand elements.

    Args:
        params: Gurobi's parameters, such as {"TimeLimit": 60}; they have precedence over ours,
            the dual simplex method and tolerances of 1e-9, so that active constraints can be told
            from the others.

    The nearest point to y with positive elements that sum to 1:

    >>> y = torch.tensor([0.75, 0.5, -0.5])
    >>> distance = lambda phi: (phi - y).square().sum()
    >>> on_simplex = {"bounds": (0, None), "equality": lambda phi: phi.sum() - 1}
    >>> GurobiQP().minimize(distance, y, **on_simplex)
    tensor([0.6250, 0.3750, 0.0000])
    """

    params: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require_options(self, "params")

    def minimize(
        self,
        objective: Callable[[Any], Tensor],
        init: Any,
        *,
        bounds: Any = None,
        equality: Callable[[Any], Any] | None = None,
        inequality: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The minimum with equality(phi) = 0, inequality(phi) ≤ 0 and within bounds."""
        with torch.inference_mode(False), torch.no_grad():
            seen = ObjectiveFunction(self, objective, init)
            at = Coordinates(seen)
            limits = flat_bounds(bounds, seen, at)
            seen.check(seen.at(seen.start), 0)
            if not len(at.start):
                return at.result(at.start)
            Q, c = _quadratic(seen, at)
            rows = {
                sense: _affine(name, at.function(name, function), at)
                for sense, name, function in (
                    ("=", "equality", equality),
                    ("<", "inequality", inequality),
                )
                if function is not None
            }
            return at.result(self._solved(Q, c, rows, limits))

    def _solved(
        self, Q: Vector, c: Vector, rows: dict[str, tuple[Vector, Vector]], limits: FlatBounds
    ) -> Vector:
        with needed_by(self):
            import gurobipy
        with (
            gurobipy.Env(params={"OutputFlag": 0}) as env,
            gurobipy.Model(env=env) as model,
        ):
            for name, value in {**_ACCURATE, **(self.params or {})}.items():
                model.setParam(name, value)
            x = model.addMVar(len(c), lb=limits.lower, ub=limits.upper)
            model.setObjective(x @ (Q / 2) @ x + c @ x)
            for sense, (matrix, right) in rows.items():
                model.addMConstr(matrix, x, sense, right)
            model.optimize()
            _check_status(model, gurobipy.GRB)
            return np.asarray(x.X, dtype=np.float64)


def _check_status(model: Any, names: Any) -> None:
    """Raise if there is no solution, warn if Gurobi doubts it."""
    known = {
        names.INFEASIBLE: "infeasible: no phi fulfils equality, inequality and bounds together",
        names.UNBOUNDED: "unbounded: the objective falls for ever along some direction",
        names.INF_OR_UNBD: "infeasible or unbounded",
    }
    if model.Status in known:
        raise InvalidSolutionError(f"GurobiQP: the problem is {known[model.Status]}")
    if not model.SolCount:
        raise InvalidSolutionError(
            f"GurobiQP: Gurobi stopped without a solution, with status {model.Status}"
        )
    if model.Status != names.OPTIMAL:
        said = (
            f"GurobiQP: Gurobi is not sure of its solution and ended with status {model.Status}; "
            "loosen or remove params"
        )
        tell(said, anchor="solver-missed")


def _quadratic(seen: ObjectiveFunction, at: Coordinates) -> tuple[Vector, Vector]:
    """Q and c, by the derivatives at init."""

    def slope(x: Vector) -> Vector:
        return at.vector(seen.at(at.tensors(x)).slope)

    hessian = at.objective(seen).hessian(at.start)
    Q: Vector = (hessian + hessian.T) / 2
    c: Vector = slope(at.start) - Q @ at.start
    _check_linear("objective must be quadratic in phi", slope, Q, c, at)
    eigenvalues = np.linalg.eigvalsh(Q)
    if eigenvalues[0] < -(at.eps**0.5) * np.abs(eigenvalues).max():
        raise InvalidArgumentError(
            "GurobiQP: the objective is not convex: the Hessian has eigenvalues from "
            f"{eigenvalues[0]:.2g} to {eigenvalues[-1]:.2g}. It needs to be positive semi-definite"
        )
    return Q, c


def _affine(name: str, function: FlatFunction, at: Coordinates) -> tuple[Vector, Vector]:
    """The matrix and the right-hand side of one kind of constraint."""
    matrix = function.jacobian(at.start)
    constant: Vector = function(at.start) - matrix @ at.start
    _check_linear(f"{name} must be affine in phi", function, matrix, constant, at)
    return matrix, -constant


def _check_linear(
    demand: str,
    function: Callable[[Vector], Vector],
    matrix: Vector,
    constant: Vector,
    at: Coordinates,
) -> None:
    """Raise unless function(x) = matrix · x + constant elsewhere, to the rounding of its terms.

    It is tried on both sides of init, in steps that change the sign of every element in one of
    them: |φ| is linear as far as its derivatives at init can tell.
    """
    start = at.start
    step = (1 + np.abs(start)) * np.random.default_rng(0).uniform(1, 2, len(start))
    step[::2] *= -1
    for x in (start + step, start - step):
        error = np.abs(function(x) - matrix @ x - constant).max(initial=0.0)
        size = (np.abs(matrix) @ np.abs(x) + np.abs(constant)).max(initial=0.0)
        if not error <= at.eps**0.5 * size:
            raise InvalidArgumentError(
                f"GurobiQP: {demand}: what its derivatives at init foretell for another point is "
                f"wrong by {error:.1e}"
            )
