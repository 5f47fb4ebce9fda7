"""Pictures, clips and videos for tests, made here so that no binary file is in the tree."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

FloatArray = npt.NDArray[np.float32]
# What stands in for media where nobody looks inside.
PICTURE = b"\xff\xd8\xff a picture"
SOUND = b"RIFF1234WAVE a clip"


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with a photo's spectrum (1/f) and hard edges, RGB."""
    random = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(3):
        noise = random.normal(size=(2, *frequency.shape))
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, s=(height, width))
        channels.append(plane / plane.std() * 45 + 128)
    pixels = np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)
    pixels[height // 3 : height // 3 + height // 20, ::8] = 255
    pixels[height // 2 : height // 2 + height // 20, width // 4 : width // 2] = 0
    return Image.fromarray(pixels)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return `picture` as a file of Pillow's format `kind`."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tone(seconds: float, rate: int = 16_000, channels: int = 1, hertz: float = 440.0) -> FloatArray:
    """Return float32 [samples, channels], louder in the first channel."""
    wave = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave * 0.5 / (1 + n) for n in range(channels)], 1).astype(np.float32)


def clip(sound: FloatArray, kind: str, rate: int = 16_000, subtype: str | None = None) -> bytes:
    """Return `sound` as a file of libsndfile's format `kind`."""
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=kind, subtype=subtype)
    return file.getvalue()


def video(
    kind: str, codec: str, frames: int = 90, rate: int = 30, size: tuple[int, int] = (64, 48)
) -> bytes:
    """Return a video whose lower half has brightness 2 x the frame's number, upper half red."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 2 * number % 256, np.uint8)
            pixels[: size[1] // 2] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def base64_part(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": kind, "data": base64.b64encode(data).decode()} | more
