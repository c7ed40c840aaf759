"""A recorded graph as a function of other tensors: what derivatives of derivatives go through.

F is recorded once, on tensors of its own, and the variables that the user's function refers to may
have changed since, or the learner that it calls may be gone. All its derivatives are in that graph
still. So it is never evaluated anew: what is computed from the stand-ins in the graph is attached
to tensors of the same values elsewhere, and its pullback is attached likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._errors import GraphError
from implicit_grad._theorem.linearization import Curvature, Linearization
from implicit_grad._torch.missing import missing_told
from implicit_grad._torch.products import own_precision, variables, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import Plain, is_transformed, lifted

_MISSING = (
    "second derivatives are not available: an operation that they go through has no derivative of "
    "that order in torch. Use another form of the operation; or, if it is in a residual that is a "
    "gradient, give the objective to ig.argmin"
)


class Reattached(Linearization):
    """F as recorded, around other tensors φ and a that have the values of those it is recorded on.

    Products and pullbacks are differentiable with respect to φ, a and what they are taken with.
    """

    def __init__(
        self, recorded: Linearization, stand_ins: Tensors, phi: Tensors, inputs: Tensors
    ) -> None:
        self._recorded = recorded
        self.is_hessian = recorded.is_hessian
        self._stand_ins, self._tensors = (*recorded.phi, *stand_ins), (*phi, *inputs)
        scale = recorded.scale
        if scale is not None:
            scale = attached(scale, self._stand_ins, self._tensors)
        own = {id(s): t for s, t in zip(self._stand_ins, self._tensors, strict=True)}
        super().__init__(
            recorded.make_residual,
            phi,
            (),
            scale=scale,
            starts=tuple(own.get(id(s), s) for s in recorded.starts),
            n_tasks=recorded.n_tasks,
            said_symmetric=recorded.said_symmetric,
        )

    @functools.cached_property
    def precision(self) -> float:
        """That of the products as recorded."""
        return self._recorded.precision

    def unscaled_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu without the scale's part."""
        return self._computed(self._recorded.unscaled_transposed, u)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu, for tensors among φ and a."""
        own = {id(t): s for t, s in zip(self._tensors, self._stand_ins, strict=True)}
        targets = [own[id(t)] for t in inputs]
        return self._computed(lambda u: self._recorded.pullback(u, targets), u)

    def _computed(self, product: Callable[[Tensors], Tensors], u: Tensors) -> Tensors:
        with torch.enable_grad():
            own = variables(u)
            return attached(product(own), (*self._stand_ins, *own), (*self._tensors, *u))


def reattached(
    record: Callable[[Curvature], tuple[Linearization, Tensors]],
    curvature: Curvature,
    phi: Tensors,
    inputs: Tensors,
) -> Linearization:
    """F as `record` gives it on stand-ins, around φ and the inputs, and differentiable by them."""
    if curvature == "finite_difference":
        raise GraphError(
            'curvature="finite_difference" gives first derivatives only, and backward was called '
            'with create_graph=True: use curvature="hessian"',
            anchor="second-derivatives",
        )
    with torch.enable_grad():
        recorded, stand_ins = record("hessian" if curvature == "auto" else curvature)
    return Reattached(recorded, stand_ins, phi, inputs)


def attached(values: Tensors, stand_ins: Tensors, tensors: Tensors) -> Tensors:
    """The values, which the graph computes from the stand-ins, as a function of the tensors."""
    pairs = [(s, t) for s, t in zip(stand_ins, tensors, strict=True) if s.requires_grad]
    stand_ins, tensors = tuple(s for s, _ in pairs), tuple(t for _, t in pairs)
    there: Tensors = _Attached.apply(values, stand_ins, *tensors)
    return there


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensors, stand_ins: Tensors, *tensors: Tensor) -> Tensors:
        return tuple(t.detach() for t in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.values, ctx.stand_ins, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        def pull(inputs: Tensors, known: Tensors) -> Tensors:
            own = variables(inputs[-len(v) :])
            plain = own_precision(t.device for t in v)
            with missing_told(_MISSING, "second-derivatives"), plain, without_hooks(ctx.stand_ins):
                grads = vjp(ctx.values, ctx.stand_ins, own)
            return attached(grads, (*ctx.stand_ins, *own), inputs)

        inputs = (*ctx.saved_tensors, *v)
        return None, None, *(lifted(Plain(pull), inputs) if is_transformed(v) else pull(inputs, ()))
