"""A module's copy that computes with tensors of its own, as learn2learn's learners do."""

from __future__ import annotations

import dataclasses
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

# What stands in the place of something, or it itself; and whether that is a parameter.
Put = Callable[[Any, bool], Any]
# Torch's own part of a module, in which a copy finds what is its own already.
_OF_TORCH = frozenset((*vars(nn.Module()), "_flat_weights"))


@dataclasses.dataclass(frozen=True)
class Hole:
    """Stands in the place of a tensor."""

    index: int


def cloned(module: nn.Module) -> nn.Module:
    """A copy of a module, with copies of its parameters that pass their gradients on to them.

    What is one in the module is one in the copy: a submodule under two names, a tensor in two
    places. Buffers stay the module's, so that it collects BatchNorm's statistics, unless they
    require grad. Attributes and hooks are shared, too. (`copy.deepcopy` would cut the graph, and
    fail on whatever has one; `functional_call` leaves fast weights in a submodule that has two
    names.)
    """
    tensors: dict[int, Tensor] = {}

    def put(tensor: Tensor, is_parameter: bool) -> Tensor:
        if not is_parameter and not tensor.requires_grad:
            return tensor
        if id(tensor) not in tensors:
            tensors[id(tensor)] = tensor.clone()
        return tensors[id(tensor)]

    return copied(module, put)


def copied(module: nn.Module, put: Put, rebind: bool = False) -> nn.Module:
    """A copy of a module whose parts are copies, with put(x, is_parameter) in the place of each x.

    The xs are its parameters and buffers, or what another copy was given in their places. With
    `rebind`, what it holds otherwise is put and copied too, in plain lists and dicts as well: parts
    (a list of layers, a bound method), as `copy.deepcopy` would have it, and tensors.
    """
    modules: dict[int, nn.Module] = {}
    copy = _copy_of(module, modules, put)
    for part in modules.values() if rebind else ():
        _rebind(part, modules, put)
    return copy


def replace_kept(module: nn.Module, put: Put) -> None:
    """put(x, False) in the place of each tensor x that a module keeps besides its parameters."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = put(buffer, False)
        _rebind(part, {}, put)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What it keeps besides parameters: buffers and attributes, in plain lists and dicts too."""
    for prefix, part in module.named_modules():
        held = ((k, v) for k, v in vars(part).items() if k not in _OF_TORCH)
        for name, value in (*part._buffers.items(), *held):
            if isinstance(value, (Tensor, list, tuple, dict)):
                for tensor in _tensors_in(value):
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in _held_by(value):
        yield from _tensors_in(part)


_DICTS = (dict, OrderedDict)
_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))


def _held_by(value: Any) -> Collection[Any]:
    """What a plain list or dict holds; nothing if that is numbers and strings, maybe very many."""
    if type(value) in _DICTS:
        value = value.values()
    elif not _is_list(value):
        return ()
    return () if _PLAIN.issuperset(map(type, value)) else value


def _is_list(value: Any) -> bool:
    """Whether it is a plain list, a tuple or a named tuple."""
    return type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_make"))


def _rebind(part: nn.Module, modules: dict[int, nn.Module], put: Put) -> None:
    held = vars(part)
    for name, value in list(held.items()):
        if name not in _OF_TORCH:
            held[name] = _rebound(value, modules, put)


def _rebound(value: Any, modules: dict[int, nn.Module], put: Put) -> Any:
    """A value with others in the place of modules and tensors in it; itself if there is none."""
    if isinstance(value, (Tensor, Hole)):
        return put(value, False)
    if isinstance(value, nn.Module):
        return modules.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in modules:
        return types.MethodType(value.__func__, modules[id(value.__self__)])
    held = _held_by(value)
    parts = [_rebound(part, modules, put) for part in held]
    if all(map(operator.is_, parts, held)):
        return value
    if type(value) in _DICTS:
        return type(value)(zip(value, parts, strict=True))
    return type(value)(parts) if type(value) in (list, tuple) else value._make(parts)


def _copy_of(module: nn.Module, modules: dict[int, nn.Module], put: Put) -> nn.Module:
    """The one copy of a module; `modules` are those that are copied already."""
    if id(module) in modules:
        return modules[id(module)]
    modules[id(module)] = copy = object.__new__(type(module))
    own = vars(copy)
    own.update(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        own[kind] = own[kind].copy()
    for held in (copy._parameters, copy._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                held[name] = put(tensor, held is copy._parameters)
    for name, part in module._modules.items():
        if part is not None:
            copy._modules[name] = _copy_of(part, modules, put)
    _complete(copy)
    return copy


def _complete(copy: nn.Module) -> None:
    """Let nothing that a copy holds besides its tensors compute with those of the original.

    What is compiled has no second derivative anyway.
    """
    vars(copy).pop("_compiled_call_impl", None)  # of module.compile()
    compiled = copy._modules.get("_orig_mod")
    if compiled is not None and "forward" in vars(copy):  # what torch.compile(module) returns
        vars(copy)["forward"] = compiled.__call__
    if isinstance(copy, nn.RNNBase):
        refresh_recurrent(copy)


def refresh_recurrent(layer: nn.RNNBase) -> None:
    """Make the second list that a recurrent layer keeps of its weights that of its present ones."""
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
