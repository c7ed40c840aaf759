"""Newton's method with truncated CG: the Hessian-free minimiser of the iMAML paper."""

from __future__ import annotations

import dataclasses

import torch

from implicit_grad._linear_solvers.cg import CG
from implicit_grad._options import require_count
from implicit_grad._theorem.adjoint import solve_adjoint
from implicit_grad._torch.pytree import Tensors, inner
from implicit_grad.solvers._descent import Descent, Watch
from implicit_grad.solvers._objective import ObjectiveFunction, Point, moved

# Armijo's condition: the share of the decrease that the slope promises which must come true.
_SUFFICIENT = 1e-4
# At rounding level, where values tell nothing, the slope along the step must shrink by this.
_FLATTER = 0.9
# Units in the last place by which a value may be off, for it is a sum of some numbers.
_LAST_PLACES = 16
_HALVINGS = 40
_NO_LENGTH = (
    "No step length makes the objective smaller: it has a kink there (ReLU, abs, max), it is "
    "random, or its gradient is not that of its value. Smooth it, or loosen the tolerance and "
    "do not trust derivatives at a kink"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonCG(Descent):
    """φ ← φ + t d with ∇²objective · d ≈ −∇objective, d by a few steps of conjugate gradients.

    The Hessian is used in products only (Martens, 2010, Deep learning via Hessian-free
    optimization; Rajeswaran et al., 2019, use it for inner problems), by differences of gradients
    where an operation has no second derivative in torch. Where CG meets negative curvature, its
    absolute value is taken instead, so that d still leads downhill (Dauphin et al., 2014,
    Identifying and attacking the saddle point problem). The length t starts at 1 and is halved
    until the objective falls enough, so the objective never rises by more than its own rounding
    error; where no length will do, the run ends. `lr` is not needed, and the objective must not be
    random.

    Args:
        maxiter: the most Newton steps.
        cg: Hessian-vector products for one step. With as many as there are unknowns, a step is
            Newton's.
        tol: stop when ‖∇objective‖₂ is at most this, in the objective's units over φ's.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1.

    >>> bowl = lambda phi: (phi * phi * torch.tensor([1.0, 4.0])).sum()
    >>> NewtonCG(maxiter=1, cg=2).minimize(bowl, torch.tensor([1.0, 1.0])).abs().max() < 1e-6
    tensor(True)
    """

    maxiter: int = 20
    cg: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "maxiter", 0)
        require_count(self, "cg", 1)

    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        phi = start
        for step in range(self.maxiter):
            here, hessian = watch.curved_at(phi, step)
            downhill = tuple(-g for g in here.slope)
            direction = solve_adjoint(CG(maxiter=self.cg), hessian, downhill, verify=False).x
            if not inner(here.slope, direction) < 0:  # rounding, or a Hessian that is not finite
                direction = downhill
            found = _line_search(watch.objective, here, direction)
            if found is None:
                watch.stuck(_NO_LENGTH)
                break
            phi = found
        return phi


def _line_search(objective: ObjectiveFunction, here: Point, direction: Tensors) -> Tensors | None:
    """The first of φ + d, φ + d/2, … that is lower enough; None if there is none.

    Near the minimum differences of values are rounding errors. There a step is taken if the slope
    along it shrinks (Hager and Zhang, 2005, A new conjugate gradient method with guaranteed descent
    and an efficient line search).
    """
    slope, length = inner(here.slope, direction), 1.0
    eps = max((torch.finfo(p.dtype).eps for p in here.phi), default=0.0)
    rounding = _LAST_PLACES * eps * abs(here.value)
    for _ in range(_HALVINGS):
        phi = moved(here.phi, direction, length)
        value = objective.value(phi)
        if value < here.value + _SUFFICIENT * length * slope:
            return phi
        if value <= here.value + rounding:
            there = inner(objective.at(phi).slope, direction)
            if abs(there) <= _FLATTER * abs(slope):
                return phi
        length /= 2
    return None
