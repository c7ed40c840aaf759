"""Choices, held as they were: masks, orders and labels that a function makes on its way.

To a second derivative `x > 0` is a constant, and so are `x.argmax()` and `x.round()`. A difference
sees them change between its two points, as jumps over a small step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_grad._torch.graph import saved_tensors_are_seen
from implicit_grad._torch.pytree import Tensors

_WHOLE = (torch.bool, torch.int64, torch.int32)
_STEPS = {
    getattr(torch.ops.aten, name).default
    for name in ("sign", "heaviside", "floor", "ceil", "trunc", "round")
}


class SameChoices:
    """A function of φ, which in each call chooses what it chose in the first."""

    def __init__(self, function: Callable[[Tensors], Tensor]) -> None:
        self._function = function
        self._chosen: list[tuple[Any, Tensor]] | None = None
        self._left: list[tuple[Any, Tensor]] = []
        self._is_same = True

    def __call__(self, phi: Tensors) -> Tensor:
        """The function's value."""
        if self._chosen is None:
            self._chosen = []
            with _Choices(self._record):
                return self._function(phi)
        if self._chosen:
            self._left, self._is_same = self._chosen[::-1], True
            with _Choices(self._hold):
                value = self._function(phi)
            if self._is_same and not self._left:
                return value
        return self._function(phi)  # it does something else here than in the first call

    def _record(self, operation: Any, found: Tensor) -> None:
        assert self._chosen is not None
        self._chosen.append((operation, found.clone()))

    def _hold(self, operation: Any, found: Tensor) -> None:
        first, before = self._left.pop() if self._left else (None, found)
        self._is_same &= first is operation and before.shape == found.shape
        if self._is_same:
            found.copy_(before)


class _Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows what operations choose by numbers: whole numbers, truths and steps."""

    def __init__(self, see: Callable[[Any, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple) else (out,):
            if isinstance(found, Tensor) and (found.dtype in _WHOLE or func in _STEPS):
                # Of a checkpoint, the second forward is not seen here.
                if _is_choice(func, args) and not saved_tensors_are_seen():
                    self._see(func, found)
        return out


def _is_choice(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it goes by numbers, and what it returns is in a memory of its own.

    What is drawn is no choice, and those of pooling layers are in the graph (see `kinks`).
    """
    numbers = any(isinstance(a, Tensor) and a.dtype not in _WHOLE for a in args)
    own = all(result.alias_info is None for result in func._schema.returns)
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    return numbers and own and not drawn and "pool" not in func.__name__
