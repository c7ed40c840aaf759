"""Tools to test solvers and their gradients with.

A property test of a solver of yours is its arguments, drawn by hypothesis, and one call:

    from hypothesis import given, settings
    from implicit_grad.testing import check_implicit, strategies as draw

    @settings(deadline=None)
    @given(draw.tensors(8, 3), draw.tensors(8), draw.positive())
    def test_my_solver(X, y, lam):
        check_implicit(solve, (X, y, lam))

When it fails, hypothesis finds the simplest arguments, and the message says which gradient is
wrong, by how much, and why. (Without the settings hypothesis also fails tests that take more than
0.2 s, as checks of a solver may.) `check_implicit` alone needs neither hypothesis nor pytest; for
pytest there is a plug-in, `implicit_grad.testing.plugin`.
"""

from __future__ import annotations

import importlib
from typing import Any

from implicit_grad.testing.check import check_implicit
from implicit_grad.testing.check_report import (
    ArgumentCheck,
    Cause,
    CheckReport,
    GradientCheckError,
)
from implicit_grad.testing.memory import peak_memory

ImplicitGradientError = GradientCheckError  # its name before, kept for those who catch it

__all__ = [
    "ArgumentCheck",
    "Cause",
    "CheckReport",
    "GradientCheckError",
    "check_implicit",
    "peak_memory",
    "strategies",
]


def __getattr__(name: str) -> Any:
    """`strategies` is imported when it is asked for: it needs hypothesis."""
    if name == "strategies":
        return importlib.import_module("implicit_grad.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
