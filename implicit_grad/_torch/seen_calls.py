"""Outputs of a module's calls, as they are made: tensors that a loss may be taken to depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._torch import pytree
from implicit_grad._torch.clone import refresh_recurrent
from implicit_grad._torch.graph import walk
from implicit_grad._torch.module_form import trained
from implicit_grad._torch.pytree import Tensors


class SeenCalls:
    """A copy of a container with modules, whose calls of them, and of parts of them, are seen.

    In a call, modules compute with φ itself; what is read off them otherwise (a penalty on their
    weights) are views of φ. So a value's graph tells the two ways apart.

    Attributes:
        container: the copy.
    """

    def __init__(self, container: Any) -> None:
        self.phi, tree = pytree.flatten(container)
        self.read: Tensors = tuple(t.view_as(t) for t in self.phi)
        self.container = tree.rebuild(self.read, owned=True)
        self._outputs: list[Tensor] = []
        self._depth = 0
        modules = pytree.modules(self.container)
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._swap = _Swap(list(parts), self.phi, self.read)
        for part in parts:
            if trained(part):
                part.register_forward_pre_hook(self._enter, prepend=True)
                part.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth == 0:
            self._swap.to(self.phi)
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth:
            return output
        self._swap.to(self.read)
        tensors, tree = pytree.flatten(output, lambda t: torch.is_tensor(t) and t.requires_grad)
        outputs = tuple(t.view_as(t) for t in tensors)
        self._outputs += outputs
        return tree.rebuild(outputs)

    def behind(self, value: Tensor) -> tuple[Tensors, Tensors]:
        """What the value is a function of: outputs of calls, and tensors of φ that are read.

        Of outputs that are made of each other, the value may see the last ones only.

        Raises:
            ValueError: it is no such function, for the reason given.
        """
        gates = {t.grad_fn: t for t in (*self._outputs, *self.read)}
        visited = list(walk([value], lambda node: node in gates))
        found = [node for node in visited if node in gates]
        if any(self._is_phi(node) for node in visited):
            raise ValueError(
                "depends on its parameters otherwise than through outputs of its calls (through "
                "what a call left as an attribute, or noted elsewhere?)"
            )
        for gate in found:
            behind = walk(parent for parent, _ in gate.next_functions)
            if not set(found).isdisjoint(behind):
                raise ValueError(
                    "depends on an output of one of its calls, or on a parameter, in two ways: "
                    "directly, and through another call's output"
                )
        read = {id(t) for t in self.read}
        tensors = [gates[node] for node in found]
        outputs = tuple(t for t in tensors if id(t) not in read)
        return outputs, tuple(t for t in tensors if id(t) in read)

    def _is_phi(self, node: Any) -> bool:
        """Whether a node of the graph made, or is, a tensor of φ."""
        leaf = getattr(node, "variable", None)
        return any(leaf is p if p.grad_fn is None else node is p.grad_fn for p in self.phi)


class _Swap:
    """The places where modules hold tensors of φ, between φ and its views."""

    def __init__(self, parts: Sequence[nn.Module], phi: Tensors, read: Tensors) -> None:
        index = {id(t): i for i, t in enumerate(read)}
        self._ours = {id(t) for t in (*phi, *read)}
        self._places = [
            (part._parameters, name, index[id(t)])
            for part in parts
            for name, t in part._parameters.items()
            if id(t) in index
        ]
        self._recurrent = [part for part in parts if isinstance(part, nn.RNNBase)]

    def to(self, tensors: Tensors) -> None:
        """Put these there, but where somebody put others (`functional_call`)."""
        for held, name, i in self._places:
            if id(held[name]) in self._ours:
                held[name] = tensors[i]  # type: ignore[assignment]
        for layer in self._recurrent:
            refresh_recurrent(layer)
