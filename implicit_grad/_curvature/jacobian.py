"""A as the Jacobian of F, where F is given and no gradient that we take of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.graph import between
from implicit_grad._torch.missing import missing_told
from implicit_grad._torch.own_backward import own_backwards
from implicit_grad._torch.products import NOTHING
from implicit_grad._torch.pytree import Tensors

MISSING = (
    "an operation that the residual goes through has no derivative in torch there (if the residual "
    "is a gradient: no second derivative). Use another form of the operation; or, for a gradient, "
    "give the objective to ig.argmin, which takes differences of gradients in such a place"
)


class Jacobian(Linearization):
    """Graphs of products have our own derivatives where torch errs; missing ones are told."""

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu."""
        with missing_told(MISSING), self._own_backwards(self.phi):
            return super().smooth_transposed(u)

    def smooth_product(self, x: Tensors) -> Tensors:
        """A x."""
        with missing_told(MISSING):
            return super().smooth_product(x)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu."""
        with missing_told(MISSING), self._own_backwards((*self.phi, *inputs)):
            return super().pullback(u, inputs)

    def _own_backwards(self, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        if not torch.is_grad_enabled():
            return NOTHING
        return own_backwards(between(self.residual, inputs), lasting=True)
