"""Omniglot's tasks by three protocols: random characters, alphabets apart, the official runs.

Finn et al. (2017): 1,200 characters at random to train on, the rest to test on. Lake et al. (2015):
the background alphabets to train on, the evaluation alphabets to test on, which leaks nothing. And
the 20 official one-shot runs, each with 20 characters of one evaluation alphabet. Training turns
characters by 90, 180 and 270 degrees, each a class of its own; testing does not.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from examples_path import characters
from PIL import Image
from torch import Tensor

FINN_TRAINS_ON, FINN_SEED = 1_200, 0
TURNS = 4

Batch = tuple[Tensor, Tensor]


class Tasks:
    """An endless supply of tasks from torch's generator: sorted by class, 2·shots of each."""

    def __init__(self, images: Tensor, ways: int, shots: int, turns: int) -> None:
        """`images` has a row for each character, and in it its drawings."""
        self.images, self.ways, self.shots, self.turns = images, ways, shots, turns

    def sample(self) -> Batch:
        """Drawings and labels of one task."""
        classes = torch.randperm(self.turns * len(self.images))[: self.ways].tolist()
        drawings = [self._class(*divmod(c, len(self.images))) for c in classes]
        return torch.cat(drawings), torch.arange(self.ways).repeat_interleave(2 * self.shots)

    def _class(self, turn: int, character: int) -> Tensor:
        chosen = torch.randperm(self.images.shape[1])[: 2 * self.shots]
        return torch.rot90(self.images[character, chosen], turn, (2, 3))


def load(data: Path, protocol: str) -> tuple[Tensor, Tensor]:
    """The characters to train and to test on."""
    background, evaluation = (
        characters.read_omniglot([data / f"images_{part}.zip"]).images
        for part in ("background", "evaluation")
    )
    if protocol == "lake":
        return background, evaluation
    every = torch.cat([background, evaluation])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(FINN_SEED))
    return every[order[:FINN_TRAINS_ON]], every[order[FINN_TRAINS_ON:]]


def official_runs(path: Path) -> list[Batch]:
    """Each run as a 20-way one-shot task: of each class its training drawing, then its test's."""
    with zipfile.ZipFile(path) as archive:

        def drawing(name: str) -> Tensor:
            image = Image.open(io.BytesIO(archive.read(name))).convert("L")
            return characters.as_ink(image)

        def run(folder: str) -> Batch:
            listing = archive.read(f"{folder}/class_labels.txt").decode().split()
            pairs = zip(listing[1::2], listing[0::2], strict=True)  # training drawing, test drawing
            drawings = [drawing(name) for pair in sorted(pairs) for name in pair]
            return torch.stack(drawings), torch.arange(len(drawings) // 2).repeat_interleave(2)

        return [run(f"run{number:02d}") for number in range(1, 21)]
