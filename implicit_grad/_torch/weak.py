"""Weak references and proxies, and such to another object."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

# Kinds to be told by `type(x) in WEAK`: `isinstance` takes a proxy for its object.
WEAK = frozenset((weakref.ReferenceType, *weakref.ProxyTypes))


def referent(weak: Any) -> Any:
    """What a weak reference or a proxy stands for; None if that is gone."""
    if type(weak) is weakref.ReferenceType:
        return weak()
    with contextlib.suppress(ReferenceError):
        return weak.__init__.__self__  # a bound method knows its object
    return None


def weakly_to(target: Any, like: Any) -> Any:
    """A weak reference, or a proxy, of the kind of another."""
    return (weakref.ref if type(like) is weakref.ReferenceType else weakref.proxy)(target)
