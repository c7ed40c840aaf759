"""An outer loss at a φ: what arrives there, and the hypergradient that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import scalar
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.products import gradient, variables
from implicit_grad._torch.pytree import Tensors
from implicit_grad._wrapper.evaluation import Evaluation


class Outer:
    """The outer loss at a φ: its gradients by φ and, where it depends on them directly, by a.

    `where` names the loss in messages.
    """

    def __init__(
        self,
        where: str,
        outer_loss: Callable[[Any], Tensor],
        evaluation: Evaluation,
        phi: Tensors,
        tensors: Tensors,
    ) -> None:
        with torch.enable_grad():
            at = variables(phi)
            value = scalar(where, outer_loss(evaluation.phi_tree.rebuild(at)))
        with torch.no_grad():
            grads = gradient(value, (*at, *tensors))
        processes = evaluation.condition.processes
        found = (value.detach(), *grads)
        if processes is not None:  # as in a backward pass, and in what follows it
            found = processes.mean(found)
        self.value, grads = found[0], found[1:]
        self.v, self.direct = grads[: len(at)], grads[len(at) :]

    def with_implicit(self, around: Linearization, u: Tensors, targets: Tensors) -> Tensors:
        """The hypergradient: direct − (∂F/∂a)ᵀu."""
        with torch.no_grad():
            through = around.pullback(tuple(-x for x in u), targets)
            return tuple(a + b for a, b in zip(self.direct, through, strict=True))
