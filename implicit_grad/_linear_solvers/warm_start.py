"""Where earlier solves ended, to start the next one from."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor


class WarmStart:
    """Where the last solves ended, for `CG(warm_start=...)` and `implicit(warm_start=...)`.

    There is one place for each key, such as a task or a batch.

    Set the key around the call of the solver; the backward pass of that call finds it again,
    whenever and in whatever thread it runs. Without a key all calls share one solution. The store
    holds one vector of the size of φ for each key, and φ itself with `implicit(warm_start=...)`. A
    copy or pickle of it is empty.

    >>> warm = WarmStart()
    >>> with warm.at("task 3"):
    ...     slot = warm.slot()  # CG does this
    >>> slot.key, warm.slot().key
    ('task 3', None)
    """

    def __init__(self) -> None:
        self._solutions: dict[Hashable, Tensor] = {}
        self._ends: dict[Hashable, Any] = {}
        self._keeps = True
        self._here = threading.local()

    def __len__(self) -> int:
        return len(self._solutions)

    def __reduce__(self) -> tuple[Any, ...]:
        return WarmStart, ()

    @contextlib.contextmanager
    def at(self, key: Hashable) -> Iterator[None]:
        """Calls made inside, in this thread, start from and leave the solution of this key."""
        before = self._key
        self._here.key = key
        try:
            yield
        finally:
            self._here.key = before

    def slot(self) -> Slot:
        """The place of the present key's solution."""
        return Slot(self._solutions, self._ends, self._keeps, self._key)

    def as_it_is(self) -> WarmStart:
        """What it holds now; solves that start from there leave nothing behind."""
        same = WarmStart()
        same._solutions, same._ends = self._solutions.copy(), self._ends.copy()
        same._keeps, same._here = False, self._here
        return same

    def clear(self) -> None:
        """Forget all solutions."""
        self._solutions.clear()
        self._ends.clear()

    @property
    def _key(self) -> Hashable:
        return getattr(self._here, "key", None)


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """The place of one key's solution, and of where the solver that is wrapped ended.

    `end` is for whoever wraps it, who says what it is.
    """

    _solutions: dict[Hashable, Tensor] = dataclasses.field(repr=False)
    _ends: dict[Hashable, Any] = dataclasses.field(repr=False)
    _keeps: bool = dataclasses.field(repr=False)
    key: Hashable

    def slot(self) -> Slot:
        """This place: a solver may hold it in the place of its store."""
        return self

    def get(self, like: Tensor) -> Tensor | None:
        """The last solution, if it is a vector of this form."""
        x = self._solutions.get(self.key)
        if x is None or (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
            return None
        return x

    def put(self, x: Tensor) -> None:
        """Keep a solution; nobody may change it in place any more."""
        if self._keeps:
            self._solutions[self.key] = x.detach()

    def end(self) -> Any:
        """Where the last call ended, or None."""
        return self._ends.get(self.key)

    def put_end(self, end: Any) -> None:
        """Keep where a call ended."""
        if self._keeps:
            self._ends[self.key] = end
