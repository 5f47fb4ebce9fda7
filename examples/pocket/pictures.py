"""pocket's pictures: a handwritten digit, or a number on a display or in print, 256 x 256, by seed.

Handwriting is real: scikit-learn's 1,797 digits of the UCI archive, 8 x 8 in 17 greys, smoothed and
inked. Displays (LCD, LED) and print are drawn with Pillow. Every picture is turned, shifted, lit
unevenly, blurred and noisy. The held-out split has handwriting and fonts that are never trained.

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
UNITS: Final = ("°C", "%", "min", "kWh", "hPa", "lux", "dB", "W", "ppm", "V")


def draw(rng: random.Random, number: int, split: Split) -> tuple[Image.Image, str]:
    """Return (RGB picture of `number` (0 to 999), what it is: "handwritten" or "display")."""
    if number < 10 and rng.random() < 0.7:
        return _finish(rng, _handwritten(rng, number, split)), "handwritten"
    return _finish(rng, _display(rng, str(number), split)), "display"


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


def _handwritten(rng: random.Random, digit: int, split: Split) -> Image.Image:
    pixels = rng.choice(_handwriting()[split, digit])
    side = rng.randint(110, 210)
    # A margin, so that a stroke at the border of the 8 x 8 ends as softly as elsewhere.
    mask = Image.fromarray(np.pad(pixels, 1)).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.6:  # a pen's edge is sharper than 8 x 8 can say
        low = rng.randint(60, 110)
        mask = mask.point(lambda v: max(0, min(255, (v - low) * 3)))
    paper, ink = _two_colours(rng)
    picture = Image.new("RGB", (SIZE, SIZE), paper)
    if rng.random() < 0.4:
        _rule(rng, picture, ink)
    picture.paste(ink, _somewhere(rng, (side, side), 20), mask)
    return picture


def _rule(rng: random.Random, picture: Image.Image, ink: Colour) -> None:
    """Draw a notebook's lines, faintly."""
    step = rng.randint(24, 60)
    layer = Image.new("L", picture.size, 0)
    lines = ImageDraw.Draw(layer)
    for at in range(rng.randrange(step), SIZE, step):
        lines.line((0, at, SIZE, at), fill=rng.randint(20, 60))
        if step < 40:
            lines.line((at, 0, at, SIZE), fill=20)
    picture.paste(ink, (0, 0), layer)


def _display(rng: random.Random, text: str, split: Split) -> Image.Image:
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
    frame = tuple(rng.randint(0, 255) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), frame)
    font, box = _fitted(rng, name, text)
    width, height = box[2] - box[0], box[3] - box[1]
    left, top = _somewhere(rng, (width, height), 18)
    margin = rng.randint(8, 40)
    pen = ImageDraw.Draw(picture)
    panel = (left - margin, top - margin, left + width + margin, top + height + margin)
    if rng.random() < 0.25:
        panel = (0, 0, SIZE, SIZE)
    pen.rounded_rectangle(panel, rng.randint(0, 16), fill=background)
    at = (left - box[0], top - box[1])
    if segments and style != "print" and rng.random() < 0.5:  # the segments that are off show
        glow = rng.uniform(0.04, 0.15)
        ghost = tuple(int(b + (i - b) * glow) for b, i in zip(background, ink, strict=True))
        pen.text(at, "8" * len(text), font=font, fill=ghost)
    pen.text(at, text, font=font, fill=ink)
    if rng.random() < 0.35:
        small = ImageFont.truetype(f"{TEXT_FONTS[split][0]}.ttf", rng.randint(12, 24))
        pen.text((left + width - 20, top + height + 4), rng.choice(UNITS), font=small, fill=ink)
    return picture


def _fitted(
    rng: random.Random, name: str, text: str
) -> tuple[ImageFont.FreeTypeFont, tuple[int, int, int, int]]:
    """Return the font at a size at which `text` fills a good part of the picture, and its box."""
    widest = rng.uniform(0.45, 0.8) * SIZE
    tallest = rng.uniform(0.35, 0.6) * SIZE
    trial = ImageFont.truetype(f"{name}.ttf", 100)
    left, top, right, bottom = trial.getbbox(text)
    size = int(100 * min(widest / (right - left), tallest / (bottom - top)))
    font = ImageFont.truetype(f"{name}.ttf", size)
    box = font.getbbox(text)
    return font, (int(box[0]), int(box[1]), int(box[2]), int(box[3]))


def _two_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Return a light and a dark colour, mostly in this order."""
    light = tuple(rng.randint(170, 255) for _ in range(3))
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    return (light, dark) if rng.random() < 0.75 else (dark, light)


def _somewhere(rng: random.Random, size: tuple[int, int], stray: int) -> tuple[int, int]:
    """Return where to put something of `size`: near the middle, never over the edge."""
    left, top = (
        min(max((SIZE - side) // 2 + rng.randint(-stray, stray), 0), max(SIZE - side, 0))
        for side in size
    )
    return left, top


def _finish(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Return it as a camera would have it: skewed, lit from one side, out of focus, noisy."""
    angle, shear = np.deg2rad(rng.uniform(-9, 9)), rng.uniform(-0.12, 0.12)
    wide, tall = rng.uniform(0.9, 1.15), rng.uniform(0.9, 1.15)
    c, s, half = np.cos(angle), np.sin(angle), SIZE / 2
    a, b, d, e = c * wide, (s + shear) * wide, -s * tall, c * tall
    matrix = (a, b, half * (1 - a - b), d, e, half * (1 - d - e))
    fill = picture.getpixel((0, 0))
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )
    if rng.random() < 0.7:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.2)))
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(picture, np.float32)
    across, down = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = rng.uniform(0.65, 1.1) * (1 + across * ramp[None, :] + down * ramp[:, None])
    grain = noise.standard_normal((SIZE, SIZE, 1), np.float32) * rng.uniform(0, 18)
    pixels = pixels * light[..., None] + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
