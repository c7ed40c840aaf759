"""Where a module's tensors live: the places that hold them, found by identity and filled anew."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Generator, Tensor, nn

from implicit_grad._torch.clone import refresh_recurrent
from implicit_grad._torch.pytree import Tensors


def named_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters, but for integers (a quantised base), which cannot be adapted."""
    return [
        (name, p)
        for name, p in module.named_parameters()
        if p.is_floating_point() or p.is_complex()
    ]


_ID_OF_NONE = {id(None)}


def _ids(held: Iterable[dict[str, Any]]) -> Iterator[int]:
    """The identities of what dicts hold, in order; no Python code runs for each."""
    return map(id, itertools.chain.from_iterable(map(dict.values, held)))


def names_in(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parts and parameters, not of those in its parts."""
    return (*module._modules, *module._parameters)


def _places(module: nn.Module, *kinds: str) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every place of these kinds, in a module and in those in it, and the tensor that it holds."""
    for owner in module.modules():
        for kind in kinds:
            held = getattr(owner, kind)
            for name, tensor in held.items():
                if tensor is not None:
                    yield held, name, tensor


class Layout:
    """The parts of a module and the parameters in them; to look again costs a few microseconds."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._root = module
        self._children = [part._modules for part in parts]
        self._parameters = [part._parameters for part in parts]
        self._then = self._parts()

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module has the parts that it had."""
        return module is self._root and self._parts() == self._then

    def ids(self) -> set[int]:
        """The identities of the parameters that are there now."""
        return set(_ids(self._parameters)) - _ID_OF_NONE

    def _parts(self) -> list[int]:
        return list(_ids(self._children))


def with_part(whole: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """A shallow copy of a module with another part of that name."""
    other = copy.copy(whole)
    other._modules = {**whole._modules, name: part}
    return other


@contextlib.contextmanager
def attributes_put_back(module: nn.Module) -> Iterator[None]:
    """What a module keeps in plain attributes is afterwards what it was.

    Calls inside may replace it; tensors they may write to, generators they may draw from.
    """
    before = [(vars(part), dict(vars(part))) for part in module.modules()]
    drawn = [
        (v, v.get_state()) for _, kept in before for v in kept.values() if isinstance(v, Generator)
    ]
    for held, kept in before:
        held.update({k: v.detach().clone() for k, v in kept.items() if isinstance(v, Tensor)})
    try:
        yield
    finally:
        for held, kept in before:
            held.clear()
            held.update(kept)
        for generator, state in drawn:
            generator.set_state(state)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call runs hooks of the user's after it, which may count or keep what they see."""
    return any(m._forward_hooks for m in module.modules())


class Places:
    """Every place of a module, and of the modules in it, that holds one of some parameters.

    One tensor may stand under several names, in several modules (learn2learn's clones). With
    `anywhere`, they may be buffers and plain attributes, too.
    """

    def __init__(
        self, module: nn.Module, parameters: Iterable[Tensor], anywhere: bool = False
    ) -> None:
        index = {id(p): i for i, p in enumerate(parameters)}
        kinds = ("_parameters", "_buffers", "__dict__") if anywhere else ("_parameters",)
        self._places = [
            (held, name, index[id(p)])
            for held, name, p in _places(module, *kinds)
            if id(p) in index
        ]
        self._recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]

    @property
    def recurrent(self) -> bool:
        """Whether there are recurrent layers, which keep a second list of their weights."""
        return bool(self._recurrent)

    def fill(self, tensors: Tensors) -> None:
        """Put the tensors into the places of the parameters, as they are (not `Parameter`s)."""
        for held, name, i in self._places:
            held[name] = tensors[i]
        for layer in self._recurrent:
            refresh_recurrent(layer)


class Contents:
    """All tensors of a module and of the modules in it, each once, and the places that hold it."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, int]] = []
        index: dict[int, int] = {}
        for held, name, tensor in _places(module, "_parameters", "_buffers"):
            if id(tensor) not in index:
                index[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            self._places.append((held, name, index[id(tensor)]))

    @contextlib.contextmanager
    def replaced_by(self, tensors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Others in their places; yields what is found there in the end that was put there since.

        That are buffers which are assigned, and not written into.
        """
        assigned: dict[int, Tensor] = {}
        for held, name, i in self._places:
            held[name] = tensors[i]
        try:
            yield assigned
        finally:
            for held, name, i in self._places:
                if held[name] is not tensors[i] and held[name] is not None:
                    assigned[i] = held[name]
                held[name] = self.tensors[i]

    def put(self, index: int, tensor: Tensor) -> None:
        """A tensor in the places of that one."""
        for held, name, i in self._places:
            if i == index:
                held[name] = tensor


def replace_buffers(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of each buffer; one that two modules share stays one."""
    replaced: dict[int, Tensor] = {}
    for held, name, buffer in list(_places(module, "_buffers")):
        if id(buffer) not in replaced:
            replaced[id(buffer)] = replace(buffer)
        held[name] = replaced[id(buffer)]
