"""Few characters to learn from, drawn once: what the few-shot examples run on here."""

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


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
