"""A minimum under constraints as a root: what derivatives of its derivatives go through.

While the active set stays what it is at φ, φ and the multipliers μ of its rows are functions of the
arguments a, which solve the equations that `KKTSystem` is around φ. So (φ, μ) is the root of a
smooth system, whose derivatives of every order are the theorem's. Elements of φ at their bounds b
are put in as b(a), arguments like the others, so that A is symmetric to every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicit_grad._conditions.constraints import KKTSystem
from implicit_grad._errors import GraphError
from implicit_grad._theorem.implicit_function import ImplicitFunction, Problem
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._theorem.reattached import Reattached, attached
from implicit_grad._torch.pytree import Tensors


def as_root(
    around: Linearization,
    stand_ins: Tensors,
    solve_adjoint: Callable[[Linearization, Tensors], Tensors],
    a: Tensors,
) -> Tensors:
    """φ as a function of a, differentiable to any order.

    `around` is recorded on the stand-ins, in which a has its values.

    Raises:
        GraphError: φ lies at a kink, or rows of the active set depend on each other.
    """
    assert isinstance(around, KKTSystem)
    if (why := around.only_once) is not None:
        raise GraphError(
            f"second derivatives are not available here: {why}", anchor="second-derivatives"
        )
    limits = attached(around.limits, stand_ins, a)
    bounds = tuple(
        torch.where(fixed, limit, 0.0) for fixed, limit in zip(around.fixed, limits, strict=True)
    )
    problem = Problem(
        solve=lambda _: tuple(t.detach() for t in around.phi),
        linearize=lambda x, inputs: _Pinned(around, stand_ins, x, inputs),
        solve_adjoint=solve_adjoint,
        snapshot=lambda: (around, (*stand_ins, *around.phi[: len(bounds)])),
    )
    x = ImplicitFunction.apply(problem, *a, *bounds)
    return _with_bounds(x, around.fixed, bounds)


def _with_bounds(x: Tensors, fixed: Tensors, bounds: Tensors) -> Tensors:
    """φ of the unknowns and the bounds."""
    return tuple(map(torch.where, fixed, bounds, x))


class _Pinned(Reattached):
    """The system around unknowns x = (φ, μ), of which elements at bounds have the bounds' values.

    The arguments are (a, bounds). What stands for φ in the record stands for the bounds as well.
    """

    def __init__(
        self, recorded: KKTSystem, stand_ins: Tensors, x: Tensors, inputs: Tensors
    ) -> None:
        size = len(recorded.fixed)
        a, self._own_bounds = inputs[:-size], inputs[-size:]
        phi = _with_bounds(x, recorded.fixed, self._own_bounds)
        super().__init__(recorded, stand_ins, (*phi, *x[size:]), a)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu, for tensors among a and the bounds."""
        phi = dict(zip(map(id, self._own_bounds), self.phi, strict=False))
        return super().pullback(u, [phi.get(id(t), t) for t in inputs])
