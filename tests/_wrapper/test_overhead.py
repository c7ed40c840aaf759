"""How much Python runs in a call: what a small problem pays beside its own operations."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import implicit_grad as ig


def frames(call: Callable[[], object]) -> int:
    """How many functions of ours a call runs: times would depend on the machine."""
    seen = 0

    def count(frame, event, arg):
        nonlocal seen
        ours = frame.f_globals.get("__name__", "").startswith("implicit_grad")  # others' vary
        seen += ours and event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def test_a_warm_call_runs_few_functions_of_python():
    random = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 11, generator=random, dtype=torch.float64).split([10, 1], 1)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(10, dtype=torch.float64)
    solve = ig.implicit(
        lambda X, y, lam: torch.linalg.solve(X.T @ X + lam * eye, X.T @ y),
        ig.argmin(lambda w, X, y, lam: (X @ w - y).square().sum() + lam * w.square().sum()),
    )
    for _ in range(2):  # the first call checks products
        solve(X, y, lam).sum().backward()
    made = []
    forward = frames(lambda: made.append(solve(X, y, lam).sum()))
    backward = frames(made[0].backward)  # of ten iterations
    assert forward <= 380 and backward <= 510, (forward, backward)
