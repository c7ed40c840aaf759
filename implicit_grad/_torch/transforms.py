"""Transforms of torch.func and forward mode: each comes down to plain calls and plain pullbacks.

A function of plain tensors, differentiable by autograd to any order, is lifted to tensors that any
transforms look at, in any nesting. `vmap` calls it for each sample; its pullback is the plain one,
lifted again, and so has pullbacks itself; its forward derivative is the pullback of the pullback.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from implicit_grad._errors import GraphError, InvalidArgumentError
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Tensors, is_continuous


@dataclasses.dataclass(frozen=True)
class Plain:
    """(xs, known) ↦ ys for plain tensors, differentiable by autograd.

    `known` holds the ys once they have been computed, so that derivatives need not find them anew;
    it is empty at first, and has no derivative of its own. `batched`, where there is one, is the
    same function for many samples at once, along the first dimension of all tensors.
    """

    function: Callable[[Tensors, Tensors], Tensors]
    batched: Plain | None = None

    def __call__(self, xs: Tensors, known: Tensors) -> Tensors:
        return self.function(xs, known)


def is_transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether a transform of torch.func is at work, or forward mode looks at the tensors.

    Raises:
        GraphError: it is the batching from before torch.func, which cannot be taken apart.
    """
    tensors = list(tensors)
    if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors):
        raise GraphError(
            "batches of gradients as in is_grads_batched=True, jacobian(vectorize=True) or "
            "gradcheck(check_batched_grad=True) are not available: use torch.func.vmap or jacrev",
            anchor="batched-gradients",
        )
    at_work = torch._C._functorch.peek_interpreter_stack() is not None
    return at_work or (in_forward_mode() and any(_tangent(t) is not None for t in tensors))


def is_wrapped(t: Tensor) -> bool:
    """Whether a transform looks at the tensor, so that its values are not there to be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def layers(t: Tensor) -> Iterator[Tensor]:
    """The tensor as each of the transforms around sees it, from the innermost outwards."""
    yield t
    while is_wrapped(t):
        t = torch._C._functorch.get_unwrapped(t)
        yield t


def is_batched(t: Tensor) -> bool:
    """Whether `vmap` looks at the tensor, below other transforms or not."""
    return any(map(torch._C._functorch.is_batchedtensor, layers(t)))


class CannotBatch(Exception):
    """A batched function cannot run as such: call it for one sample after another.

    `known` are the results that were found before, stacked, and `apart` the places of the samples
    that are to be taken out of the batch: None for all.
    """

    def __init__(self, known: Tensors = (), apart: list[int] | None = None) -> None:
        super().__init__()
        self.known, self.apart = known, apart


def has_tangent(t: Tensor) -> bool:
    """Whether forward mode looks at the tensor, below other transforms or not."""
    functorch = torch._C._functorch
    if _tangent(t) is not None:
        return True
    innermost = functorch.peek_interpreter_stack()
    if innermost is None:
        return False
    outside = functorch.get_unwrapped(t) if functorch.maybe_get_level(t) == innermost.level() else t
    with temporarily_pop_interpreter_stack():  # a tangent is not seen from further within
        return has_tangent(outside)


def taking_gradients() -> AbstractContextManager[None]:
    """Functions may make variables by `requires_grad_()`, which torch.func refuses otherwise."""
    return eager_transforms.enable_inplace_requires_grad(True)


def in_forward_mode() -> bool:
    """Whether forward mode is on, whatever it looks at."""
    return forward_ad._current_level >= 0


def outside_forward_mode() -> AbstractContextManager[object]:
    """Let code that knows nothing of what surrounds it use forward mode itself.

    torch turns it off in a Function's forward, where the user's code runs. And it has one dual
    level only, which torch.func shares between nested calls, and counts these: around us may be
    one, and the next call is to be a nested one.
    """
    if in_forward_mode():
        return _within_forward_mode()
    return forward_ad._set_fwd_grad_enabled(True)


@contextlib.contextmanager
def _within_forward_mode() -> Iterator[None]:
    inside = eager_transforms.JVP_NESTING == 0
    eager_transforms.JVP_NESTING += inside
    try:
        yield
    except RuntimeError as error:
        if not (in_forward_mode() and "Nested forward mode" in str(error)):
            raise
        raise GraphError(
            "the solver, or the condition's function, uses forward mode (dual_level) and is called "
            "within forward mode, of which torch has one level only: use torch.func.jvp, jacfwd or "
            "hessian in it, or reverse mode around it"
        ) from error
    finally:
        eager_transforms.JVP_NESTING -= inside


def _tangent(t: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return tangent


def lifted(function: Plain, xs: Sequence[Tensor], known: Sequence[Tensor] = ()) -> Tensors:
    """function(xs) for tensors under any transforms."""
    ys: Tensors = _Lifted.apply(function, len(xs), *xs, *known)
    return ys


def pullback(function: Plain, size: int) -> Plain:
    """(xs, v) ↦ (∂function/∂xs)ᵀv, for those of `size` tensors xs that are not integers."""

    def pull(tensors: Tensors, known: Tensors) -> Tensors:
        with torch.enable_grad():
            xs, v = _variables(tensors[:size]), tensors[size:]
            ys = function(xs, known)
        return vjp(ys, _real(xs), v)

    return Plain(pull, None if function.batched is None else pullback(function.batched, size))


def _pushforward(function: Plain, size: int) -> Plain:
    """(xs, t) ↦ (∂function/∂xs) t, as the derivative of the pullback, which is linear in v.

    There is a tangent for each of `size` tensors xs that is not of integers.
    """

    def push(tensors: Tensors, known: Tensors) -> Tensors:
        with torch.enable_grad():
            xs, t = _variables(tensors[:size]), tensors[size:]
            ys = function(xs, known)
            dummy = tuple(torch.zeros_like(y, requires_grad=True) for y in ys)
            pulled = vjp(ys, _real(xs), dummy)
        return vjp(pulled, dummy, t)

    return Plain(push, None if function.batched is None else _pushforward(function.batched, size))


class _Lifted(torch.autograd.Function):
    """function(xs, known), where `function` only ever sees plain tensors."""

    @staticmethod
    def forward(function: Plain, size: int, *tensors: Tensor) -> Tensors:
        # gradients may come as expanded tensors, which forward mode cannot write to
        return tuple(y.contiguous() for y in function(tensors[:size], tensors[size:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.size, *tensors = inputs
        xs, known = tensors[: ctx.size], tensors[ctx.size :]
        ctx.save_for_backward(*xs, *(known or output))
        ctx.save_for_forward(*xs, *(known or output))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        xs, known = ctx.saved_tensors[: ctx.size], ctx.saved_tensors[ctx.size :]
        grads = iter(lifted(pullback(ctx.function, ctx.size), (*xs, *v), known))
        for_xs = (next(grads) if is_continuous(x) else None for x in xs)
        return None, None, *for_xs, *(None for _ in ctx.needs_input_grad[2 + ctx.size :])

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Tensors:
        xs, known = ctx.saved_tensors[: ctx.size], ctx.saved_tensors[ctx.size :]
        t = tuple(
            torch.zeros_like(x) if d is None else d
            for x, d in zip(xs, tangents, strict=False)
            if is_continuous(x)
        )
        return lifted(_pushforward(ctx.function, ctx.size), (*xs, *t), known)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Plain, size: int, *tensors: Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        if info.batch_size == 0:
            raise InvalidArgumentError("implicit: vmap over a batch without samples")
        if function.batched is not None:
            rows = tuple(
                t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim in zip(tensors, in_dims[2:], strict=True)
            )
            try:
                ys: Tensors = _Lifted.apply(function.batched, size, *rows)
                return ys, (0,) * len(ys)
            except CannotBatch as reason:
                if reason.known and len(tensors) == size:
                    tensors, in_dims = (*rows, *reason.known), (0,) * (2 + size + len(reason.known))
                if reason.known and reason.apart is not None:
                    every = rows if len(tensors) == len(rows) else tensors
                    ys = _in_two_parts(function, size, every, reason.apart)
                    return ys, (0,) * len(ys)
        samples = [
            _Lifted.apply(
                function,
                size,
                *(
                    t if dim is None else t.select(dim, i)
                    for t, dim in zip(tensors, in_dims[2:], strict=True)
                ),
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return stacked, (0,) * len(stacked)


def _in_two_parts(function: Plain, size: int, rows: Sequence[Tensor], apart: list[int]) -> Tensors:
    """The results for a batch of which some samples are taken apart."""
    together = sorted(set(range(len(rows[0]))) - set(apart))
    singles = [_Lifted.apply(function, size, *(t[i] for t in rows)) for i in apart]
    parts = [tuple(torch.stack(ys) for ys in zip(*singles, strict=True))]
    if together:
        some = torch.tensor(together, device=rows[0].device)
        batch = (t.index_select(0, some.to(t.device)) for t in rows)
        parts.append(_Lifted.apply(function.batched, size, *batch))
    places = torch.tensor([*apart, *together]).argsort()
    return tuple(
        torch.cat(ys).index_select(0, places.to(ys[0].device)) for ys in zip(*parts, strict=True)
    )


def _variables(xs: Tensors) -> Tensors:
    """Tensors to differentiate by: new nodes, so that one's history does not lead to another."""
    return tuple(
        (x.view_as(x) if x.requires_grad else x.detach().requires_grad_())
        if is_continuous(x)
        else x
        for x in xs
    )


def _real(xs: Tensors) -> Tensors:
    return tuple(x for x in xs if is_continuous(x))
