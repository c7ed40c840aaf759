"""learn2learn's task sets by name, with random data in their place."""

import csv
from pathlib import Path

import pytest
import torch

for neighbour in ("learn2learn", "torchvision", "rich"):
    pytest.importorskip(neighbour)

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def test_all_task_sets_run_and_their_labels_fit_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synthetic_tasksets
    import tasksets

    monkeypatch.setattr(synthetic_tasksets, "NOISE", 0.2)
    right: dict[str, list[float]] = {}

    def nearest(pipeline: tasksets.Pipeline, batch: tasksets.Batch) -> tuple[torch.Tensor, float]:
        """By the image itself: of two halves that have each class once, in whatever order."""
        data, labels = batch[0].flatten(1), batch[1]
        assert sorted(labels[::2].tolist()) == sorted(labels[1::2].tolist()) == [0, 1, 2]
        found = labels[::2][torch.cdist(data[1::2], data[::2]).argmin(1)]
        right[name].append((found == labels[1::2]).float().mean().item())
        return evaluated(pipeline, batch)

    evaluated = tasksets.Pipeline.evaluated
    monkeypatch.setattr(tasksets.Pipeline, "evaluated", nearest)
    sizes = {"ways": 3, "steps": 1, "hidden": 2, "meta-batch": 2, "iterations": 1}
    sizes |= {"validation-tasks": 2, "test-tasks": 5}
    options = [part for k, v in sizes.items() for part in (f"--{k}", str(v))]
    for name in tasksets.NAMES:
        right[name] = []
        names = ["--tasksets", name, "--algorithms", "fomaml", "imaml"]
        tasksets.main(["--data", "synthetic", "--out", str(tmp_path), *options, *names])
        with (tmp_path / "tasksets.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["algorithm"] for row in rows] == ["fomaml", "imaml"]
        assert rows[0]["untrained"] == rows[1]["untrained"]  # the same tasks and weights
        assert sum(right[name]) / len(right[name]) > 0.95
