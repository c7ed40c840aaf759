"""A profiler that is asked for memory alone does not record each operation besides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def operations_unrecorded() -> Iterator[None]:
    """Which takes most of a profiler's time; what is allocated and freed is recorded still."""
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)
