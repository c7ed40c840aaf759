"""Methods that are written in C, as a tensor's are: whose they are, and such of another object."""

from __future__ import annotations

from types import (
    BuiltinMethodType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any


def owner_of(value: Any) -> Any:
    """The object whose method, written in C, it is; None for functions and all else."""
    if not isinstance(value, (BuiltinMethodType, MethodWrapperType)):
        return None
    owner = value.__self__
    return None if isinstance(owner, (type, ModuleType)) else owner


def bound_to(owner: Any, method: Any) -> MethodType:
    """The same method of another object, or of what stands in its place for a while."""
    mine = method.__self__
    found = (vars(kind).get(method.__name__) for kind in type(mine).__mro__)
    same = (f for f in found if isinstance(f, _UNBOUND) and f.__get__(mine) == method)
    return MethodType(next(same), owner)  # not what a class of the user's has by that name


_UNBOUND = (MethodDescriptorType, WrapperDescriptorType)
