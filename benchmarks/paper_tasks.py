"""Few-shot tasks by four protocols: Omniglot's three, and photographs.

Finn et al. (2017): 1,200 characters at random to train on, the rest to test on. Lake et al. (2015):
the background alphabets to train on, the evaluation alphabets to test on, which leaks nothing. And
the 20 official one-shot runs, each with 20 characters of one evaluation alphabet. Training turns
characters by 90, 180 and 270 degrees, each a class of its own; testing does not. Photographs, as
mini-ImageNet's tasks: a folder for each class, in one for training and one for testing.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from examples_path import characters
from PIL import Image
from torch import Tensor

FINN_TRAINS_ON, FINN_SEED = 1_200, 0
TURNS = characters.TURNS
PROTOCOLS = {"finn": TURNS, "lake": TURNS, "photographs": 1}  # and turns, in training
SIDE = 42  # of photographs, in pixels: half of mini-ImageNet's, a quarter of its time

Batch = tuple[Tensor, Tensor]


class Tasks:
    """An endless supply of tasks from torch's generator: sorted by class, 2·shots of each."""

    def __init__(self, images: Sequence[Tensor], ways: int, shots: int, turns: int) -> None:
        """`images` has an item for each class, and in it its drawings."""
        self.images, self.ways, self.shots, self.turns = images, ways, shots, turns

    def sample(self) -> Batch:
        """Drawings and labels of one task."""
        classes = torch.randperm(self.turns * len(self.images))[: self.ways].tolist()
        drawings = [self._class(*divmod(c, len(self.images))) for c in classes]
        return torch.cat(drawings), torch.arange(self.ways).repeat_interleave(2 * self.shots)

    def _class(self, turn: int, number: int) -> Tensor:
        images = self.images[number]
        chosen = torch.randperm(len(images))[: 2 * self.shots]
        return torch.rot90(images[chosen], turn, (2, 3))


def load(data: Path, protocol: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The classes to train and to test on."""
    if protocol == "photographs":
        return photographs(data, "train"), photographs(data, "test")
    background, evaluation = (
        characters.read_omniglot([data / f"images_{part}.zip"]).images
        for part in ("background", "evaluation")
    )
    if protocol == "lake":
        return background, evaluation
    every = torch.cat([background, evaluation])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(FINN_SEED))
    return every[order[:FINN_TRAINS_ON]], every[order[FINN_TRAINS_ON:]]


def photographs(path: Path, split: str) -> list[Tensor]:
    """Each class's pictures from SPLIT/CLASS/*.jpg in a zip: (pictures, 3, SIDE, SIDE), 0 to 1."""
    if not zipfile.is_zipfile(path):
        raise characters.InputError(f"--data {path}: no zip of {split}/CLASS/*.jpg")
    classes: dict[str, list[Tensor]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            folder, _, file = name.rpartition("/")
            if folder.startswith(f"{split}/") and file.endswith(".jpg"):
                picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255
                classes.setdefault(folder, []).append(pixels.permute(2, 0, 1))
    if not classes:
        raise characters.InputError(f"--data {path}: no {split}/CLASS/*.jpg in it")
    return [torch.stack(pictures) for pictures in classes.values()]


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
