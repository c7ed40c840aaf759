"""What functions and objects hold: tensors found before anything runs, and their `.grad` kept."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, FunctionType, GeneratorType, ModuleType
from typing import Any

from torch import Tensor, nn

from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.held import PLAIN, fields_of, is_opened
from implicit_grad._torch.pytree import Tensors, versions

# The search goes this deep, and ends after so many objects: there may be a data set among them.
_DEPTH, _MOST = 6, 5_000
_PLAIN = (int, float, complex, str, bytes, type(None), type, ModuleType, FrameType)


def captured_tensors(*holders: object) -> list[tuple[str, Tensor]]:
    """The distinct tensors behind functions and objects, each with the name it is held under."""
    pending = deque((holder, "", _DEPTH) for holder in holders)
    seen: set[int] = set()
    found = []
    while pending and len(seen) < _MOST:
        value, name, depth = pending.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append((name, value))
        elif depth:
            for label, part in itertools.islice(_parts(value), _MOST):
                if not isinstance(part, _PLAIN):
                    pending.append((part, _joined(name, label), depth - 1))
    return found


def _joined(name: str, label: str) -> str:
    if not name or label.startswith("["):
        return name + label
    return f"{name}.{label}" if label else name


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, module, function, method, partial, wrapper or other object holds."""
    if isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, dict):
        for i, (key, part) in enumerate(list(value.items())):
            is_plain = type(key) in PLAIN
            label = f"[{key!r}]" if is_plain else f"[{i}]"
            if not is_plain:
                yield label, key
            yield label, part
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, nn.Module):
        yield from value.named_parameters()
        for label, module in value.named_modules():
            if type(module).__module__.startswith("torch."):
                continue
            loose = [(n, v) for n, v in vars(module).items() if isinstance(v, _LOOSE)]
            yield from ((_joined(label, n), v) for n, v in loose)
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("args", value.args), ("", value.keywords))
    elif inspect.ismethod(value):
        yield from (("", value.__func__), ("", value.__self__))
    elif is_opened(type(value)):
        yield from ((name, getattr(value, name)) for name in fields_of(value))
    elif isinstance(value, GeneratorType):
        yield from dict(value.gi_frame.f_locals if value.gi_frame else ()).items()
        yield "", value.gi_yieldfrom
    elif isinstance(value, weakref.ReferenceType):
        yield "", value()
    elif hasattr(value, "__dict__") or _slots(type(value)):  # type: ignore[arg-type]
        yield from list(getattr(value, "__dict__", {}).items())
        for slot in _slots(type(value)):  # type: ignore[arg-type]
            if hasattr(value, slot):
                yield slot, getattr(value, slot)
    else:  # made in C: iterators, views of dicts, methods
        yield from (("", part) for part in gc.get_referents(value))


# Attributes of a module that may hold what no list of its parameters has.
_LOOSE = (Tensor, FunctionType, list, tuple)


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield name, cell.cell_contents
    if "site-packages" not in code.co_filename:  # a library has no tensors of the user's
        known, names = function.__globals__, _names(code)
        for name in names:
            value = known.get(name)
            if isinstance(value, ModuleType):
                held = vars(value)
                yield from ((f"{name}.{n}", held[n]) for n in names if n in held)
            else:
                yield name, value
    yield "defaults", function.__defaults__
    yield "", function.__kwdefaults__
    yield "", getattr(function, "__wrapped__", None)


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
