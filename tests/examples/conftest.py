"""How the examples are imported here, and few characters, drawn once, to learn from."""

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the examples as their own scripts do; leave torch's threads as they were."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


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
