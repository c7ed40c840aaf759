"""Checks of options: each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from implicit_grad._errors import InvalidArgumentError, describe


def is_integer(value: object, least: int) -> bool:
    """Whether an option is an integer, not a truth value, and large enough."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_value(where: str, name: str, value: object, good: bool, expected: str) -> None:
    """Raise if the value that `where` was given as `name` is not good."""
    if not good:
        raise InvalidArgumentError(f"{where}({name}={value!r}): expected {expected}")


def check_one_of(where: str, name: str, value: object, choices: Iterable[str]) -> None:
    """The value is one of a few words."""
    choices = tuple(choices)
    expected = ", ".join(f'"{choice}"' for choice in choices[:-1]) + f' or "{choices[-1]}"'
    check_value(where, name, value, isinstance(value, str) and value in choices, expected)


def require(owner: object, name: str, good: bool, expected: str) -> None:
    """Raise if the value of the owner's option `name` is not good."""
    check_value(type(owner).__name__, name, getattr(owner, name), good, expected)


def require_count(owner: object, name: str, least: int) -> None:
    """The option is an integer of at least `least`."""
    value = getattr(owner, name)
    require(owner, name, is_integer(value, least), f"an integer of at least {least}")


def require_count_or_none(owner: object, name: str, least: int) -> None:
    """The option is None or an integer of at least `least`."""
    value = getattr(owner, name)
    good = value is None or is_integer(value, least)
    require(owner, name, good, f"None or an integer of at least {least}")


def require_nonnegative(owner: object, name: str) -> None:
    """The option is a finite number of at least 0."""
    value = getattr(owner, name)
    good = is_number(value) and 0 <= value < math.inf
    require(owner, name, good, "a finite number of at least 0")


def require_positive(owner: object, name: str) -> None:
    """The option is a finite number greater than 0."""
    value = getattr(owner, name)
    require(owner, name, is_number(value) and 0 < value < math.inf, "a number > 0")


def require_tolerance(owner: object, name: str) -> None:
    """The option is None or a finite number of at least 0."""
    value = getattr(owner, name)
    good = value is None or (is_number(value) and 0 <= value < math.inf)
    require(owner, name, good, "None or a number of at least 0")


def require_fraction(owner: object, name: str) -> None:
    """The option is None or a number between 0 and 1."""
    value = getattr(owner, name)
    good = value is None or (is_number(value) and 0 < value < 1)
    require(owner, name, good, "None or a number between 0 and 1")


def require_flag(owner: object, name: str) -> None:
    """The option is True or False."""
    require(owner, name, isinstance(getattr(owner, name), bool), "True or False")


def require_options(owner: object, name: str) -> None:
    """The option is None or a dict of another package's own options."""
    value = getattr(owner, name)
    require(owner, name, value is None or isinstance(value, dict), "None or a dict of options")


def require_callable(owner: object, name: str, expected: str) -> None:
    """The option can be called."""
    value = getattr(owner, name)
    if not callable(value):
        raise InvalidArgumentError(
            f"{type(owner).__name__}: {name} must be {expected}, got {describe(value)}"
        )


def is_number(value: Any) -> bool:
    """Whether it is a real number, and not one of Python's two truth values."""
    return isinstance(value, Real) and not isinstance(value, bool)
