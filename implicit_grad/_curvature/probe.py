"""What a check evaluates again, beside φ and beside the arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicit_grad._curvature.comparison import changes_unseen, direction
from implicit_grad._torch.graph import (
    coarsest,
    coarsest_each,
    custom_functions,
    once_differentiable,
)
from implicit_grad._torch.products import gradient, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors, inner

COARSE = 1e-4  # eps of a dtype (bfloat16, float16) whose gradients are too coarse to be compared
Elsewhere = Callable[[Tensors, Tensors], Tensors]


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is evaluated again for a check.

    Attributes:
        outputs: those of the user's function, at φ.
        phi: the tensors that stand for φ in their graph.
        inputs: those that stand for arguments, and what the function captured.
        elsewhere: the outputs for other φ and other inputs; without inputs, for those at φ.
        movable: the places of those inputs that `elsewhere` takes.
    """

    outputs: Tensors
    phi: Tensors
    inputs: Tensors
    elsewhere: Elsewhere
    movable: Sequence[int] = ()

    @functools.cached_property
    def eps(self) -> float:
        """The relative precision of the coarsest numbers between φ and the outputs."""
        return coarsest(self.outputs, self.phi)

    @functools.cached_property
    def fine(self) -> list[int]:
        """The places of the inputs by which gradients are fine enough to be compared."""
        precisions = coarsest_each(self.outputs, self.inputs)
        together = enumerate(zip(self.inputs, precisions, strict=True))
        return [i for i, (t, eps) in together if t.requires_grad and eps <= COARSE]

    @property
    def moving(self) -> list[int]:
        """The inputs along which there is something to check.

        Without custom Functions, an argument that is held constant was detached on purpose.
        """
        if not custom_functions(self.outputs, (*self.phi, *self.inputs)):
            return []
        return [i for i in self.movable if i in self.fine]

    def moved_inputs(self, away: Tensors, t: float) -> Tensors:
        """All inputs, those that are moving at t·away from where they are."""
        inputs = list(self.inputs)
        for i, d in zip(self.moving, away, strict=True):
            inputs[i] = torch.add(inputs[i].detach(), d, alpha=t)
        return tuple(inputs)

    @property
    def suspects(self) -> str:
        """Who may be to blame."""
        names = custom_functions(self.outputs, (*self.phi, *self.inputs))
        if names:
            return f"of what the value goes through, suspect {', '.join(names)}"
        return "suspect a .detach(), a hook on a tensor, or an operation of torch's own"


def turns_unseen(probe: Probe, of: Callable[[Tensor, Tensors], Tensor]) -> bool:
    """Whether a number's gradient by the arguments moves with them, and torch does not know it.

    The number is made of the output, and of φ.
    """
    targets = tuple(probe.inputs[i] for i in probe.moving)
    if not targets or probe.eps > COARSE or once_differentiable(probe.outputs, targets):
        return False
    away = direction(targets)

    def slope(t: float) -> Tensors:
        phi, inputs = moved_along(probe.phi, probe.phi, 0.0), probe.moved_inputs(away, t)
        moved = tuple(inputs[i].requires_grad_() for i in probe.moving)
        with torch.enable_grad():
            value = of(probe.elsewhere(phi, inputs)[0], phi)
        with torch.no_grad():
            return gradient(value, moved)

    with torch.enable_grad(), without_hooks(targets):
        here = gradient(of(probe.outputs[0], probe.phi), targets)

    def claimed(u: Tensors) -> float:
        with torch.no_grad(), without_hooks(targets):
            return inner(vjp(here, targets, u), away)

    return changes_unseen(slope, tuple(h.detach() for h in here), claimed, probe.eps)


def moved_along(tensors: Tensors, along: Tensors, t: float) -> Tensors:
    """New leaves, t·along away."""
    return tuple(
        torch.add(p.detach(), d, alpha=t).requires_grad_()
        for p, d in zip(tensors, along, strict=True)
    )


def weighed_sum(blocks: Tensors, weights: Tensors) -> Tensor:
    """The inner product, with its graph."""
    parts = ((b * w).sum() for b, w in zip(blocks, weights, strict=True))
    return functools.reduce(torch.add, parts)
