"""config.json -> what the manifest says about pictures and sound. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from nestd.bundle.errors import CheckpointError, ConfigError
from nestd.bundle.manifest import AudioConfig, Modality, VisionConfig
from nestd.conversion.checkpoint import Checkpoint

ENCODERS: tuple[Modality, ...] = ("vision", "audio")
# More faithful than the decoder's 128: a tower's matrices are few, and it runs them once.
ENCODER_BLOCK_SIZE = 32
IMAGE_SIZES = (256, 512, 768)
# Each tower halves a picture five times; larger ones than this cost gigabytes of activations.
SIZE_STEP, LARGEST_SIZE = 32, 2048

Config = TypeVar("Config", VisionConfig, AudioConfig)


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """Which encoders a conversion writes, None for one that it leaves out, and their width."""

    vision: VisionConfig | None
    audio: AudioConfig | None
    bits: Literal[8, 32]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the bundle understands, text included."""
        chosen = {"vision": self.vision, "audio": self.audio}
        return ("text", *(name for name in ENCODERS if chosen[name]))

    @property
    def weights(self) -> tuple[str, ...]:
        """Prefixes of the weights that the conversion reads, for `str.startswith`."""
        names = [name for name in ENCODERS if name in self.modalities]
        return (*(f"{name}_tower." for name in names), *(f"embed_{name}." for name in names))


def plan_encoders(
    checkpoint: Checkpoint,
    wanted: Sequence[Modality] | None,
    image_sizes: Sequence[int],
    bits: Literal[8, 32],
) -> EncoderPlan:
    """Return the encoders of the `wanted` modalities, None for all that the checkpoint has.

    Raises:
        CheckpointError: one is wanted that the checkpoint lacks, or config.json lacks a number.
        ConfigError: an image size that no tower takes.
    """
    held = [name for name in ENCODERS if _has_encoder(checkpoint, name)]
    for name in wanted or ():
        if name != "text" and name not in held:
            raise CheckpointError(
                f"{checkpoint.path} holds no {name} encoder (no weight {name}_tower.*): leave "
                f"{name} out of --modalities, or {checkpoint.towers_from}"
            )
    chosen = [name for name in held if wanted is None or name in wanted]
    config = checkpoint.config
    return EncoderPlan(
        vision=_read_vision(config, image_sizes) if "vision" in chosen else None,
        audio=_read(AudioConfig, config, "audio", "audio") if "audio" in chosen else None,
        bits=bits,
    )


def _has_encoder(checkpoint: Checkpoint, name: Modality) -> bool:
    return any(weight.startswith(f"{name}_tower.") for weight in checkpoint.encoders)


def _read_vision(config: Mapping[str, Any], sizes: Sequence[int]) -> VisionConfig:
    for size in sizes:
        if size % SIZE_STEP or not 0 < size <= LARGEST_SIZE:
            raise ConfigError(
                f"--image-sizes: {size} is no multiple of {SIZE_STEP} up to {LARGEST_SIZE}; "
                f"Gemma 3n's are {', '.join(map(str, IMAGE_SIZES))}"
            )
    return _read(VisionConfig, config, "vision", "image", sizes=tuple(sorted(set(sizes))))


def _read(
    kind: type[Config],
    config: Mapping[str, Any],
    modality: str,
    noun: str,
    **values: Any,  # noqa: ANN401  (further fields of `kind`)
) -> Config:
    section = config.get(f"{modality}_config")
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json has no {modality}_config, but weights of {modality}")
    letter = noun[0]
    # The soft tokens of audio are "per image" in Hugging Face's config too.
    names = {
        "begin": (config, f"bo{letter}_token_id"),
        "soft_token": (config, f"{noun}_token_id"),
        "end": (config, f"eo{letter}_token_id"),
        "count": (config, f"{modality}_soft_tokens_per_image"),
        "first_hard_id": (section, "vocab_offset"),
        "hard_ids": (section, "vocab_size"),
    }
    try:
        return kind(**{key: part.get(name) for key, (part, name) in names.items()}, **values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "soft_token"
        name = names[key][1] if key in names else key
        raise CheckpointError(f"config.json: {name}: {first['msg']}") from error
