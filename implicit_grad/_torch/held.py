"""What containers and records hold, and copies of them that hold other things in those places."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, KeysView, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from implicit_grad._torch.bound import bound_to, owner_of

T = TypeVar("T")
PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
PLAIN_OR_NESTED = PLAIN | {list, tuple, dict, set, frozenset}
_LEVELS = 4


def parts_of(value: Any) -> Collection[Any]:
    """What it holds, if it is looked into; nothing if that is numbers and strings, maybe many.

    Looked into are lists, tuples, deques, sets, dicts, their keys too, dataclasses, namespaces,
    partial functions, what functions refer to of those around them or have as defaults, the objects
    of bound methods, and solvers that `implicit` made.
    """
    if _is_tuple(value) or isinstance(value, (list, deque, set, frozenset)):
        pass
    elif isinstance(value, dict):
        value = (*value.keys(), *value.values())
    elif isinstance(value, functools.partial):
        value = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        value = (value.__self__,)
    elif (owner := owner_of(value)) is not None:
        value = (owner,)
    elif isinstance(value, types.FunctionType):
        around = [cell.cell_contents for cell in _cells(value)]
        value = [*around, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif is_opened(type(value)):
        value = [getattr(value, name) for name in fields_of(value)]
    else:
        return ()
    return () if _are_plain(value) else value


def _are_plain(values: Collection[Any]) -> bool:
    """Whether these, and what containers among them hold, are numbers and strings.

    There may be very many, so no Python code runs for each. Where lists hold each other, all ways
    through them are far more than they are: then it is not known, and they are looked into.
    """
    most = 16 * len(values) + 1000
    for _ in range(_LEVELS):
        kinds = set(map(type, values))
        if kinds <= PLAIN:
            return True
        if not kinds <= PLAIN_OR_NESTED:
            return False
        if kinds & PLAIN:
            values = [value for value in values if type(value) not in PLAIN]
        if sum(map(len, values)) > most:
            return False
        by_key = [value.values() for value in values if type(value) is dict]
        values = list(itertools.chain.from_iterable((*values, *by_key)))
    return False


def can_hold_itself(value: Any) -> bool:
    """Whether what is looked into is made first, and filled then."""
    kinds = tuple, frozenset, functools.partial, types.MethodType
    return not isinstance(value, kinds) and owner_of(value) is None


def shallow(value: Any) -> Any:
    """A copy that holds the same, of what can hold itself.

    `copy.copy` makes none of functions, and calls the `__setitem__` of a user's dict.
    """
    if isinstance(value, types.FunctionType):
        return _function_like(value)
    sets = type(value).__setitem__ if isinstance(value, dict) else None
    if isinstance(sets, types.FunctionType) and not hasattr(value, "__copy__"):
        return _dict_like(value)
    return copy.copy(value)


def refill(empty: Any, parts: Sequence[Any]) -> None:
    """Let a shallow copy of what can hold itself hold these parts in the place of its own."""
    if isinstance(empty, types.FunctionType):
        found = iter(parts)
        for cell in _cells(empty):
            cell.cell_contents = next(found)
        empty.__defaults__ = tuple(next(found) for _ in empty.__defaults__ or ())
        empty.__kwdefaults__ = {name: next(found) for name in empty.__kwdefaults__ or ()}
    elif isinstance(empty, dict):
        size = len(empty)
        _kind(empty).clear(empty)
        for key, part in zip(parts[:size], parts[size:], strict=True):
            _kind(empty).__setitem__(empty, key, part)
    elif is_opened(type(empty)):
        for name, part in zip(fields_of(empty), parts, strict=True):
            object.__setattr__(empty, name, part)  # of a frozen one as well
    else:
        empty.clear()
        (empty.update if isinstance(empty, set) else empty.extend)(parts)


def with_parts(value: Any, parts: Sequence[Any]) -> Any:
    """A copy with these parts in the place of its own."""
    if isinstance(value, functools.partial):
        n = len(value.args)
        return functools.partial(
            parts[0], *parts[1 : n + 1], **dict(zip(value.keywords, parts[n + 1 :], strict=True))
        )
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, parts[0])
    if owner_of(value) is not None:
        return bound_to(parts[0], value)
    if isinstance(value, frozenset):
        return type(value)(parts)
    if _is_tuple(value):
        return tuple(parts) if type(value) is tuple else value._make(parts)
    other = shallow(value)
    refill(other, parts)
    return other


def _cells(function: types.FunctionType) -> list[types.CellType]:
    """The variables of functions around it that it refers to, as far as they have values."""
    return [cell for cell in function.__closure__ or () if cell != types.CellType()]


def _function_like(function: types.FunctionType) -> types.FunctionType:
    """The function with variables of its own, of the same values."""
    closure = tuple(
        cell if cell == types.CellType() else types.CellType(cell.cell_contents)
        for cell in function.__closure__ or ()
    )
    name, defaults = function.__name__, function.__defaults__
    other = types.FunctionType(function.__code__, function.__globals__, name, defaults, closure)
    other.__kwdefaults__, other.__qualname__ = function.__kwdefaults__, function.__qualname__
    other.__dict__.update(function.__dict__)
    return other


def _kind(value: dict[Any, Any]) -> type[dict[Any, Any]]:
    """Whose `__setitem__` puts things in as they are: the user's may refuse them."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _dict_like(value: dict[Any, Any]) -> Any:
    """The dict with places of its own, of the same class."""
    other = type(value).__new__(type(value))
    getattr(other, "__dict__", {}).update(getattr(value, "__dict__", {}))
    for key, part in value.items():
        _kind(value).__setitem__(other, key, part)
    return other


def _is_tuple(value: Any) -> bool:
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make"))


# Dataclasses of these kinds are what they derive from.
_NO_RECORDS = (nn.Module, Tensor, str, bytes, int, float, set, frozenset, tuple, list, dict)


@functools.lru_cache(maxsize=1024)
def is_record(kind: type) -> bool:
    """Whether objects of the class are namespaces, or a dataclass's."""
    if issubclass(kind, types.SimpleNamespace):
        return True
    return dataclasses.is_dataclass(kind) and not issubclass(kind, _NO_RECORDS)


_opened: dict[type, tuple[str, ...]] = {}


def opened(*names: str) -> Callable[[type[T]], type[T]]:
    """Have these attributes of a class of ours looked into where a module keeps its objects."""

    def of(kind: type[T]) -> type[T]:
        _opened[kind] = names
        return kind

    return of


def is_opened(kind: type) -> bool:
    """Whether objects of the class are looked into by their fields."""
    return is_record(kind) or kind in _opened


def fields_of(record: Any) -> tuple[str, ...]:
    """The names of a record's fields, and of what else it holds."""
    others: Iterable[str] = _opened.get(type(record), getattr(record, "__dict__", ()))
    held = dict.fromkeys([*_fields(type(record)), *others])  # type: ignore[arg-type]
    return tuple([name for name in held if hasattr(record, name)])


def items_of(record: Any) -> list[tuple[str, Any]]:
    """What it holds, by these names, in any order."""
    kind, held = type(record), getattr(record, "__dict__", {})
    if kind in _opened:
        return [(name, getattr(record, name)) for name in fields_of(record)]
    elsewhere = _fields(kind) - held.keys()  # type: ignore[arg-type]
    return [*held.items(), *[(n, getattr(record, n)) for n in elsewhere if hasattr(record, n)]]


@functools.lru_cache(maxsize=1024)
def _fields(kind: type) -> KeysView[str]:
    """The names of a dataclass's fields, in order."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return dict.fromkeys(field.name for field in fields).keys()
