"""Pictures become the pixel values of the checkpoint's own image processor."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.media import FloatArray, encoded, photo

from nestd.bundle.errors import TooLarge, UnsupportedMedia
from nestd.daemon.prompt.image import REDUCE, pixel_values
from nestd.daemon.prompt.media import MediaFormat, MediaLimits

JPEG, PNG, WEBP = MediaFormat.JPEG, MediaFormat.PNG, MediaFormat.WEBP
LIMITS = MediaLimits()
SIZES = (256, 512, 768)


def expected(picture: Image.Image, size: int = 256) -> FloatArray:
    """Return what the processor does, spelled out."""
    small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(255)


def decode(data: bytes, kind: MediaFormat, size: int = 256) -> FloatArray:
    values = pixel_values(data, kind, size, LIMITS)
    assert values.dtype == np.float32
    assert values.shape == (3, size, size)
    assert values.flags.c_contiguous
    assert values.min() >= 0
    assert values.max() <= 1
    return values


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(PNG, {}), (JPEG, {}), (JPEG, {"progressive": True}), (WEBP, {}), (WEBP, {"lossless": True})],
)
@pytest.mark.parametrize("shape", [(640, 427), (300, 900), (256, 256), (37, 19)])
def test_pixel_values_equal_the_processors_of_transformers(
    shape: tuple[int, int], kind: MediaFormat, options: dict[str, bool], size: int
) -> None:
    transformers = pytest.importorskip("transformers")
    # As Google's conversion script writes preprocessor_config.json for Gemma 3n.
    config = {
        "size": {"height": size, "width": size},
        "resample": Image.Resampling.BILINEAR,
        "do_normalize": False,
    }
    data = encoded(photo(*shape), kind.value, **options)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    ours = decode(data, kind, size)
    slow = transformers.SiglipImageProcessor(**config)(picture)["pixel_values"][0]
    np.testing.assert_allclose(ours, slow, rtol=0, atol=1e-7)
    fast = transformers.SiglipImageProcessorFast(**config)(picture, return_tensors="pt")
    np.testing.assert_allclose(ours, fast["pixel_values"][0].numpy(), rtol=0, atol=1.001 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [JPEG, PNG, WEBP])
def test_the_exif_orientation_is_applied(kind: MediaFormat, orientation: int) -> None:
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(120, 80), kind.value, exif=exif)
    upright = Image.open(io.BytesIO(data)).convert("RGB")
    for turn in turns.get(orientation, []):
        upright = upright.transpose(turn)
    np.testing.assert_array_equal(decode(data, kind), expected(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" * 999])
def test_a_damaged_exif_block_hides_no_picture(exif: bytes) -> None:
    plain = photo(60, 40)
    np.testing.assert_array_equal(
        decode(encoded(plain, "PNG", exif=exif), PNG), decode(encoded(plain, "PNG"), PNG)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_pngs_of_every_mode_become_rgb_and_alpha_is_dropped(mode: str) -> None:
    source = photo(90, 70).convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize(source.size))
    picture = source.convert(mode)
    np.testing.assert_array_equal(decode(encoded(picture, "PNG"), PNG), expected(picture))


def test_a_palette_with_transparency_in_bytes_gives_no_warning() -> None:
    picture = photo(64, 64).quantize(16)
    data = encoded(picture, "PNG", transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(decode(data, PNG), expected(picture))


def test_a_16_bit_png_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    values = decode(encoded(Image.fromarray(shades), "PNG"), PNG)
    np.testing.assert_allclose(values[1], shades / 65535, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode: str) -> None:
    data = encoded(photo(80, 60).convert(mode), "JPEG", quality=95)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == mode
    np.testing.assert_array_equal(decode(data, JPEG), expected(picture))


@pytest.mark.parametrize("kind", [WEBP, PNG])
def test_the_first_frame_of_an_animation_counts(kind: MediaFormat) -> None:
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    options = {"lossless": True} if kind is WEBP else {}
    data = encoded(first, kind.value, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decode(data, kind), expected(first))


@pytest.mark.parametrize("size", SIZES)
def test_a_jpeg_decoded_at_reduced_scale_is_close_to_the_full_decode(size: int) -> None:
    # The hardest case: after halving, just above the limit.
    side = int(2 * REDUCE * size) + 8
    data = encoded(photo(side, side), "JPEG", quality=90)
    exact = expected(Image.open(io.BytesIO(data)), size)
    error = np.abs(decode(data, JPEG, size) - exact) * 255
    assert 0 < error.mean() < 1  # above 0: it was reduced
    assert np.quantile(error, 0.99) < 4.5
    assert error.max() < 20


def test_a_jpeg_that_reducing_would_blur_is_decoded_in_full() -> None:
    data = encoded(photo(2 * 640 - 2, 2 * 640 - 2), "JPEG")
    np.testing.assert_array_equal(decode(data, JPEG), expected(Image.open(io.BytesIO(data))))


def test_a_picture_with_more_pixels_than_allowed_is_refused_by_its_header() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(TooLarge, match="too many pixels"):
        pixel_values(bomb, PNG, 256, LIMITS)
    with pytest.raises(TooLarge, match="send at most 10"):
        pixel_values(encoded(photo(40, 40), "WEBP"), WEBP, 256, MediaLimits(pixels=10))


@pytest.mark.parametrize("kind", [JPEG, PNG, WEBP])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_a_truncated_picture_is_refused(kind: MediaFormat, part: float) -> None:
    data = encoded(photo(200, 150), kind.value)
    with pytest.raises(UnsupportedMedia, match="broken or cut short"):
        pixel_values(data[: int(len(data) * part)], kind, 256, LIMITS)


def test_no_other_decoder_is_tried_than_that_of_the_format() -> None:
    with pytest.raises(UnsupportedMedia):
        pixel_values(encoded(photo(20, 20), "PNG"), JPEG, 256, LIMITS)


def test_the_engines_side_loads_no_codec() -> None:
    code = (
        "import sys, nestd.daemon.prompt.decoder_process\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"PIL", "soundfile", "soxr", "av", "_soundfile"} & set(done.stdout.split())
