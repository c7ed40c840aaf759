"""What functions and objects hold: tensors found before anything runs, and their `.grad` kept."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import CellType, CodeType, FrameType, FunctionType, GeneratorType, ModuleType
from typing import Any

from torch import Tensor, nn

from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.held import PLAIN, is_opened, items_of
from implicit_grad._torch.pytree import Tensors, versions

# The search goes this deep, and ends after so many objects: there may be a data set among them.
_DEPTH, _MOST = 6, 5_000
_PLAIN = (int, float, complex, str, bytes, type, ModuleType, FrameType)


def captured_tensors(*holders: object) -> list[tuple[str, Tensor]]:
    """The distinct tensors behind functions and objects, each with the name it is held under."""
    pending = deque((holder, "", _DEPTH) for holder in holders if not _is_plain(holder))
    seen: set[int] = set()
    found = []
    while pending and len(seen) < _MOST:
        value, name, depth = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append((name, value))
        elif depth:
            for label, part in itertools.islice(_parts(value), _MOST):
                if type(part) not in PLAIN and not _is_plain(part):
                    pending.append((part, _joined(name, label), depth - 1))
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, _PLAIN)


def _joined(name: str, label: str) -> str:
    if not name or label.startswith("["):
        return name + label
    return f"{name}.{label}" if label else name


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What a container, module, function, method, partial, wrapper or other object holds."""
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, dict):
        return _of_dict(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ((f"[{i}]", part) for i, part in enumerate(value))
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, functools.partial):
        return ("", value.func), ("args", value.args), ("", value.keywords)
    if inspect.ismethod(value):
        return ("", value.__func__), ("", value.__self__)
    if is_opened(type(value)):
        return items_of(value)
    if isinstance(value, GeneratorType):
        local = value.gi_frame.f_locals if value.gi_frame else {}
        return *local.items(), ("", value.gi_yieldfrom)
    if isinstance(value, weakref.ReferenceType):
        return (("", value()),)
    slots = _slots(type(value))  # type: ignore[arg-type]
    if hasattr(value, "__dict__") or slots:
        named = ((slot, getattr(value, slot)) for slot in slots if hasattr(value, slot))
        return *getattr(value, "__dict__", {}).items(), *named
    # made in C: iterators, views of dicts, methods
    return (("", part) for part in gc.get_referents(value))


def _of_dict(values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for i, (key, part) in enumerate(list(values.items())):
        is_plain = type(key) in PLAIN
        label = f"[{key!r}]" if is_plain else f"[{i}]"
        if not is_plain:
            yield label, key
        yield label, part


# Attributes of a module that may hold what no list of its parameters has.
_LOOSE = (Tensor, FunctionType, list, tuple)


def _of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    for label, part in module.named_modules():
        if type(part).__module__.startswith("torch."):
            continue
        loose = [(n, v) for n, v in vars(part).items() if isinstance(v, _LOOSE)]
        yield from ((_joined(label, n), v) for n, v in loose)


def _of_function(function: FunctionType) -> list[tuple[str, Any]]:
    code, cells = function.__code__, function.__closure__ or ()
    around = zip(code.co_freevars, cells, strict=True)
    found = [(name, cell.cell_contents) for name, cell in around if cell != _EMPTY]
    if "site-packages" not in code.co_filename:  # a library has no tensors of the user's
        known, names = function.__globals__, _names(code)
        for name in names:
            value = known.get(name)
            if isinstance(value, ModuleType):
                held = vars(value)
                found += [(f"{name}.{n}", held[n]) for n in names if n in held]
            elif value is not None:
                found.append((name, value))
    found.append(("defaults", function.__defaults__))
    found.append(("", function.__kwdefaults__))
    found.append(("", getattr(function, "__wrapped__", None)))
    return found


_EMPTY = CellType()  # of a variable that has no value yet


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    """The names under which objects of a class hold things besides their `__dict__`."""
    slots = (getattr(base, "__slots__", ()) for base in kind.__mro__)
    return tuple(itertools.chain(*((s,) if isinstance(s, str) else s for s in slots)))


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, or a function in it, looks up elsewhere."""
    inside = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return tuple(dict.fromkeys(itertools.chain(code.co_names, *inside)))


class Lent:
    """Leaves that a solver can reach and that are not its own."""

    def __init__(self, reachable: Sequence[Tensor]) -> None:
        self._leaves = leaves_behind(reachable)
        self._ids = frozenset(map(id, self._leaves))
        self._before = versions(self._leaves)

    def __contains__(self, leaf: Tensor) -> bool:
        return id(leaf) in self._ids

    def changed(self, among: Sequence[Tensor]) -> Tensors:
        """Which of `among` are leaves that have been written to since."""
        ids = {id(t) for t in among}
        now = zip(self._leaves, self._before, versions(self._leaves), strict=True)
        return tuple(t for t, before, after in now if before != after and id(t) in ids)

    @contextlib.contextmanager
    def as_they_are(self) -> Iterator[None]:
        """What is added to their `.grad` inside is gone afterwards, and they require grad as ever.

        As with any `backward()`, no other thread may write to them at the same time.
        """
        before = [(t, t.grad) for t in self._leaves]
        for leaf, _ in before:
            leaf.grad = None
        try:
            yield
        finally:
            for leaf, grad in before:
                leaf.requires_grad_()
                leaf.grad = grad
