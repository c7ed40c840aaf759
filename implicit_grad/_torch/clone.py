"""A module's copy that computes with tensors of its own, as learn2learn's learners do."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

from implicit_grad._torch.held import (
    PLAIN,
    PLAIN_OR_NESTED,
    can_hold_itself,
    is_weak,
    parts_of,
    referent,
    refill,
    shallow,
    weakly_to,
    with_parts,
)

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
        rebinding.of(part)
    return made


def replace_kept(module: nn.Module, put: Put) -> None:
    """put(x, False) in the place of each tensor x that a module keeps besides its parameters."""
    rebinding = Rebinding({}, put)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = put(buffer, False)
        rebinding.of(part)


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
    if id(value) in seen or is_weak(value):
        return
    seen[id(value)] = value  # which is kept alive, and its id taken
    parts = () if isinstance(value, Tensor) else parts_of(value)
    if not parts:
        yield value
    for part in parts:
        yield from _ends(part, seen)


class Rebinding:
    """Puts others in the place of tensors and modules that modules hold besides their parts."""

    def __init__(self, modules: dict[int, nn.Module], put: Put) -> None:
        self._modules, self._put = modules, put
        self._done: dict[int, Any] = {}  # what came of what can be met again, or _UNDER_WAY
        self._met: list[Any] = []  # is kept alive, and their ids taken

    def of(self, part: nn.Module) -> None:
        held = vars(part)
        for name, value in list(held.items()):
            if name not in _OF_TORCH and type(value) not in PLAIN:
                held[name] = self.rebound(value)

    def rebound(self, value: Any) -> Any:
        """A value with others in it; itself if there are none, and it does not hold itself."""
        if is_weak(value):
            there = self._modules.get(id(referent(value)))
            return value if there is None else weakly_to(there, value)
        if isinstance(value, (Tensor, Hole)):
            return self._put(value, False)
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if id(value) in self._done:
            return self._again(value)
        parts = parts_of(value)
        return self._with_others(value, parts) if parts else value

    def _again(self, value: Any) -> Any:
        if self._done[id(value)] is _UNDER_WAY:
            self._done[id(value)] = shallow(value)  # to be filled below, where it was met first
        return self._done[id(value)]

    def _with_others(self, value: Any, parts: Collection[Any]) -> Any:
        done = self._done
        self._met.append(value)
        if can_hold_itself(value):
            done[id(value)] = _UNDER_WAY
        others = [self.rebound(part) for part in parts]
        made = done.get(id(value), _UNDER_WAY)
        if made is not _UNDER_WAY:
            if can_hold_itself(value):
                refill(made, others)
            return made
        same = all(map(operator.is_, others, parts))
        done[id(value)] = value if same else with_parts(value, others)
        return done[id(value)]


_UNDER_WAY = object()


def _copy_of(module: nn.Module, modules: dict[int, nn.Module], put: Put) -> nn.Module:
    """The one copy of a module; `modules` are those that are copied already."""
    if is_weak(module):
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
