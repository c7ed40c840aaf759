"""A module's copy that computes with tensors of its own, as learn2learn's learners do."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


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


def copied(module: nn.Module, put: Callable[[Any, bool], Any], rebind: bool = False) -> nn.Module:
    """A copy of a module whose parts are copies, with put(x, is_parameter) in the place of each x.

    The xs are its parameters and buffers, or what another copy was given in their places. With
    `rebind`, what it holds of its own parts otherwise (a plain list of layers, a bound method) is
    of the copies too, as `copy.deepcopy` would have it.
    """
    modules: dict[int, nn.Module] = {}
    copy = _copy_of(module, modules, put)
    for part in modules.values() if rebind else ():
        held = vars(part)
        held.update({k: _rebound(v, modules) for k, v in held.items() if not k.startswith("_")})
    return copy


def _rebound(value: Any, modules: dict[int, nn.Module]) -> Any:
    """A value with copies in the place of modules in it; the same object if there is none."""
    if isinstance(value, nn.Module):
        return modules.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in modules:
        return types.MethodType(value.__func__, modules[id(value.__self__)])
    if type(value) in (list, tuple):
        parts = [_rebound(v, modules) for v in value]
        changed = any(a is not b for a, b in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value
    if type(value) is dict:
        named = {k: _rebound(v, modules) for k, v in value.items()}
        return named if any(named[k] is not v for k, v in value.items()) else value
    return value


def _copy_of(
    module: nn.Module, modules: dict[int, nn.Module], put: Callable[[Any, bool], Any]
) -> nn.Module:
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
