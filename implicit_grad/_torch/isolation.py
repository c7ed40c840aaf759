"""Evaluate the user's functions again without changing anything that the user owns."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from implicit_grad._torch.products import own_precision


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left alone by torch.compile: what that compiles has no second derivative."""
    eager: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # slow to import, and there if anything is compiled
            return function(*args, **kwargs)
        if not eager:
            eager.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return eager[0](*args, **kwargs)

    return call


class RandomState:
    """The state of the random generators that an evaluation may draw from (dropout masks)."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cuda = sorted(d.index or 0 for d in devices if d.type == "cuda")
        self._states = (torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self._cuda])

    def restore(self) -> None:
        """Put the generators back to where they were."""
        cpu, cuda = self._states
        torch.set_rng_state(cpu)
        for index, state in zip(self._cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, index)


class _Setting:
    """Settings of the whole process while any thread is inside: the last to leave puts them back.

    Each is a function that reads it, one that writes it, and its value inside.
    """

    def __init__(self, *settings: tuple[Callable[[], Any], Callable[[Any], Any], Any]) -> None:
        self._settings, self._lock, self._inside = settings, threading.Lock(), 0
        self._before: list[Any] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._before = [read() for read, _, _ in self._settings]
                for _, write, value in self._settings:
                    write(value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    for (_, write, _), value in zip(self._settings, self._before, strict=True):
                        write(value)


_attention = torch.backends.cuda  # the switches are there, and are those of CPUs as well


_plain_attention = _Setting(
    (_attention.math_sdp_enabled, _attention.enable_math_sdp, True),
    (_attention.flash_sdp_enabled, _attention.enable_flash_sdp, False),
    (_attention.mem_efficient_sdp_enabled, _attention.enable_mem_efficient_sdp, False),
    (_attention.cudnn_sdp_enabled, _attention.enable_cudnn_sdp, False),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
)


_without_cudnn = _Setting((torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False))


@contextlib.contextmanager
def differentiable_twice(recurrent: bool = False) -> Iterator[None]:
    """Attention as products and a softmax, and `recurrent` layers without cuDNN.

    The fused kernels of both have no second derivative.
    """
    with _plain_attention(), _without_cudnn() if recurrent else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def isolated(devices: set[torch.device], replay: RandomState) -> Iterator[None]:
    """Run user code with gradients on, leaving random generators and module buffers as they were.

    `replay` is the random state to evaluate under, so that repeated evaluations draw the same
    dropout masks. Autocast is off: products with second derivatives are taken in the tensors' own
    precision, whatever surrounds the backward pass. Attention is computed step by step, because
    fused kernels have no second derivative.
    """
    before = RandomState(devices)
    replay.restore()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_private_buffers())
            stack.enter_context(differentiable_twice())
            stack.enter_context(own_precision(devices))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        before.restore()


_lent: dict[torch.nn.Module, tuple[dict[str, torch.Tensor | None], int]] = {}


_lending = threading.Lock()


def _lend(module: torch.nn.Module) -> None:
    """Give a module copies of its buffers, unless it has them from another thread already."""
    with _lending:
        originals, lenders = _lent.get(module, (None, 0))
        if originals is None:
            originals = dict(module._buffers)
            for name, buffer in originals.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        _lent[module] = originals, lenders + 1


def _put_back(module: torch.nn.Module) -> None:
    """Give a module its own buffers again, when the last who lent it copies is done."""
    with _lending:
        originals, lenders = _lent[module]
        if lenders > 1:
            _lent[module] = originals, lenders - 1
        else:
            module._buffers.update(originals)
            del _lent[module]


@contextlib.contextmanager
def _private_buffers() -> Iterator[None]:
    """Every module that runs inside writes its buffers (BatchNorm statistics) to copies.

    The module's own buffers are put back when its forward ends; they are never written to, so that
    graphs which hold them stay valid. Hooks are global in torch, hence the check of the thread.
    """
    thread = threading.get_ident()
    lent: list[torch.nn.Module] = []

    def lend_copies(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and module._buffers:
            _lend(module)
            lent.append(module)

    def put_back(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and lent and lent[-1] is module:
            _put_back(lent.pop())

    hooks = (
        register_module_forward_pre_hook(lend_copies),
        register_module_forward_hook(put_back, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while lent:  # only after an exception that no hook saw
            _put_back(lent.pop())
