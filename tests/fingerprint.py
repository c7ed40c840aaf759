"""What a user owns, as a value: equal before and after means that nothing was touched."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def fingerprint(*owned: Any, grad: bool = True) -> dict[str, Any]:
    """Everything about the tensors and modules, and torch's global state, by name.

    Args:
        owned: tensors, modules, and containers of them.
        grad: whether `.grad` counts; not where the test itself calls `backward()`.
    """
    marks = surroundings()
    for i, thing in enumerate(owned):
        marks |= {f"{i}{name}": mark for name, mark in _marks(thing, grad)}
    return marks


def surroundings() -> dict[str, Any]:
    """The state of torch that is nobody's in particular."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    hooks = nn.modules.module
    return {
        "random": hash(random.getstate()),
        "numpy random": _bytes(torch.from_numpy(np.random.get_state()[1].astype(np.int64))),
        "torch random": _bytes(torch.get_rng_state()),
        "cuda random": [_bytes(s) for s in torch.cuda.get_rng_state_all()] if devices[1:] else [],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "cudnn": torch.backends.cudnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "global hooks": [
            len(getattr(hooks, f"_global{name}"))
            for name in (*HOOKS[:4], "_forward_hooks_always_called")
        ],
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what changed."""
    names = before.keys() | after.keys()
    return sorted(n for n in names if before.get(n, "absent") != after.get(n, "absent"))


@contextlib.contextmanager
def untouched(*owned: Any, grad: bool = True) -> Iterator[None]:
    """Fail if the body leaves a trace on what is owned, or on torch's state."""
    before = fingerprint(*owned, grad=grad)
    yield
    changed = differences(before, fingerprint(*owned, grad=grad))
    assert not changed, f"changed: {changed}"


def _marks(thing: Any, grad: bool, name: str = "") -> Iterator[tuple[str, Any]]:
    if torch.is_tensor(thing):
        yield f"{name} (tensor)", _tensor(thing)
        if grad and thing.is_leaf:
            yield f"{name}.grad", None if thing.grad is None else _tensor(thing.grad)
    elif isinstance(thing, nn.Module):
        for path, module in thing.named_modules():
            own = f"{name}.{path}"
            yield f"{own}.training", module.training
            yield f"{own} (hooks)", [len(getattr(module, h)) for h in HOOKS]
            for kind in ("_parameters", "_buffers"):
                for key, tensor in getattr(module, kind).items():
                    # a module must hold the same objects as before, not equal ones
                    yield f"{own}.{key} (identity)", id(tensor)
                    if tensor is not None:
                        yield from _marks(tensor, grad, f"{own}.{key}")
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from _marks(value, grad, f"{name}[{key!r}]")
    elif isinstance(thing, (list, tuple)):
        for i, value in enumerate(thing):
            yield from _marks(value, grad, f"{name}[{i}]")
    else:
        raise TypeError(f"no fingerprint of {type(thing)}")


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    hooks = getattr(tensor, "_backward_hooks", None)
    kind = tensor.dtype, tuple(tensor.shape), str(tensor.device), tensor.requires_grad
    return (*kind, _bytes(tensor), len(hooks or ()))


def _bytes(tensor: Tensor) -> bytes:
    """The bits, so that NaN equals itself and 0 is not −0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
