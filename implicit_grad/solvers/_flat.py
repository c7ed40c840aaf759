"""Functions of φ as functions of one flat NumPy vector, with the derivatives that solvers ask for.

NumPy's side is always float64; the tensors keep the dtypes and devices that they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from implicit_grad._conditions.bounds import Limits, spread
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._torch import pytree
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad.solvers._objective import ObjectiveFunction, Variables


@dataclasses.dataclass(frozen=True)
class FlatBounds:
    """lower ≤ x ≤ upper, with infinities where there is no bound."""

    lower: Vector
    upper: Vector

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())

    def same(self, other: FlatBounds) -> bool:
        """Whether they are equal in every element."""
        return bool((self.lower == other.lower).all() and (self.upper == other.upper).all())

    def clip(self, x: Vector) -> Vector:
        """The nearest vector within the bounds."""
        return np.clip(x, self.lower, self.upper)


def flat_bounds(bounds: Any, variables: Variables, coordinates: Coordinates) -> FlatBounds:
    """`(lower, upper)`, each None, a number, a tensor, or a container in the form of φ."""

    def vector(limits: Limits, infinity: float) -> Vector:
        pairs = zip(limits, variables.start, strict=True)
        return coordinates.vector(
            tuple(torch.full_like(t, infinity) if b is None else b for b, t in pairs)
        )

    lower, upper = spread(variables.name, bounds, variables.container)
    return FlatBounds(vector(lower, -np.inf), vector(upper, np.inf))


Vector = npt.NDArray[np.float64]


class Coordinates:
    """The flat vector that stands for a container of tensors."""

    def __init__(self, variables: Variables) -> None:
        self._variables, self._flat = variables, Flat(variables.start)
        self.eps = self._flat.eps
        self.start = self.vector(variables.start)

    def vector(self, tensors: Tensors) -> Vector:
        """Tensors in the form of φ, one after another."""
        flat: Vector = self._flat.ravel(tensors).detach().cpu().double().numpy()
        return flat

    def tensors(self, x: Vector) -> Tensors:
        """The tensors that x stands for, in memory of their own: solvers write to their x again."""
        return self._flat.unravel(torch.tensor(x, dtype=torch.float64))

    def numbers(self, function: Callable[[Tensors], Tensor], x: Vector) -> Tensor:
        """The function's value where x is, without a graph."""
        return self._variables.numbers(function, self.tensors(x))

    def result(self, x: Vector) -> Any:
        """The container that x stands for."""
        return self._variables.result(self.tensors(x))

    def negligible(self, values: Vector, first: Vector) -> bool:
        """Whether the values are at rounding level, by what they were at the start."""
        return bool(np.linalg.norm(values) <= self.eps**0.5 * max(1.0, np.linalg.norm(first)))

    def touching(self, distances: Vector, x: Vector) -> npt.NDArray[np.bool_]:
        """Which distances from x to its limits are at rounding level, one by one."""
        near: npt.NDArray[np.bool_] = np.abs(distances) <= self.eps**0.5 * max(1.0, np.abs(x).max())
        return near

    def objective(self, objective: ObjectiveFunction) -> FlatFunction:
        """The objective as a function with one output."""
        return FlatFunction(lambda phi: objective(phi).reshape(1).cpu().double(), self)

    def function(self, name: str, function: Callable[[Any], Any]) -> FlatFunction:
        """A function of the container, whose outputs are tensors in any container."""

        def outputs(phi: Tensors) -> Tensor:
            returned = function(self._variables.at_values(phi))
            leaves = pytree.leaves(returned)
            if not leaves or not all(
                torch.is_tensor(t) and pytree.is_continuous(t) for t in leaves
            ):
                raise InvalidArgumentError(
                    f"{self._variables.name}: {name} must return floating-point tensors, got "
                    f"{describe(returned)}"
                )
            return torch.cat([pytree.real(t).reshape(-1).cpu().double() for t in leaves])

        return FlatFunction(outputs, self)


class FlatFunction:
    """f(x), its Jacobian, and the Hessian of weights·f."""

    def __init__(self, outputs: Callable[[Tensors], Tensor], coordinates: Coordinates) -> None:
        self._outputs, self._coordinates = outputs, coordinates

    def __call__(self, x: Vector) -> Vector:
        values: Vector = self._coordinates.numbers(self._outputs, x).numpy()
        return values

    def jacobian(self, x: Vector) -> Vector:
        """One row for each output."""
        phi, outputs = self._recorded(x)
        rows = [vjp([outputs], phi, [row]) for row in torch.eye(len(outputs), dtype=torch.float64)]
        return np.stack([self._coordinates.vector(row) for row in rows])

    def hessian(self, x: Vector, weights: Vector | None = None) -> Vector:
        """The matrix of second derivatives of weights·f; all weights are 1 by default."""
        product = self._curved(x, weights)
        return np.stack([product(row) for row in np.eye(len(x))])

    def hessian_product(self, x: Vector, p: Vector) -> Vector:
        """The matrix of second derivatives of f, times p."""
        return self._curved(x, None)(p)

    def _curved(self, x: Vector, weights: Vector | None) -> Callable[[Vector], Vector]:
        phi, outputs = self._recorded(x)
        w = torch.ones_like(outputs) if weights is None else torch.tensor(weights)
        with torch.enable_grad():
            slope = gradient(outputs @ w, phi)

        def product(p: Vector) -> Vector:
            return self._coordinates.vector(vjp(slope, phi, self._coordinates.tensors(p)))

        return product

    def _recorded(self, x: Vector) -> tuple[Tensors, Tensor]:
        phi = tuple(t.requires_grad_() for t in self._coordinates.tensors(x))
        with torch.enable_grad():
            return phi, self._outputs(phi)
