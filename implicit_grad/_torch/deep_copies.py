"""Deep copies whose functions compute with what was copied beside them.

`copy.deepcopy` leaves functions as they are, and what they refer to. That may be a part of a module
that is copied after them. Only when all is done is it known what was copied, and what stays shared
because it is not part of that: so functions follow when they are first asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from implicit_grad._errors import describe
from implicit_grad._torch.bound import owner_of
from implicit_grad._torch.captured import captured_tensors
from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.held import PLAIN, fields_of, parts_of
from implicit_grad._torch.rebinding import Rebinding, Steps
from implicit_grad._torch.weak import WEAK
from implicit_grad._warnings import warn

Memo = dict[int, Any]
_settling = threading.RLock()


class Followed:
    """What keeps functions that follow its deep copies; its class is `opened`."""

    def __deepcopy__(self, memo: Memo) -> Followed:
        """A copy whose functions refer to the copies of what is copied with it."""
        kept = {name: getattr(self, name) for name in fields_of(self)}
        other = object.__new__(type(self))
        memo[id(self)] = memo[id(other)] = other  # that is it, in what is copied, too
        seen: Memo = {}
        waits = any(_waits(value, memo, seen) for value in kept.values())
        made = copy.deepcopy(vars(self), memo)
        late = {name: made.pop(name) for name in kept}
        vars(other).update(made)
        if waits:
            _Waiting.of(memo).add(other, late)
        else:  # keeping no memo, which would keep all that was copied
            _put(other, late, _Following(memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        fields_of(self)  # whose functions have followed then
        return vars(self)

    if not TYPE_CHECKING:  # which is to know of no other attributes

        def __getattr__(self, name: str) -> Any:
            """What a deep copy has once its functions have followed."""
            held = vars(self)
            late: _Late | None = held.get("_late")
            if late is not None and name in late.values:
                late.waiting.settle()
            if name in held:  # maybe since another thread asked
                return held[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclasses.dataclass(frozen=True)
class _Late:
    """What a copy has not got yet, as its functions are still the original's."""

    waiting: _Waiting
    values: dict[str, Any]


class _Waiting:
    """The copies of one `copy.deepcopy` whose functions are still to follow."""

    def __init__(self, memo: Memo) -> None:
        self._memo: Memo | None = memo
        self._copies: list[Followed] = []

    @classmethod
    def of(cls, memo: Memo) -> _Waiting:
        """Those of this memo, in which they are kept by a key that nothing copied has."""
        found: _Waiting | None = memo.get(id(cls))
        if found is None or found._memo is None:
            memo[id(cls)] = found = cls(memo)
        return found

    def add(self, other: Followed, late: dict[str, Any]) -> None:
        self._copies.append(other)
        vars(other)["_late"] = _Late(self, late)

    def settle(self) -> None:
        with _settling:
            if self._memo is None:
                return
            following = _Following(self._memo)
            for other in self._copies:
                _put(other, vars(other)["_late"].values, following)
                del vars(other)["_late"]
            self._memo, self._copies = None, []
        following.tell()


def _put(other: Followed, late: dict[str, Any], following: _Following) -> None:
    vars(other).update({name: following.rebound(value) for name, value in late.items()})


class _Following(Rebinding):
    """Puts copies in the place of what functions refer to, as a memo has them."""

    def __init__(self, memo: Memo) -> None:
        super().__init__(memo, lambda tensor, _: tensor)
        self._memo = memo
        self._others: list[Any] = []  # that are not looked into, or tensors that were not copied

    def _step(self, value: Any) -> tuple[Any, Steps | None]:
        copied = self._memo.get(id(value), value)
        if isinstance(copied, Followed) and id(value) in self._memo:
            return copied, None  # whose functions follow as well
        if isinstance(copied, Tensor) and copied is value:
            copied = self._view_of_copied(value)
            if copied is value:
                self._others.append(value)
        elif _is_other(copied):
            self._others.append(copied)
        return super()._step(copied)

    @functools.cached_property
    def _memory(self) -> dict[int | None, Tensor]:
        """Where the tensors lie that were copied."""
        kept = self._memo.get(id(self._memo), ())  # alive, by `copy`, until all is copied
        tensors = (v for v in kept if isinstance(v, Tensor) and id(v) in self._memo)
        return {_address(tensor): tensor for tensor in tensors}

    def _view_of_copied(self, tensor: Tensor) -> Tensor:
        """The same part of a copy, if the tensor is part of a tensor that was copied, else itself.

        Tensors with a graph stay, as that of the original is in it.
        """
        address = _address(tensor)
        if address is None or tensor.requires_grad or address not in self._memory:
            return tensor
        original = self._memory[address]
        copied: Tensor = self._memo[id(original)]
        if copied.stride() != original.stride() or copied.dtype != tensor.dtype:
            return tensor
        start = copied.storage_offset() + tensor.storage_offset() - original.storage_offset()
        try:
            return copied.detach().as_strided(tensor.shape, tensor.stride(), start)
        except RuntimeError:  # of a tensor that was itself a part
            return tensor

    def tell(self) -> None:
        """Warn of objects and tensors that refer to what was copied, and not to the copy."""
        memory = self._memory.keys() - {None}
        for thing in self._others:
            for name, tensor in captured_tensors(thing):
                if id(tensor) in self._memo:
                    holds = f"holds {describe(tensor)} of what was copied, as {name}, and"
                    cure = (
                        "Let what is copied keep that object, too, or make its class a dataclass; "
                        "or take a list in the place of an iterator"
                    )
                elif not memory.isdisjoint(map(_address, (tensor, *leaves_behind([tensor])))):
                    holds = "is or holds what was made of a tensor that was copied, and"
                    cure = "Let the function make it"
                else:
                    continue
                warn(
                    "the copy of a solver that copy.deepcopy made may compute with the original: "
                    f"{describe(thing)}, to which its functions refer, {holds} was not copied. "
                    f"{cure}",
                    anchor="holds-the-original",
                )
                break


def _address(tensor: Tensor) -> int | None:
    """Where its memory is, which it may share with others; None if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse ones, those of transforms
        return None


def _is_other(value: Any) -> bool:
    if type(value) in PLAIN or type(value) in WEAK:
        return False
    return not isinstance(value, (*_NEVER_COPIED, *_LOOKED_INTO)) and not parts_of(value)


_IN_C = (types.BuiltinFunctionType, types.MethodWrapperType)
_LOOKED_INTO = (Tensor, nn.Module, Followed, types.FunctionType, *_IN_C)
_PASSED = (types.FunctionType, types.MethodType, *_IN_C, functools.partial, tuple, frozenset)
_NEVER_COPIED = (type, types.ModuleType)


def _waits(value: Any, memo: Memo, seen: Memo, referred_to: bool = False) -> bool:
    """Whether functions in it may refer to what is copied, or completed, only later."""
    if type(value) in PLAIN or id(value) in seen:
        return False
    seen[id(value)] = value  # which is kept alive, and its id taken
    if type(value) in WEAK:
        return referred_to
    if isinstance(value, _NEVER_COPIED):
        return False
    if isinstance(value, (Tensor, nn.Module, Followed)):
        return referred_to and id(value) not in memo
    parts = parts_of(value)
    if not isinstance(value, _PASSED):
        held = getattr(value, "__dict__", {}).values()
        if referred_to or (id(value) in memo if parts else any(map(_is_function, held))):
            return True
    referred_to = referred_to or _is_function(value)
    return any(_waits(part, memo, seen, referred_to) for part in parts)


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType) or owner_of(value) is not None
