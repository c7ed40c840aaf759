"""Where a module's tensors live: the places that hold them, found by identity and filled anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from implicit_grad._torch.pytree import Tensors


def named_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters, but for integers (a quantised base), which cannot be adapted."""
    return [
        (name, p)
        for name, p in module.named_parameters()
        if p.is_floating_point() or p.is_complex()
    ]


def with_module(learner: nn.Module, module: nn.Module) -> nn.Module:
    """A shallow copy of a learner around another `module`."""
    other = copy.copy(learner)
    other._modules = {**learner._modules, "module": module}
    return other


class Places:
    """Every place of a module, and of the modules in it, that holds one of some parameters.

    One tensor may stand under several names, in several modules (learn2learn's clones).
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor]) -> None:
        index = {id(p): i for i, p in enumerate(parameters)}
        self._places = [
            (owner._parameters, name, index[id(p)])
            for owner in module.modules()
            for name, p in owner._parameters.items()
            if p is not None and id(p) in index
        ]
        self._recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]

    @property
    def recurrent(self) -> bool:
        """Whether there are recurrent layers, which keep a second list of their weights."""
        return bool(self._recurrent)

    def fill(self, tensors: Tensors) -> None:
        """Put the tensors into the places of the parameters, as they are (not `Parameter`s)."""
        for parameters, name, i in self._places:
            parameters[name] = tensors[i]  # type: ignore[assignment]  # as learn2learn does
        for rnn in self._recurrent:
            rnn._flat_weights = [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def eager(clone: nn.Module) -> nn.Module:
    """A module's clone, without the compiled calls of `module.compile()`, which are the module's.

    What is compiled has no second derivative anyway.
    """
    for part in clone.modules():
        if part._compiled_call_impl is not None:
            part._compiled_call_impl = None
    return clone


def replace_buffers(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of each buffer; one that two modules share stays one."""
    replaced: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                if id(buffer) not in replaced:
                    replaced[id(buffer)] = replace(buffer)
                owner._buffers[name] = replaced[id(buffer)]


def set_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Put a tensor in the place of the buffer of that dotted name."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._buffers[last] = buffer
