"""A value of one thread that autograd hands on to the threads in which it runs backward."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class HandedOn(Generic[T]):
    """Like `threading.local`, but seen in backward too: on a GPU, that runs in other threads."""

    def __init__(self, key: str, default: T) -> None:
        self._key, self._default = key, default

    @property
    def value(self) -> T:
        """What was set in this thread, or in the one that called backward; else the default."""
        known = torch._C._is_key_in_tls(self._key)
        return torch._C._get_obj_in_tls(self._key) if known else self._default

    @value.setter
    def value(self, value: T) -> None:
        if _takes_no_reference():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
        torch._C._stash_obj_in_tls(self._key, value)


@functools.cache
def _takes_no_reference() -> bool:
    """Whether torch keeps an object without a reference of its own, as older versions do.

    They give one up all the same when the object is replaced. Without one more it would be freed
    while it is in use, and Python would crash later, anywhere (seen with torch 2.4).
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("implicit_grad: probe", probe)
    if sys.getrefcount(probe) > before:
        return False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return True
