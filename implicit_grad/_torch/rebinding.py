"""Others in the place of tensors and modules that modules hold besides their parts."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Generator
from typing import Any

from torch import Tensor, nn

from implicit_grad._torch.held import PLAIN, can_hold_itself, parts_of, refill, shallow, with_parts
from implicit_grad._torch.weak import WEAK, referent, weakly_to

# What stands in the place of something, or it itself; and whether that is a parameter.
Put = Callable[[Any, bool], Any]


@dataclasses.dataclass(frozen=True)
class Hole:
    """Stands in the place of a tensor."""

    index: int


class Rebinding:
    """Values with put(x, False) in the place of each tensor x, and these modules in that of others.

    What is one in the values is one in what comes of them.
    """

    def __init__(self, modules: dict[int, nn.Module], put: Put) -> None:
        self._modules, self._put = modules, put
        self._done: dict[int, Any] = {}  # what came of what can be met again, or _UNDER_WAY
        self._met: list[Any] = []  # is kept alive, and their ids taken

    def rebound(self, value: Any) -> Any:
        """A value with others in it; itself if there are none, and it does not hold itself."""
        made, steps = self._step(value)
        under_way = [] if steps is None else [steps]
        while under_way:  # no recursion: a chain may have thousands of links
            try:
                under_way.append(under_way[-1].send(made))
                made = None
            except StopIteration as end:
                under_way.pop()
                made = end.value
        return made

    def _step(self, value: Any) -> tuple[Any, Steps | None]:
        """What comes of a value, or the steps to that."""
        if type(value) in WEAK:
            there = self._modules.get(id(referent(value)))
            return value if there is None else weakly_to(there, value), None
        if isinstance(value, (Tensor, Hole)):
            return self._put(value, False), None
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value), None
        if id(value) in self._done:
            return self._again(value), None
        parts = parts_of(value)
        return (None, self._with_others(value, parts)) if parts else (value, None)

    def _again(self, value: Any) -> Any:
        if self._done[id(value)] is _UNDER_WAY:
            self._done[id(value)] = shallow(value)  # to be filled below, where it was met first
        return self._done[id(value)]

    def _with_others(self, value: Any, parts: Collection[Any]) -> Steps:
        """Hand out the steps to what comes of a part, to be sent that."""
        done = self._done
        self._met.append(value)
        if can_hold_itself(value):
            done[id(value)] = _UNDER_WAY
        others = []
        for part in parts:
            other, steps = (part, None) if type(part) in PLAIN else self._step(part)
            others.append(other if steps is None else (yield steps))
        made = done.get(id(value), _UNDER_WAY)
        if made is not _UNDER_WAY:
            if can_hold_itself(value):
                refill(made, others)
            return made
        same = all(map(operator.is_, others, parts))
        done[id(value)] = value if same else with_parts(value, others)
        return done[id(value)]


Steps = Generator["Steps", Any, Any]
_UNDER_WAY = object()
