"""How the examples are imported here, and few characters, drawn once, to learn from."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the examples as their own scripts do; leave torch's threads as they were."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def in_two_processes() -> Callable[..., str]:
    """Run a script in two processes, as torchrun does; what they print."""
    if not hasattr(os, "fork"):
        pytest.skip("the processes are forked")
    forked = Path(__file__).with_name("forked.py")

    def run(script: str, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, str(forked), str(EXAMPLES / script), *arguments],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout

    return run


@pytest.fixture(scope="session")
def four_alphabets() -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Glyphs of two training and two test alphabets, drawn once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import glyphs

        kept = ("Georgian", "Tifinagh", "Latin", "Greek")
        patch.setattr(glyphs, "ALPHABETS", {name: glyphs.ALPHABETS[name] for name in kept})
        return glyphs.render.__wrapped__(drawings=20, seed=0)


@pytest.fixture
def small_glyphs(
    four_alphabets: tuple[torch.Tensor, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the script find four alphabets only."""
    import glyphs

    monkeypatch.setattr(glyphs, "render", lambda seed: four_alphabets)
