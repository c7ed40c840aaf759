"""Warnings that point to the user's own line, one for a place; and who says what solvers tell."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from implicit_grad._errors import ImplicitGradWarning

# Packages whose lines say nothing to the user.
_PASSED_OVER = {"implicit_grad", "torch", "optree"}


class Place(NamedTuple):
    """A line of code, and what has been shown for its module."""

    filename: str
    line: int
    module: str
    shown: dict[Any, Any]


def users_line() -> Place:
    """The line at work of the nearest function that is neither ours nor torch's."""
    frame = outermost = sys._getframe(1)
    while _is_passed_over(_name(frame)):
        if frame.f_back is None:
            frame = outermost
            break
        frame = frame.f_back
    shown = frame.f_globals.setdefault("__warningregistry__", {})
    return Place(frame.f_code.co_filename, frame.f_lineno, _name(frame), shown)


@functools.lru_cache(maxsize=1024)
def _is_passed_over(module: str) -> bool:
    return module.partition(".")[0] in _PASSED_OVER


def _name(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))


def warn(sentence: str, anchor: str, place: Place | None = None, of: str = "") -> None:
    """Warn, by default at the user's line.

    Python's default filter shows a text once for a place. Sentences that are `of` one thing count
    as one text there, whatever figures they give.
    """
    warning, where = ImplicitGradWarning(sentence, anchor), place or users_line()
    text, known = ((x, ImplicitGradWarning, where.line) for x in (str(warning), of or sentence))
    if where.shown.get(known):
        where.shown[text] = True
    warnings.warn_explicit(
        message=warning,
        category=ImplicitGradWarning,
        filename=where.filename,
        lineno=where.line,
        module=where.module,
        registry=where.shown,
    )
    if where.shown.pop(text, False):  # the filter at work shows a text once
        where.shown[known] = True


Say = Callable[[str, str, str], None]
_say: ContextVar[Say] = ContextVar("implicit_grad: who says it")


def tell(sentence: str, anchor: str, of: str = "") -> None:
    """What a solver has to say, be it on its own or in a call that says it as it was asked to."""
    say = _say.get(None)
    if say is None:
        warn(sentence, anchor, of=of)
    else:
        say(sentence, anchor, of)


@contextlib.contextmanager
def said_by(say: Say) -> Iterator[None]:
    """What solvers tell inside is said by this."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)
