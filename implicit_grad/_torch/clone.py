"""A module's copy that computes with tensors of its own, as learn2learn's learners do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from implicit_grad._torch.held import PLAIN, PLAIN_OR_NESTED, parts_of
from implicit_grad._torch.rebinding import Put, Rebinding
from implicit_grad._torch.weak import WEAK, referent, weakly_to

# Torch's own part of a module, in which a copy finds what is its own already.
_OF_TORCH = frozenset((*vars(nn.Module()), "_flat_weights"))


def cloned(module: nn.Module) -> nn.Module:
    """A copy of a module, with copies of its parameters that pass their gradients on to them.

    What is one in the module is one in the copy: a submodule under two names, a tensor in two
    places. Buffers stay the module's, so that it collects BatchNorm's statistics, unless they
    require grad. Attributes and hooks are shared, too, but for lists, functions and the like that
    hold its parts. (`copy.deepcopy` would cut the graph, and fail on whatever has one;
    `functional_call` leaves fast weights in a submodule that has two names.)
    """
    tensors: dict[int, Tensor] = {}

    def put(tensor: Tensor, is_parameter: bool) -> Tensor:
        if not is_parameter and not tensor.requires_grad:
            return tensor
        if id(tensor) not in tensors:
            tensors[id(tensor)] = tensor.clone()
        return tensors[id(tensor)]

    return copied(module, put, lambda tensor, _: tensor)


def copied(module: nn.Module, put: Put, put_kept: Put | None = None) -> nn.Module:
    """A copy of a module whose parts are copies, with put(x, is_parameter) in the place of each x.

    The xs are its parameters and buffers, or what another copy was given in their places. Of what
    it holds otherwise, containers, records and functions among them, tensors are what `put_kept`
    makes of them (by default, as `put` does), and modules are the copies, as `copy.deepcopy` would
    have it: parts in lists, bound methods.
    """
    modules: dict[int, nn.Module] = {}
    made = _copy_of(module, modules, put)
    rebinding = Rebinding(modules, put_kept or put)
    for part in modules.values():
        _rebind(part, rebinding)
    return made


def replace_kept(module: nn.Module, put: Put) -> None:
    """put(x, False) in the place of each tensor x that a module keeps besides its parameters."""
    rebinding = Rebinding({}, put)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = put(buffer, False)
        _rebind(part, rebinding)


def _rebind(part: nn.Module, rebinding: Rebinding) -> None:
    """Let a module hold what comes of what it holds besides its parts."""
    held = vars(part)
    for name, value in list(held.items()):
        if name not in _OF_TORCH and type(value) not in PLAIN:
            held[name] = rebinding.rebound(value)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What it keeps besides parameters: buffers and attributes, in containers and records too."""
    return ((name, thing) for name, thing in _kept(module) if isinstance(thing, Tensor))


def kept_objects(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What it keeps besides tensors and modules that is not looked into."""
    for name, thing in _kept(module):
        if type(thing) not in PLAIN_OR_NESTED and not isinstance(thing, (Tensor, nn.Module, type)):
            yield name, thing


def _kept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What it holds besides parameters, with what that holds in the place of all looked into."""
    seen: dict[int, Any] = {}
    for prefix, part in module.named_modules():
        held = ((k, v) for k, v in vars(part).items() if k not in _OF_TORCH)
        for name, value in (*part._buffers.items(), *held):
            if type(value) not in PLAIN:
                label = f"{prefix}.{name}" if prefix else name
                yield from ((label, thing) for thing in _ends(value, seen))


def _ends(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    pending = [value]
    while pending:
        value = pending.pop()
        if id(value) in seen or type(value) in WEAK:
            continue
        seen[id(value)] = value  # which is kept alive, and its id taken
        parts = () if isinstance(value, Tensor) else parts_of(value)
        if not parts:
            yield value
        pending += [part for part in parts if type(part) not in PLAIN][::-1]


def _copy_of(module: nn.Module, modules: dict[int, nn.Module], put: Put) -> nn.Module:
    """The one copy of a module; `modules` are those that are copied already."""
    if type(module) in WEAK:
        return weakly_to(_copy_of(referent(module), modules, put), module)  # type: ignore[no-any-return]
    if id(module) in modules:
        return modules[id(module)]
    modules[id(module)] = made = object.__new__(type(module))
    own = vars(made)
    own.update(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        own[kind] = own[kind].copy()
    for held in (made._parameters, made._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                held[name] = put(tensor, held is made._parameters)
    for name, part in module._modules.items():
        if part is not None:
            made._modules[name] = _copy_of(part, modules, put)
    _complete(made)
    return made


def _complete(made: nn.Module) -> None:
    """Let nothing that a copy holds besides its tensors compute with those of the original.

    What is compiled has no second derivative anyway.
    """
    vars(made).pop("_compiled_call_impl", None)  # of module.compile()
    compiled = made._modules.get("_orig_mod")
    if compiled is not None and "forward" in vars(made):  # what torch.compile(module) returns
        vars(made)["forward"] = compiled.__call__
    if isinstance(made, nn.RNNBase):
        refresh_recurrent(made)


def refresh_recurrent(layer: nn.RNNBase) -> None:
    """Make the second list that a recurrent layer keeps of its weights that of its present ones."""
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
