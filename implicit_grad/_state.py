"""Evaluate the user's functions again without changing anything that the user owns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


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


@contextlib.contextmanager
def differentiable_twice(recurrent: bool = False) -> Iterator[None]:
    """Attention as products and a softmax, and `recurrent` layers without cuDNN.

    The fused kernels of both have no second derivative.
    """
    without_cudnn = torch.backends.cudnn.flags(enabled=False)
    with sdpa_kernel(SDPBackend.MATH), without_cudnn if recurrent else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def undisturbed(devices: set[torch.device], replay: RandomState | None = None) -> Iterator[None]:
    """Run user code with gradients on, leaving random generators and module buffers as they were.

    `replay` is the random state to evaluate under, so that repeated evaluations draw the same
    dropout masks. Autocast is off: products with second derivatives are taken in the tensors' own
    precision, whatever surrounds the backward pass. Attention is computed step by step, because
    fused kernels have no second derivative.
    """
    before = RandomState(devices)
    if replay is not None:
        replay.restore()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_private_buffers())
            stack.enter_context(differentiable_twice())
            for device_type in {"cpu", *(d.type for d in devices)}:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        before.restore()


@contextlib.contextmanager
def _private_buffers() -> Iterator[None]:
    """Every module that runs inside writes its buffers (BatchNorm statistics) to copies.

    The module's own buffers are put back when its forward ends; they are never written to, so that
    graphs which hold them stay valid. Hooks are global in torch, hence the check of the thread.
    """
    thread = threading.get_ident()
    originals: list[tuple[torch.nn.Module, dict[str, torch.Tensor | None]]] = []

    def lend_copies(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and module._buffers:
            originals.append((module, dict(module._buffers)))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()

    def put_back(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and originals and originals[-1][0] is module:
            module._buffers.update(originals.pop()[1])

    hooks = (
        register_module_forward_pre_hook(lend_copies),
        register_module_forward_hook(put_back, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while originals:  # only after an exception that no hook saw
            module, buffers = originals.pop()
            module._buffers.update(buffers)
