"""Characters to learn from: where they come from, how they are split, how tasks are drawn."""

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import glyphs
import learn2learn as l2l
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

DRAWING = re.compile(r"(?:^|/)([^/]+)/(character\d+)/([^/]+)\.png$")
TORCHVISION_FOLDER = "omniglot-py"
TURNS = 4

Batch = tuple[Tensor, Tensor]


class InputError(ValueError):
    """What was asked for cannot be had; the message names the argument that asked."""


@dataclass(frozen=True)
class Characters:
    """Drawings with ink = 1, (characters, drawings, 1, 28, 28), and each one's (alphabet, name)."""

    images: Tensor
    names: list[tuple[str, str]]

    @property
    def alphabets(self) -> list[str]:
        """The alphabets in alphabetical order."""
        return sorted({alphabet for alphabet, _ in self.names})

    def split(self, held_out: Sequence[str]) -> tuple["Characters", "Characters"]:
        """The characters of the other alphabets, and those of the alphabets held out."""
        unknown = sorted(set(held_out) - set(self.alphabets))
        if unknown:
            known = ", ".join(self.alphabets)
            raise InputError(f"--test-alphabets: no alphabet {unknown[0]!r}; there are {known}")
        test = torch.tensor([alphabet in held_out for alphabet, _ in self.names])
        return self._only(~test), self._only(test)

    def _only(self, mask: Tensor) -> "Characters":
        """The characters that the mask selects."""
        names = [name for name, keep in zip(self.names, mask.tolist(), strict=True) if keep]
        return Characters(self.images[mask], names)


def load(data: str, root: Path | None, seed: int = 0) -> tuple[Characters, list[str]]:
    """The characters that `--data` names, and the alphabets held out of them by default."""
    kind, _, paths = data.partition(":")
    if kind == "glyphs" and not paths:
        return Characters(*glyphs.render(seed=seed)), list(glyphs.HELD_OUT)
    if kind == "omniglot" and paths:
        characters = read_omniglot([Path(path) for path in paths.split(",")])
        return characters, characters.alphabets[-2:]
    if kind == "omniglot" and root is not None:
        return _download_omniglot(root)
    if kind == "omniglot":
        raise InputError("--data omniglot: say where, omniglot:PATH[,PATH...] or --root DIR")
    raise InputError(f"--data {data}: choose glyphs, omniglot or omniglot:PATH[,PATH...]")


def _download_omniglot(root: Path) -> tuple[Characters, list[str]]:
    """All 50 alphabets, fetched by torchvision; its evaluation set is what is held out."""
    from torchvision.datasets import Omniglot

    for background in (True, False):
        Omniglot(str(root), background=background, download=True)
    folder = root / TORCHVISION_FOLDER
    held_out = sorted(path.name for path in (folder / "images_evaluation").iterdir())
    sets = [folder / "images_background", folder / "images_evaluation"]
    return read_omniglot(sets), held_out


def read_omniglot(paths: Sequence[Path]) -> Characters:
    """Read <set>/<alphabet>/characterNN/<drawing>.png from folders, zips, and folders of zips.

    Sets overlap (small1 and small2 share Greek and Latin); a drawing found twice counts once.
    """
    found: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"--data omniglot: there is no {path}")
        for name, content in _pngs(path):
            if match := DRAWING.search(name):
                alphabet, character, drawing = match.groups()
                found.setdefault((alphabet, character), {}).setdefault(drawing, content)
    if not found:
        raise InputError(f"--data omniglot: no <alphabet>/characterNN/*.png in {paths[0]}")
    if len(counts := {len(drawings) for drawings in found.values()}) > 1:
        raise InputError(f"--data omniglot: characters differ in drawings, {sorted(counts)}")
    names = sorted(found)
    images = [[_decode(found[name][file]) for file in sorted(found[name])] for name in names]
    return Characters(torch.stack([torch.stack(drawings) for drawings in images]), names)


def _pngs(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every PNG under a folder or inside a zip, with its path."""
    if path.is_dir():
        for file in path.rglob("*.png"):
            yield file.resolve().as_posix(), file.read_bytes()
        for file in path.glob("*.zip"):
            yield from _pngs(file)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    yield name, archive.read(name)
    else:
        raise InputError(f"--data omniglot: {path} is neither a folder nor a zip")


def _decode(png: bytes) -> Tensor:
    """One drawing, from its file."""
    return as_ink(Image.open(io.BytesIO(png)).convert("L"))


def as_ink(image: Image.Image) -> Tensor:
    """One drawing, black on white, as ink = 1 on 0."""
    image = image.resize((glyphs.SIZE, glyphs.SIZE), Image.Resampling.LANCZOS)
    return 1 - torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255


class Drawings(Dataset):
    """Drawings with their classes; a character turned by 90, 180 or 270 degrees is another class.

    learn2learn's RandomClassRotation means to do the same at random, but its closures share the
    last rotation drawn (0.2.0), so that a whole task is turned alike.
    """

    def __init__(self, characters: Characters) -> None:
        self.images = characters.images.flatten(0, 1)
        self.per_class = characters.images.shape[1]

    def __len__(self) -> int:
        return TURNS * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        turn, drawing = divmod(index, len(self.images))
        return torch.rot90(self.images[drawing], turn, (1, 2)), index // self.per_class


def taskset(characters: Characters, ways: int, shots: int) -> l2l.data.Taskset:
    """An endless supply of tasks: `ways` classes, `shots` drawings to adapt on and as many to test.

    A task's drawings come sorted by class, 2 * shots of each.
    """
    drawings = Drawings(characters)
    classes = TURNS * len(characters.names)
    if ways > classes:
        raise InputError(f"--ways {ways}: only {classes} classes in {characters.alphabets}")
    if 2 * shots > drawings.per_class:
        limit = drawings.per_class // 2
        raise InputError(f"--shots {shots}: a character has drawings for at most {limit}")
    labels = {index: index // drawings.per_class for index in range(len(drawings))}
    dataset = l2l.data.MetaDataset(drawings, indices_to_labels=labels)
    transforms = [
        l2l.data.transforms.FusedNWaysKShots(dataset, n=ways, k=2 * shots),
        l2l.data.transforms.LoadData(dataset),
        l2l.data.transforms.RemapLabels(dataset),
        l2l.data.transforms.ConsecutiveLabels(dataset),
    ]
    return l2l.data.Taskset(dataset, transforms)
