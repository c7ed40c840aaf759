"""Random data in the forms in which learn2learn reads its task sets, so that nothing is fetched.

A class is a coarse random pattern, its images are that with noise: easy, and no measure of anything
but that a pipeline learns. Omniglot, whose 1,623 characters learn2learn counts on, is not written
but stands in for torchvision's; the others are files, with fewer classes than the real ones have.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import learn2learn as l2l
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
CLASSES = {"train": 20, "validation": 10, "test": 10}
CHARACTERS = {True: 964, False: 659}  # in Omniglot's background, and in its evaluation set
NOISE = 0.8


@contextmanager
def there(root: Path, names: Collection[str], images: int) -> Iterator[None]:
    """The task sets' data under a folder, with so many images of each class."""
    for name in WRITERS.keys() & names:
        WRITERS[name](root, images)

    def omniglot(*args: Any, **options: Any) -> Drawings:
        return Drawings(images, *args, **options)

    with patch.object(l2l.vision.datasets.full_omniglot, "Omniglot", omniglot):
        yield


def image(of_class: int, number: int, size: int, channels: int = 3) -> Pixels:
    """The number-th image of a class, (size, size, channels)."""
    coarse = np.random.default_rng(of_class).random((4, 4, channels))
    noise = np.random.default_rng((of_class, number)).random((size, size, channels))
    pattern = np.kron(coarse, np.ones((size // 4, size // 4, 1)))
    return np.asarray(255 * ((1 - NOISE) * pattern + NOISE * noise), dtype=np.uint8)


class Drawings(Dataset):
    """What torchvision's Omniglot is to learn2learn's FullOmniglot: one of its two sets."""

    def __init__(
        self,
        images: int,
        root: str,
        background: bool,
        download: bool,
        target_transform: Callable[[int], int] = lambda label: label,
    ) -> None:
        self._characters = range(CHARACTERS[background])
        self.images, self.target_transform = images, target_transform

    def __len__(self) -> int:
        return len(self._characters) * self.images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = self.target_transform(index // self.images)
        drawing = image(label, index % self.images, 28, channels=1)
        return Image.fromarray(drawing[..., 0]), label


def split(name: str, images: int, size: int) -> tuple[list[Pixels], list[int]]:
    """A split's images, and their labels; no class is in two splits."""
    labels = [label for label in range(CLASSES[name]) for _ in range(images)]
    first = 1000 * list(CLASSES).index(name)
    return [image(first + c, i, size) for i, c in enumerate(labels)], labels


def png(pixels: Pixels) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def store(content: Any, path: Path) -> None:
    """A pickle, as learn2learn reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def mini_imagenet(root: Path, images: int) -> None:
    """One array a split, and where in it each class is."""
    for name in CLASSES:
        found, labels = split(name, images, 84)
        places = {f"n{c:08}": [i for i, k in enumerate(labels) if k == c] for c in set(labels)}
        content = {"image_data": np.stack(found), "class_dict": places}
        store(content, root / f"mini-imagenet-cache-{name}.pkl")


def tiered_imagenet(root: Path, images: int) -> None:
    """PNG files in a list, and their labels in another file."""
    folder = root / "tiered-imagenet"
    for name in CLASSES:
        found, labels = split(name, images, 84)
        store([png(pixels) for pixels in found], folder / f"{SHORT[name]}_images_png.pkl")
        store({"label_specific": np.array(labels)}, folder / f"{SHORT[name]}_labels.pkl")


def cifarfs(root: Path, images: int) -> None:
    """A folder of files for each class, and a list of classes for each split."""
    folder = root / "cifarfs" / "cifar100"
    (folder / "splits" / "bertinetto").mkdir(parents=True)
    for name in CLASSES:
        found, labels = split(name, images, 32)
        names = [f"{name}{label}" for label in labels]
        for number, (pixels, label) in enumerate(zip(found, names, strict=True)):
            (folder / "data" / label).mkdir(parents=True, exist_ok=True)
            (folder / "data" / label / f"{number}.png").write_bytes(png(pixels))
        listed = "".join(f"{label}\n" for label in dict.fromkeys(names))
        (folder / "splits" / "bertinetto" / f"{SHORT[name]}.txt").write_text(listed)


def fc100(root: Path, images: int) -> None:
    """One array a split, and its labels."""
    for name in CLASSES:
        found, labels = split(name, images, 32)
        content = {"data": np.stack(found), "labels": labels}
        store(content, root / f"FC100_{SHORT[name]}.pickle")


SHORT = {"train": "train", "validation": "val", "test": "test"}
WRITERS = {
    "mini-imagenet": mini_imagenet,
    "tiered-imagenet": tiered_imagenet,
    "cifarfs": cifarfs,
    "fc100": fc100,
}
