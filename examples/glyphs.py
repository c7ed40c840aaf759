"""Characters without a download: letters of matplotlib's own fonts, drawn by a shaky hand."""

import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CANVAS = 64  # a clean glyph is rendered at this size
BOX = 44  # and fills a centred box of this size, whatever its size in the font
SIZE = 28  # a drawing's size
LOOKALIKE = 0.9  # correlation from which two clean glyphs count as the same character

SANS, STIX = "DejaVuSans.ttf", "STIXGeneral.ttf"
ALPHABETS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "Georgian": (SANS, ((0x10A0, 0x10FF),)),
    "Tifinagh": (SANS, ((0x2D30, 0x2D7F),)),
    "Latin": (SANS, ((0x41, 0x5A), (0x61, 0x7A))),
    "Greek": (SANS, ((0x370, 0x3FF),)),
    "Cyrillic": (SANS, ((0x400, 0x52F),)),
    "Armenian": (SANS, ((0x530, 0x58F),)),
    "Hebrew": (SANS, ((0x5D0, 0x5EA),)),
    "Arabic": (SANS, ((0x620, 0x6FF),)),
    "NKo": (SANS, ((0x7C0, 0x7FF),)),
    "Lao": (SANS, ((0xE80, 0xEFF),)),
    "Canadian_syllabics": (SANS, ((0x1400, 0x167F),)),
    "Ogham": (SANS, ((0x1680, 0x169F),)),
    "Lisu": (SANS, ((0xA4D0, 0xA4FF),)),
    "Old_Italic": (SANS, ((0x10300, 0x1032F),)),
    "Latin_Extended": (SANS, ((0x180, 0x24F), (0xA720, 0xA7FF))),
    "IPA": (SANS, ((0x250, 0x2AF),)),
    "Fraktur": (STIX, ((0x1D504, 0x1D537),)),
    "Script": (STIX, ((0x1D49C, 0x1D4CF),)),
    "Operators": (STIX, ((0x2200, 0x22FF),)),
    "Arrows": (STIX, ((0x2190, 0x21FF),)),
}
HELD_OUT = ("Georgian", "Tifinagh")


@cache
def render(drawings: int = 20, seed: int = 0) -> tuple[Tensor, list[tuple[str, str]]]:
    """Draw every character `drawings` times: (characters, drawings, 1, 28, 28), and their names."""
    clean, names = _distinct(*_clean_glyphs())
    generator = torch.Generator().manual_seed(seed)
    # A chunk at a time: the sampling grids are far larger than the drawings.
    chunks = [_draw(part, drawings, generator) for part in clean.split(64)]
    return torch.cat(chunks), names


def _clean_glyphs() -> tuple[Tensor, list[tuple[str, str]]]:
    """Every letter and symbol the fonts hold, as printed."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    images, names = [], []
    for alphabet, (file, ranges) in ALPHABETS.items():
        covered = FT2Font(str(folder / file)).get_charmap()
        font = ImageFont.truetype(str(folder / file), size=2 * CANVAS)
        for code in (c for first, last in ranges for c in range(first, last + 1)):
            if code in covered and _is_a_shape_of_its_own(chr(code)):
                images.append(_fit(font, chr(code)))
                names.append((alphabet, f"U+{code:04X}"))
    return torch.from_numpy(np.stack(images)), names


def _is_a_shape_of_its_own(character: str) -> bool:
    """A letter or symbol that is not another one with an accent (mathematical styles count)."""
    kind, parts = unicodedata.category(character), unicodedata.decomposition(character)
    return kind in {"Lu", "Ll", "Lo", "Sm", "So"} and (not parts or parts.startswith("<font>"))


def _fit(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One glyph, its ink scaled into the centred box."""
    ink = Image.new("L", (6 * CANVAS, 6 * CANVAS))
    ImageDraw.Draw(ink).text((2 * CANVAS, CANVAS), character, fill=255, font=font)
    ink = ink.crop(ink.getbbox())
    scale = BOX / max(ink.size)
    ink = ink.resize([max(1, round(scale * side)) for side in ink.size], Image.Resampling.LANCZOS)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return np.asarray(canvas, dtype=np.float32)[None] / 255


def _distinct(clean: Tensor, names: list[tuple[str, str]]) -> tuple[Tensor, list[tuple[str, str]]]:
    """Drop what looks like an earlier character, turned or not: Latin A, Greek Alpha, Cyrillic A.

    So no held-out character is a training character in disguise, not even one of its rotations.
    """
    soft = F.avg_pool2d(clean, 7, stride=2, padding=3)  # a near miss of one pixel still counts
    turns = torch.stack([torch.rot90(soft, turn, (2, 3)).flatten(1) for turn in range(4)])
    turns = F.normalize(turns - turns.mean(-1, keepdim=True), dim=-1)
    alike = ((turns @ turns[0].T).amax(0) > LOOKALIKE).numpy()
    kept: list[int] = []
    for index in range(len(names)):
        if not alike[index, kept].any():
            kept.append(index)
    return clean[kept], [names[index] for index in kept]


def _draw(clean: Tensor, drawings: int, generator: torch.Generator) -> Tensor:
    """Hand-drawn versions: a random affine map, a wobble of the paper, a pen of random width."""
    ink = clean.repeat_interleave(drawings, 0)
    count, fine = len(ink), 2 * SIZE

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    width, height = uniform(0.8, 1.2), uniform(0.8, 1.2)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([width * cos, shear - sin, uniform(-0.12, 0.12)], -1),
            torch.stack([sin, height * cos, uniform(-0.12, 0.12)], -1),
        ],
        1,
    )
    # Both act on a coarse mesh of the paper; refining it is what makes the wobble smooth.
    mesh = F.affine_grid(affine, [count, 1, 6, 6], align_corners=True).permute(0, 3, 1, 2)
    mesh = mesh + 0.08 * torch.randn(mesh.shape, generator=generator)
    mesh = F.interpolate(mesh, size=(fine, fine), mode="bicubic", align_corners=True)
    warped = F.grid_sample(ink, mesh.permute(0, 2, 3, 1), align_corners=True)
    # Where the soft threshold falls on the blurred stroke decides how thick the pen is.
    blurred = F.avg_pool2d(warped, 5, stride=1, padding=2)
    level = uniform(0.12, 0.35).view(-1, 1, 1, 1)
    drawn = F.avg_pool2d((0.5 + 6 * (blurred - level)).clamp(0, 1), 2)
    return drawn.view(len(clean), drawings, 1, SIZE, SIZE)
