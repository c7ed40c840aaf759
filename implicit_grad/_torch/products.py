"""Products with Jacobians: gradients and vector–Jacobian products, and in which precision."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from implicit_grad._torch.pytree import Tensors

_run_backward = torch.autograd.Variable._execution_engine.run_backward


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Tensors:
    """(∂outputs/∂inputs)ᵀ cotangents, zeros where nothing depends on an input.

    The graph is kept; the product is itself differentiable where gradients are enabled.
    """
    return Pullback(outputs, inputs)(cotangents)


class Pullback:
    """u ↦ (∂outputs/∂inputs)ᵀu, as `vjp`, for many u: what they have in common is found once."""

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._depends = [isinstance(y, Tensor) and y.requires_grad for y in outputs]
        self._outputs = tuple(itertools.compress(outputs, self._depends))
        self._inputs = tuple(inputs)
        self._alone = _alone(self._outputs)

    def __call__(self, cotangents: Sequence[Tensor]) -> Tensors:
        inputs, chosen = self._inputs, tuple(itertools.compress(cotangents, self._depends))
        if not chosen or not inputs:
            return tuple(map(torch.zeros_like, inputs))
        if self._alone is not None and (known := self._alone(inputs, chosen)) is not None:
            return known
        # what torch.autograd.grad calls once it has checked what is known here: a fifth of its time
        grads = _run_backward(
            self._outputs,
            chosen,
            True,  # keep the graph
            torch.is_grad_enabled(),  # make one of the result
            inputs,
            True,  # some may be unused
            accumulate_grad=False,
        )
        found = zip(grads, inputs, strict=True)
        return tuple([torch.zeros_like(x) if g is None else dense(g) for g, x in found])


def gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensors:
    """∇value with respect to the inputs, zeros where it does not depend on one."""
    alone = _alone([value])
    known = None if alone is None else alone(inputs, None)
    return known if known is not None else vjp([value], inputs, [torch.ones_like(value)])


Alone = Callable[[Sequence[Tensor], Tensors | None], Tensors | None]


def _alone(outputs: Sequence[Tensor]) -> Alone | None:
    """What makes the product by the Function that made all of its outputs, if it offers that.

    Its backward pass is not told which derivatives are asked for, and would find all of them.
    """
    node = outputs[0].grad_fn if outputs else None
    alone = getattr(node, "alone", None)
    if alone is None or any(
        y.grad_fn is not node or y.output_nr != i for i, y in enumerate(outputs)
    ):
        return None
    return functools.partial(alone, node)


def plain_gradient(
    value: Tensor, inputs: Sequence[Tensor], keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """∇value without a graph of its own; None where the value does not depend on an input."""
    grads = torch.autograd.grad(value, list(inputs), retain_graph=keep_graph, allow_unused=True)
    return tuple(None if g is None else dense(g) for g in grads)


def dense(gradient: Tensor) -> Tensor:
    """A gradient to calculate with: embeddings may have sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def variables(tensors: Tensors) -> Tensors:
    """Detached copies that share memory and may be differentiated with respect to."""
    return tuple(
        t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors
    )


def stand_ins(tensors: Tensors, wanted: Sequence[bool]) -> Tensors:
    """Detached copies, to be differentiated by only where that is wanted."""
    pairs = zip(tensors, wanted, strict=True)
    return tuple([t.detach().requires_grad_(wants) for t, wants in pairs])


def device_types(devices: Iterable[torch.device]) -> set[str]:
    """The devices' types, and the CPU's."""
    return {"cpu", *[d.type for d in devices]}


NOTHING = contextlib.nullcontext()  # in the place of contexts that would change nothing


def own_precision(
    devices: Iterable[torch.device], changes: bool = False
) -> contextlib.AbstractContextManager[object]:
    """Autocast off: products are taken in the tensors' own precision, whatever surrounds them.

    `changes` says that it is set anew inside, and to be put back as it was.
    """
    kinds = device_types(devices)
    if not changes and not any(map(torch.is_autocast_enabled, kinds)):  # the usual case
        return NOTHING
    return _without_autocast(kinds)


@contextlib.contextmanager
def _without_autocast(kinds: set[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device_type in kinds:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def without_hooks(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Take the user's gradient hooks off leaves: autograd runs them when it accumulates."""
    hooked = [t for t in tensors if t.is_leaf and t._backward_hooks]
    return _without_hooks(hooked) if hooked else NOTHING


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    hooks = [(t, t._backward_hooks) for t in tensors]
    try:
        for tensor, _ in hooks:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, own in hooks:
            tensor._backward_hooks = own
