"""A from differences of gradients, for models without a second derivative in torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from implicit_grad._curvature.hessian import Hessian
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import GraphError
from implicit_grad._torch.choices import SameChoices
from implicit_grad._torch.graph import coarsest_each
from implicit_grad._torch.kinks import take_pieces
from implicit_grad._torch.products import gradient, without_hooks
from implicit_grad._torch.pytree import Tensors, length

_CHANGED = (
    "the condition's function has other derivatives when it is evaluated again: it refers to a "
    "variable that has changed since, or it is random, or a spectral norm in training mode turns "
    "in each evaluation. Pass everything it needs as arguments; a loader in batches= that augments "
    "at random needs seeds that are the same in each pass; a spectral norm needs .eval()"
)


# Networks bend within a hundredth of their weights' length. float64 has digits to spare for that,
# half precision has none: in float32, a shorter step than is right for others loses less.
_SHORTER = {torch.finfo(torch.float32).eps: 8.0}


class FiniteDifference(Hessian):
    """Products by central differences of gradients, for models without a double backward.

    ∇²G u ≈ (∇G(φ + εu) − ∇G(φ − εu)) / 2ε with ε = eps^(1/3) max(1, ‖φ‖) / ‖u‖, where the errors
    of truncation and rounding balance if ∇G changes over lengths around max(1, ‖φ‖): relative
    errors are around 1e-10 in float64. In float32 ε is an eighth of that, and rounding leaves
    around 1e-4. Two gradients a product. Kinks (ReLU, pooling) are held on the piece that they are
    on at φ, as they are for the Hessian.
    """

    curvature = "finite_difference"

    def __init__(self, objective: Objective) -> None:
        if objective.n_tasks is not None:
            raise GraphError("finite differences are taken for one task at a time")
        if objective.again is None:
            raise GraphError(
                'curvature="finite_difference" needs the inner objective as a function of the '
                "weights (with imaml: learner.adapt(lambda: loss(...))), and gives first "
                "derivatives only",
                anchor="no-function-to-evaluate",
            )
        super().__init__(objective)
        self._again = SameChoices(objective.again)
        self._eps = objective.precision
        self._size = length(objective.phi)
        self._check_unchanged()

    @functools.cached_property
    def precision(self) -> float:
        """That of differences with the steps taken here."""
        eps: float = self._eps ** (2 / 3) * _SHORTER.get(self._eps, 1.0)
        return eps

    @staticmethod
    def _convex(objective: Objective) -> None:
        return None

    def _slope(self) -> Tensors:
        with torch.no_grad():
            return gradient(self.objective.value, self.objective.phi)

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """∇²value u."""
        return self._differences(u, (), self._eps)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu: what λ(φ − θ) adds, and differences of the gradients by the inputs."""
        exact = super().pullback(u, inputs)
        return tuple(map(torch.add, exact, self.smooth_pullback(u, inputs)))

    def smooth_pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂∇value/∂inputs)ᵀu, by differences: without what λ(φ − θ) adds."""
        found: dict[int, Tensor] = {}
        precisions = [max(self._eps, p) for p in coarsest_each([self.objective.value], inputs)]
        for eps in set(precisions):  # gradients by bfloat16 features are rounded to bfloat16
            places = [i for i, other in enumerate(precisions) if other == eps]
            alike = self._differences(u, [inputs[i] for i in places], eps)[len(u) :]
            found |= zip(places, alike, strict=True)
        return tuple(found[i] for i in range(len(inputs)))

    def _differences(self, u: Tensors, inputs: Sequence[Tensor], eps: float) -> Tensors:
        """The derivatives of ∇value along u in φ, with respect to φ and to the inputs.

        `eps` is the relative precision of the gradients.
        """
        size = length(u)
        if not 0 < size < float("inf"):  # 0: the products are too; Inf: let it be seen
            return tuple(torch.zeros_like(x) * size for x in (*u, *inputs))
        step = eps ** (1 / 3) / _SHORTER.get(eps, 1.0) * max(1.0, self._size) / size
        ahead, behind = (self._slope_at(sign * step, u, inputs) for sign in (1, -1))
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))

    def _slope_at(self, step: float, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        with torch.no_grad():
            moved = tuple(torch.add(p, w, alpha=step) for p, w in zip(self.phi, u, strict=True))
        phi = tuple(p.detach().requires_grad_() for p in moved)
        with torch.enable_grad():
            value = self._again(phi)
        take_pieces(value, self.objective.value)
        with torch.no_grad(), self._guard(), without_hooks(inputs):
            return gradient(value, (*phi, *inputs))

    def _check_unchanged(self) -> None:
        """Raise if the function, evaluated again where it was recorded, has another gradient."""
        zero = tuple(torch.zeros_like(p) for p in self.phi)
        difference = [
            a - b for a, b in zip(self._slope_at(0.0, zero, ()), self.smooth, strict=True)
        ]
        if not length(difference) <= self._eps**0.5 * length(self.smooth):
            raise GraphError(_CHANGED, anchor="changed-since")
