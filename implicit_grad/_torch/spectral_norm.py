"""Spectral norms in training mode: weights over a norm whose directions each evaluation turns.

The norm is uᵀWv, and torch holds u and v constant. They are right, and so is its gradient, where
power iterations, one a call, have found them; how they turn with W is lacking in a second one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


@contextlib.contextmanager
def turned() -> Iterator[list[Tensor]]:
    """Yields what is filled: the weights whose directions are turned by what runs inside."""
    thread, found = threading.get_ident(), list[Tensor]()

    def look(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and module.training:
            if isinstance(module, _SpectralNorm):
                found.extend(args if module._buffers else ())  # a vector needs no iteration
            names = (h.name for h in module._forward_pre_hooks.values() if type(h) is SpectralNorm)
            found.extend(getattr(module, f"{name}_orig") for name in names)

    hook = register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()
