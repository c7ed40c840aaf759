"""Gradient descent with a fixed step length."""

from __future__ import annotations

import dataclasses

from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._options import require_positive
from implicit_grad._torch.pytree import Tensors
from implicit_grad.solvers._descent import Stepwise, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDescent(Stepwise):
    """φ ← φ − lr ∇objective(φ).

    With a proximal term the step is (φ − lr ∇loss + lr·λ·θ)/(1 + lr·λ), stable for every λ. With
    lr = 1/L, L the largest curvature and κ = L/μ, the error falls by 1 − 1/κ a step.

    Args:
        lr: step length, in the units of φ² over the objective's.
        steps: the most steps to take; None means 10,000.
        tol: stop when ‖∇objective‖₂ is at most this, in the objective's units over φ's.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1.

    >>> import torch
    >>> half_square = lambda phi: (phi * phi).sum() / 2
    >>> GradientDescent(lr=0.5, steps=3).minimize(half_square, torch.tensor([8.0]))
    tensor([1.])
    """

    lr: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr")

    @property
    def elementwise(self) -> bool:
        """Whether it descends a batch of problems just as each of them alone."""
        return not self.has_tolerance

    def training(self, phi: Tensors) -> EarlyStopped | None:
        return EarlyStopped(steps=self.steps, lr=self.lr) if self.counts_steps else None

    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        phi = start
        for step in range(self.most_steps):
            phi = watch.at(phi, step).step(self.lr)
        return phi
