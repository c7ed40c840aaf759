"""Where the last call of a wrapped solver ended, for the next one to start from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from implicit_grad._conditions.base import Call
from implicit_grad._conditions.proximal_term import ProximalObjective
from implicit_grad._linear_solvers.warm_start import Slot
from implicit_grad._torch import pytree
from implicit_grad._torch.clone import kept_tensors, replace_kept
from implicit_grad._torch.module_form import mark_of
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._torch.transforms import is_transformed
from implicit_grad._wrapper.solver_output import common

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def asks_for_start(solver: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `start`."""
    try:
        parameter = inspect.signature(solver).parameters.get("start")
    except (TypeError, ValueError):  # of code that is not Python's
        return False
    return parameter is not None and parameter.kind in _KEYWORD


@dataclasses.dataclass(frozen=True)
class Ended:
    """φ of a call, in tensors that nobody else holds.

    `tree` is its container, where a function gets it again: it may hold a module's frozen part.
    """

    phi: Tensors
    names: list[str]
    slots: list[int | None]
    place: tuple[torch.dtype, torch.device]  # of the arguments
    tree: Tree | None

    def in_form_of(self, init: Any) -> Any | None:
        """A copy of φ in the container `init`, if it could be that, tensor by tensor."""
        tensors, tree = pytree.unknowns(init)
        forms = [[(t.shape, t.dtype, t.device) for t in ts] for ts in (tensors, self.phi)]
        if forms[0] != forms[1] or tree.slots != self.slots:
            return None
        if pytree.names(init, "phi") != self.names:
            return None
        return tree.rebuild(self._copies(), owned=True)

    def again(self) -> Any:
        """A copy of φ as it was returned."""
        assert self.tree is not None
        return self.tree.rebuild(self._copies(), owned=True)

    def _copies(self) -> Tensors:
        return tuple(t.clone() for t in self.phi)


class WarmCall:
    """One call that starts where the last one with its key ended, and what that brought.

    Attributes:
        started: whether it did; None if the solver is a function that does not ask.
        evaluations: of the objective or residual, by a solver that is handed it.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._end: Ended | None = slot.end()
        self._returns_container = False
        self.started: bool | None = None
        self.evaluations: int | None = None

    def init(self, init: Any) -> Any:
        """Where a minimiser or a root finder starts: φ, if it is of the form of `init`."""
        found = None if self._end is None else self._end.in_form_of(init)
        self.started = found is not None
        return init if found is None else found

    def start(self, call: Call, like: Any | None) -> Any | None:
        """What a function is handed as `start`; `like` is what φ is known to look like."""
        self._returns_container, end = True, self._end
        found = None
        if end is not None and end.tree is not None and end.place == _place(call):
            found = end.again() if like is None or end.in_form_of(like) is not None else None
            _put_arguments(call, pytree.modules(found))
        self.started = found is not None
        return found

    def counted(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The function of φ, with its evaluations counted."""
        self.evaluations = 0
        if isinstance(function, ProximalObjective):  # which our minimisers take apart
            return dataclasses.replace(function, loss=self._counting(function.loss))
        return self._counting(function)

    def _counting(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counting(phi: Any) -> Any:
            assert self.evaluations is not None
            self.evaluations += 1
            return function(phi)

        return counting

    def keep(self, phi: Tensors, tree: Tree, call: Call) -> None:
        """Let the next call start here."""
        if self.started is None or is_transformed(phi):
            return
        kept = tuple(t.detach().clone() for t in phi)
        names = pytree.names(tree.rebuild(kept, owned=True), "phi")
        whole = tree if self._returns_container else None
        self._slot.put_end(Ended(kept, names, tree.slots, _place(call), whole))


def _put_arguments(call: Call, modules: Sequence[nn.Module]) -> None:
    """Let modules that kept arguments of the last call keep those of this one."""
    if not modules:
        return
    kept = (t for m in pytree.modules((call.args, call.kwargs)) for _, t in kept_tensors(m))
    plain = (t for t in pytree.leaves((call.args, call.kwargs)) if torch.is_tensor(t))
    now = {mark[1]: t for t in (*kept, *plain) if (mark := mark_of(t)) is not None}

    def put(x: Any, is_parameter: bool) -> Any:
        mark = mark_of(x)
        new = x if mark is None else now.get(mark[1], x)
        return new if new.shape == x.shape else x

    for module in modules:
        replace_kept(module, put)


def _place(call: Call) -> tuple[torch.dtype, torch.device]:
    return common([t for t in pytree.leaves((call.args, call.kwargs)) if torch.is_tensor(t)])
