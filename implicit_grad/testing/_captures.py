"""Tensors that functions hold without being passed them: closures, modules, defaults, partials."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from implicit_grad import _tree

_DEPTH = 5


def captured_tensors(*functions: object) -> list[tuple[str, Tensor]]:
    """The distinct tensors behind functions, each with the name under which it is held."""
    seen: set[int] = set()
    return [found for function in functions for found in _walk(function, "", seen, _DEPTH)]


def _walk(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or depth < 0 or inspect.isclass(value) or inspect.ismodule(value):
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, torch.nn.Module):
        for label, parameter in value.named_parameters():
            yield from _walk(parameter, _joined(name, label), seen, depth)
    elif isinstance(value, (list, tuple, dict)):
        for label, leaf in zip(_tree.names(value, name), _tree.leaves(value), strict=True):
            yield from _walk(leaf, label, seen, depth - 1)
    else:
        for label, part in _parts(value):
            yield from _walk(part, _joined(name, label), seen, depth - 1)


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a function, method, partial or wrapper holds."""
    if isinstance(value, functools.partial):
        yield "", value.func
        yield "args", value.args
        yield from value.keywords.items()
    elif inspect.ismethod(value):
        yield "", value.__func__
        yield "", value.__self__
    elif inspect.isfunction(value):
        try:
            held = inspect.getclosurevars(value)
        except ValueError:  # a variable that has no value yet
            return
        yield from held.nonlocals.items()
        yield from ((k, v) for k, v in held.globals.items() if _may_hold(v))
        yield "defaults", value.__defaults__ or ()
        yield "", getattr(value, "__wrapped__", None)
    elif hasattr(value, "__dict__") and not inspect.isbuiltin(value):
        yield from vars(value).items()


def _may_hold(value: Any) -> bool:
    """Whether a global is worth a look: a tensor or a module, not the rest of the program."""
    return torch.is_tensor(value) or isinstance(value, torch.nn.Module) or inspect.isfunction(value)
