"""A function of the user's that solves linear systems, as a linear solver."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, Status, describe
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator, norm

Matvec = Callable[[Tensor], Tensor]
SolveFunction = Callable[[Matvec, Tensor], Any]


@dataclasses.dataclass(frozen=True)
class Given(LinearSolver):
    """`function(matvec, b)` returns x with matvec(x) = b, by whatever means; x is checked.

    Nothing is known of the accuracy that the function has in mind, so a quarter of the digits is
    asked for: a residual of at most eps^(1/4) times b, 1e-4 in float64 and 2e-2 in float32. Other
    packages' iterations stop below that by default (SciPy's at 1e-5), and a solution of another
    system, such as that of the transposed matrix, is nowhere near.
    """

    function: SolveFunction

    symmetric_only: ClassVar[bool] = False

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        matvec = _Matvec(operator.matvec, rhs)
        x = _as_vector(self.function(matvec, rhs.clone()), rhs)
        if not bool(torch.isfinite(x).all()):
            status = Status.NONFINITE_OPERATOR if matvec.spoilt else Status.UNSOLVED
            return LinearSolution(torch.full_like(rhs, math.nan), status, matvec.count)
        residual = norm(rhs - operator.matvec(x)) / norm(rhs)
        if not math.isfinite(residual):
            status = Status.NONFINITE_OPERATOR
        elif residual > operator.precision(rhs) ** (1 / 4):
            status = Status.UNSOLVED
        else:
            status = Status.CONVERGED
        return LinearSolution(x, status, matvec.count, residual, norm=matvec.size or None)


class _Matvec:
    """The products that the function is handed: for tensors and arrays of the right length."""

    def __init__(self, matvec: Matvec, like: Tensor) -> None:
        self._matvec, self._like = matvec, like
        self.count, self.size, self.spoilt = 0, 0.0, False

    def __call__(self, x: Tensor) -> Tensor:
        vector = torch.as_tensor(x).to(self._like)
        if vector.shape != self._like.shape:
            raise InvalidArgumentError(
                f"linear_solver: matvec got {describe(x)}; expected a vector of shape "
                f"{tuple(self._like.shape)}, as b is"
            )
        product = self._matvec(vector.detach())
        self.count += 1
        length, image = norm(vector), norm(product)
        self.spoilt = self.spoilt or not math.isfinite(image)
        self.size = max(self.size, image / length if length else 0.0)
        return product


def _as_vector(x: Any, like: Tensor) -> Tensor:
    """What the function returned, as a vector of our own like b."""
    expected = f"expected a vector of shape {tuple(like.shape)}, as b is"
    try:
        vector = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"linear_solver: the function returned {describe(x)}; {expected}"
        ) from error
    if vector.shape != like.shape or vector.is_complex():
        raise InvalidArgumentError(
            f"linear_solver: the function returned {describe(vector)}; {expected}"
        )
    return vector.detach().to(like, copy=True)


def as_linear_solver(value: object, owner: str, offered: str) -> LinearSolver:
    """A linear solver, or the function for one; else an error that names those on offer."""
    if isinstance(value, LinearSolver):
        return value
    expected = f"{owner}: linear_solver must be {offered} or a function solve(matvec, b), got"
    if isinstance(value, type) and issubclass(value, LinearSolver):
        raise InvalidArgumentError(
            f"{expected} the class {value.__name__}: write {value.__name__}()"
        )
    if isinstance(value, type) or not callable(value):
        raise InvalidArgumentError(f"{expected} {value!r}")
    if not _takes_two(value):
        raise InvalidArgumentError(f"{expected} {value!r}, which does not take two arguments")
    return Given(value)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a built-in function may have no signature
        return True
    return True
