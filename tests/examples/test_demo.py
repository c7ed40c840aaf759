"""The demo in miniature: its three points, its picture, and silence but for its own words."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

for neighbour in ("learn2learn", "torchvision", "matplotlib", "rich", "scipy", "tqdm"):
    pytest.importorskip(neighbour)

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("examples_on_path")


@pytest.fixture
def small(small_glyphs: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A second's worth of it."""
    import demo

    monkeypatch.setattr(demo, "TASKS", 1)
    monkeypatch.setattr(demo, "OUTER", 2)
    monkeypatch.setattr(demo, "STEP_COUNTS", (1, 2, 3))
    return ["--iterations", "1", "--tests", "3", "--width", "4"]


def test_its_three_points(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import demo

    found = demo.main([*small, "--out", str(tmp_path)])
    assert list(found) == [demo.FIRST, demo.MAML, demo.OURS]
    for name, of in found.items():
        learns = name != demo.FIRST
        assert (of.gradient.norm() > 0) == learns
        assert (of.trust != 1 / 3).any() == learns
        grown = [more / less for less, more in pairwise(of.mebibytes)]
        assert all(g > 1.1 for g in grown) if name == demo.MAML else max(grown) < 1.01
        assert len(of.accuracies) == len(of.trusting) == 3
    assert (tmp_path / "demo.png").stat().st_size > 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in found) and printed.err == ""


def test_an_annotator_is_as_often_wrong_as_was_said() -> None:
    import demo

    labels = torch.arange(demo.WAYS).repeat_interleave(6)
    task, random = (torch.zeros(len(labels), 1), labels), torch.Generator().manual_seed(0)
    given = torch.stack([demo.annotated(task, random).given for _ in range(500)])
    right = torch.arange(demo.WAYS).repeat_interleave(3)
    wrong = (given != right).double().view(-1, 3).mean(0)
    expected = torch.tensor(list(demo.WRONG.values()), dtype=torch.float64)
    torch.testing.assert_close(wrong, expected, atol=0.04, rtol=0)
    assert set(given.unique().tolist()) == set(range(demo.WAYS))


def test_third_parties_say_nothing() -> None:
    """Gym at its import, and the profiler, which reads its variable as torch is loaded."""
    script = "import quiet, gym, os; assert os.environ['KINETO_LOG_LEVEL']"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("", "")
