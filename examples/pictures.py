"""What the examples share: a command line, an interval over seeds, a bar of progress, a picture."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import t as student
from tqdm import tqdm

BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#e07b39", "#4a9c6d", "#b8405e", "#8a8a8a"


def options(doc: str | None, arguments: Sequence[str] | None, **numbers: int) -> Any:
    """The command line of an example: whole numbers with their defaults, and --out."""
    parser = argparse.ArgumentParser(
        description=(doc or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="a whole number")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is enough")
    found = parser.parse_args(arguments)
    torch.set_num_threads(found.threads)
    return found


def progress(items: Iterable[Any], what: str) -> tqdm:
    """The items, with a bar while they last."""
    return tqdm(items, desc=what, leave=False, ncols=80, disable=None)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t."""
    x = np.asarray(list(values), dtype=float)
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(x.mean()), float(half)


def show(values: Iterable[float], digits: int = 3) -> str:
    """The same as text; a single value has no interval."""
    mean, half = interval(values := list(values))
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def panels(count: int, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width * count, 3.6), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def band(panel: Axes, x: Any, curves: Any, color: str, label: str, style: str = "-") -> None:
    """The mean of some curves, one per row, and its 95 % interval."""
    mean, half = np.array([interval(column) for column in np.asarray(curves).T]).T
    panel.plot(x, mean, style, color=color, label=label)
    panel.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def tiles(panel: Axes, rows: dict[str, torch.Tensor], **how: Any) -> None:
    """Named rows of small images, side by side; without limits, each from its least to its most."""
    if not how:
        rows = {name: x - x.amin((1, 2), keepdim=True) for name, x in rows.items()}
        rows = {name: x / x.amax((1, 2), keepdim=True) for name, x in rows.items()}
    high = next(iter(rows.values())).shape[1]
    framed = [torch.nn.functional.pad(x, (1, 1, 1, 1), value=torch.nan) for x in rows.values()]
    whole = torch.cat([torch.cat(list(x), 1) for x in framed])
    panel.imshow(whole.numpy(), cmap="gray", **how)
    panel.set_yticks([(high + 2) * k + high / 2 + 0.5 for k in range(len(rows))], list(rows))
    panel.set_xticks([])
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)


def save(figure: Figure, out: Path, name: str) -> Path:
    """Write the picture into the folder, in 128 colours to keep it small, and say where."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"picture: {path}")
    return path
