"""JPEG, PNG and WebP -> `pixel_values`, as the checkpoint's own image processor makes them.

Google's preprocessor configuration of Gemma 3n is SiglipImageProcessorFast with size 768 x 768,
bilinear, rescaled by 1/255 and not normalised: the picture is squashed to the square, whatever its
shape. Before that `transformers.image_utils.load_image` applies the EXIF orientation and drops
alpha, and so does this. Of an animation the first frame counts.

Equal to the slow processor to float32's rounding and to the fast one (which resizes in torch)
within 1/255, with one exception on purpose: a large JPEG is decoded at 1/2, 1/4 or 1/8 (`REDUCE`).

Pillow is imported when the first picture comes: this module costs an idle daemon nothing.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import RequestError, TooLarge
from nestd.daemon.prompt.media import MediaFormat, MediaLimits, broken, check_pixels

if TYPE_CHECKING:
    from PIL import Image

# A JPEG may be decoded at reduced scale while that leaves at least this many times the pixels of
# the square along each side. Measured against the full decode in 8-bit steps, a portrait / noise
# with hard edges: at 2.5 mean 0.2 / 0.9, 99 % within 2 / 4; at 2 (Pillow's thumbnails) mean 0.3 /
# 1.3, 99 % within 3 / 6; at 1 mean 1.4 / 4.4, 99 % within 12 / 18. A 12 megapixel picture is then
# decoded at 1/4 for 256, at 1/2 for 512 and in full for 768.
REDUCE = 2.5


def pixel_values(
    data: bytes, kind: MediaFormat, size: int, limits: MediaLimits
) -> npt.NDArray[np.float32]:
    """Decode one picture.

    Args:
        data: the encoded file.
        kind: its format, from `media.check`; no other decoder is tried.
        size: side of the square, one of the bundle's.
        limits: `pixels` is compared with the header before anything is decoded.

    Returns:
        float32 [3, size, size], channels R, G, B, values 0 to 1.

    Raises:
        TooLarge: too many pixels, or not enough memory to decode them.
        UnsupportedMedia: broken or cut short.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes (judged here, by our limit) and of untidy metadata.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[kind.value.upper()]) as picture:
                check_pixels(*picture.size, limits)
                if kind is MediaFormat.JPEG:
                    picture.draft(None, (int(size * REDUCE), int(size * REDUCE)))
                # Before EXIF is read, which decodes a PNG too and whose errors are passed over: a
                # second try after an error would give a black picture.
                picture.load()
                return squash(_upright(picture), size)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooLarge(
            f"the picture has too many pixels: send at most {limits.pixels} in all"
        ) from error
    except MemoryError as error:
        raise TooLarge("the picture needs too much memory: send a smaller one") from error
    except Exception as error:  # Pillow's decoders raise nearly every type on hostile bytes
        raise broken(f"{kind} picture", error) from error


def squash(picture: Image.Image, size: int) -> npt.NDArray[np.float32]:
    """Return `picture` as float32 [3, size, size], RGB from 0 to 1."""
    from PIL import Image

    picture = _rgb(picture).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.uint8).transpose(2, 0, 1)
    # As the reference: the product in float64, then rounded once.
    return np.ascontiguousarray(pixels * (1 / 255), dtype=np.float32)


def _upright(picture: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - a damaged EXIF block, which hides no pixel, raises anything
        orientation = 1
    if orientation not in range(2, 9):
        return picture
    return ImageOps.exif_transpose(picture)


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255, which turns such a picture white.
        grey = np.asarray(picture).astype(np.uint32) >> 8
        picture = Image.fromarray(grey.astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
