"""The table of faults, row by row: what the user sees, and what stays as it was.

Each row (in `faults/`) builds a problem, tells `user.owns(...)` what belongs to the user, provokes
the fault and checks the exception, the status or the value. When it returns, all that the user
owns, and torch's own state, must be bitwise what it was. Where that is less than one might wish,
the row's docstring says so after "Deviation:".
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from faults import ON_GPU, ROWS, Row, User, ids

pytestmark = pytest.mark.usefixtures("double_precision")

for part in ("numerics", "models", "contract", "on_gpu"):
    import_module(f"faults.{part}")  # enters its rows
HERE = ids(ROWS) + (ids(ON_GPU) if torch.cuda.is_available() else [])


@pytest.mark.parametrize("check", HERE)
def test_row(check: Row) -> None:
    user = User()
    check(user)
    user.check()


def test_every_row_is_here() -> None:
    assert sorted(ROWS) == list(range(1, 60))
