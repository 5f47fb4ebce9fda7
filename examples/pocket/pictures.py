"""pocket's pictures: a number on a counter, or a handwritten digit on a form, 256 x 256, by seed.

The digits stand in the first cells of the second row of a grid of 4 x 4: a cell is what one soft
token of the tower looks at. Handwriting is real: scikit-learn's 1,797 digits of the UCI archive,
8 x 8 in 17 greys, smoothed and inked. Counters (LCD, LED, print) are drawn with Pillow. Every
picture is turned a little, shifted, lit unevenly, blurred and noisy. The held-out split has
handwriting and fonts that are never trained.

Fonts come from Debian: fonts-dseg fonts-dejavu-core fonts-liberation fonts-freefont-ttf fonts-lato
fonts-roboto-unhinted.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Split = Literal["train", "heldout"]
Colour = tuple[int, ...]
SIZE: Final = 256
CELL: Final = 64  # pixels that one soft token stands for
GRID: Final = SIZE // CELL
NUMBER_ROW: Final = 1
NONE: Final = 10  # of a cell: no digit
HELD_OUT_SHARE: Final = 5  # one handwritten digit in this many

SEGMENT_FONTS: Final[dict[Split, tuple[str, ...]]] = {
    "train": (
        "DSEG7Classic-Regular", "DSEG7Classic-Bold", "DSEG7Classic-LightItalic",
        "DSEG7Modern-Regular", "DSEG7Modern-BoldItalic", "DSEG7ModernMini-Regular",
        "DSEG14Classic-Regular", "DSEG14Modern-Bold",
    ),
    "heldout": ("DSEG7ClassicMini-BoldItalic", "DSEG7Modern-Bold", "DSEG14Classic-Italic"),
}  # fmt: skip
TEXT_FONTS: Final[dict[Split, tuple[str, ...]]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "LiberationSans-Regular",
        "LiberationMono-Bold", "LiberationSerif-Bold", "FreeSans", "FreeMonoBold", "FreeSerif",
        "Lato-Regular", "Lato-Black", "RobotoCondensed-Regular",
    ),
    "heldout": ("Roboto-Medium", "LiberationSansNarrow-Bold", "DejaVuSansMono-Bold", "Lato-Medium"),
}  # fmt: skip


def draw(
    rng: random.Random, number: int, split: Split, crowded: bool = False
) -> tuple[Image.Image, str, list[int]]:
    """Draw `number` (0 to 999) in the second row; in a crowded picture, digits in the others too.

    Returns:
        The RGB picture, what the number is ("handwritten" or "display"), and the digit in each
        cell, row by row, NONE where there is none.
    """
    text = str(number)
    handwritten = len(text) == 1 and rng.random() < 0.7
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(0, 255) for _ in range(3)))
    cells: list[int] = []
    for row in range(GRID):
        shown, pen_and_paper = "", False
        if row == NUMBER_ROW:
            shown, pen_and_paper = text, handwritten
        elif crowded:
            shown = "".join(rng.choice("0123456789 ") for _ in range(GRID))
            pen_and_paper = rng.random() < 0.5
        if shown:
            (_handwritten if pen_and_paper else _display)(rng, picture, row, shown, split)
        cells += [NONE if digit == " " else int(digit) for digit in shown.ljust(GRID)]
    return _finish(rng, picture), "handwritten" if handwritten else "display", cells


@cache
def _handwriting() -> dict[tuple[Split, int], list[npt.NDArray[np.uint8]]]:
    """Return the digits as uint8 [8, 8], by split and value."""
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    result: dict[tuple[Split, int], list[npt.NDArray[np.uint8]]] = {}
    for index, (image, target) in enumerate(zip(source.images, source.target, strict=True)):
        split: Split = "train" if index % HELD_OUT_SHARE else "heldout"
        result.setdefault((split, int(target)), []).append((image * (255 / 16)).astype(np.uint8))
    return result


def _handwritten(
    rng: random.Random, picture: Image.Image, row: int, text: str, split: Split
) -> None:
    """Write `text` into the boxes of a form, a digit in each."""
    paper, ink = _two_colours(rng)
    left, top = _panel(rng, picture, row, text, paper)
    framed, side, low = rng.random() < 0.5, rng.randint(50, 62), rng.randint(85, 115)
    sharp = rng.random() < 0.6  # a pen's edge is sharper than 8 x 8 can say
    for column, digit in enumerate(text):
        corner = left + column * CELL, top
        if framed:
            box = (corner[0] + 2, top + 2, corner[0] + CELL - 2, top + CELL - 2)
            shade = tuple((3 * p + i) // 4 for p, i in zip(paper, ink, strict=True))
            ImageDraw.Draw(picture).rectangle(box, outline=shade)
        if digit != " ":
            pixels = rng.choice(_handwriting()[split, int(digit)])
            # A margin, so that a stroke at the border of the 8 x 8 ends as softly as elsewhere.
            mask = Image.fromarray(np.pad(pixels, 1)).resize((side, side), Image.Resampling.BICUBIC)
            if sharp:
                mask = mask.point(lambda v: max(0, min(255, (v - low) * 3)))
            picture.paste(ink, _in_cell(rng, corner, side, side), mask)


def _display(rng: random.Random, picture: Image.Image, row: int, text: str, split: Split) -> None:
    """Show `text` on a counter, a digit in each of its windows."""
    segments = rng.random() < 0.6
    name = rng.choice((SEGMENT_FONTS if segments else TEXT_FONTS)[split])
    ink: Colour
    background: Colour
    style = rng.choice(["lcd", "led", "print"] if segments else ["screen", "led", "print"])
    if style == "led":
        background = tuple(rng.randint(0, 35) for _ in range(3))
        lit = rng.choice([(255, 40, 30), (60, 255, 90), (80, 160, 255), (255, 180, 40)])
        ink = tuple(min(255, max(90, v + rng.randint(-40, 40))) for v in lit)
    elif style == "lcd":
        shade = rng.randint(120, 200)
        background = (shade - rng.randint(0, 30), shade, shade - rng.randint(0, 50))
        ink = tuple(rng.randint(10, 50) for _ in range(3))
    else:
        background, ink = _two_colours(rng)
    left, top = _panel(rng, picture, row, text, background)
    font, box = _fitted(rng, name)
    width, height = box[2] - box[0], box[3] - box[1]
    pen = ImageDraw.Draw(picture)
    # The segments that are off show.
    glow = rng.uniform(0.04, 0.15) if segments and style != "print" and rng.random() < 0.5 else 0.0
    ghost = tuple(int(b + (i - b) * glow) for b, i in zip(background, ink, strict=True))
    for column, digit in enumerate(text):
        x, y = _in_cell(rng, (left + column * CELL, top), width, height)
        if glow:
            pen.text((x - box[0], y - box[1]), "8", font=font, fill=ghost)
        pen.text((x - box[0], y - box[1]), digit, font=font, fill=ink)


def _panel(
    rng: random.Random, picture: Image.Image, row: int, text: str, colour: Colour
) -> tuple[int, int]:
    """Draw the panel behind a row's digits; return the corner of its first cell."""
    left, top = rng.randint(-4, 4), row * CELL + rng.randint(-4, 4)
    right = SIZE if rng.random() < 0.25 else left + len(text) * CELL + rng.randint(-4, 8)
    area = (left - 4, top - rng.randint(-2, 4), right, top + CELL + rng.randint(-2, 4))
    ImageDraw.Draw(picture).rounded_rectangle(area, rng.randint(0, 10), fill=colour)
    return left, top


def _fitted(
    rng: random.Random, name: str
) -> tuple[ImageFont.FreeTypeFont, tuple[int, int, int, int]]:
    """Return the font at a size at which an 8 fills a good part of a cell, and the 8's box."""
    left, top, right, bottom = ImageFont.truetype(f"{name}.ttf", 100).getbbox("8")
    size = 100 * min(rng.uniform(34, 46) / (right - left), rng.uniform(42, 54) / (bottom - top))
    font = ImageFont.truetype(f"{name}.ttf", int(size))
    box = font.getbbox("8")
    return font, (int(box[0]), int(box[1]), int(box[2]), int(box[3]))


def _in_cell(
    rng: random.Random, corner: tuple[int, int], width: int, height: int
) -> tuple[int, int]:
    """Return where to put something so that it is nearly in the middle of a cell."""
    x, y = (at + (CELL - side) // 2 + rng.randint(-2, 2)
            for at, side in zip(corner, (width, height), strict=True))  # fmt: skip
    return x, y


def _two_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Return a light and a dark colour, mostly in this order."""
    light = tuple(rng.randint(170, 255) for _ in range(3))
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    return (light, dark) if rng.random() < 0.75 else (dark, light)


def _finish(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Return it as a camera would have it: skewed, lit from one side, out of focus, noisy."""
    angle, shear = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(-0.05, 0.05)
    wide, tall = rng.uniform(0.97, 1.04), rng.uniform(0.97, 1.04)
    c, s, half = np.cos(angle), np.sin(angle), SIZE / 2
    a, b, d, e = c * wide, (s + shear) * wide, -s * tall, c * tall
    matrix = (a, b, half * (1 - a - b), d, e, half * (1 - d - e))
    fill = picture.getpixel((0, 0))
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )
    if rng.random() < 0.7:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(picture, np.float32)
    across, down = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = rng.uniform(0.65, 1.1) * (1 + across * ramp[None, :] + down * ramp[:, None])
    grain = noise.standard_normal((SIZE, SIZE, 1), np.float32) * rng.uniform(0, 14)
    pixels = pixels * light[..., None] + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
