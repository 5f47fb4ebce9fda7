"""The manifest of a bundle: the contract between conversion and daemon.

`manifest.json` lies at the top of a bundle directory and names every other file with size and
sha256, the model's numbers, the quantisation, and the table of sub-models with their cost. The
converter writes it last, so a directory with a readable manifest is a whole bundle.

This module validates; it does not open graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nestd.bundle.errors import BundleError, ModelNotFound
from nestd.bundle.submodels import Slice, check_slice

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

Modality = Literal["text", "vision", "audio"]
Positive = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """The numbers of the text decoder, under the names of Hugging Face's Gemma3nTextConfig.

    `intermediate_size` is per layer; `nested_intermediate_size` is the width that a narrow layer
    runs. `rope_theta` belongs to full-attention layers, `rope_local_base_freq` to sliding ones.
    """

    hidden_size: Positive
    intermediate_size: tuple[Positive, ...]
    nested_intermediate_size: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    num_kv_shared_layers: Annotated[int, Field(ge=0)]
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...]
    sliding_window: Positive
    rope_theta: float
    rope_local_base_freq: float
    max_position_embeddings: Positive
    activation_sparsity_pattern: tuple[Annotated[float, Field(ge=0, lt=1)], ...]
    altup_num_inputs: Positive
    altup_active_idx: Annotated[int, Field(ge=0)]
    altup_coef_clip: float | None
    altup_correct_scale: bool
    laurel_rank: Positive
    hidden_size_per_layer_input: Positive
    vocab_size: Positive
    vocab_size_per_layer_input: Positive
    final_logit_softcapping: float | None
    rms_norm_eps: float

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.intermediate_size)

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that owns no KV cache."""
        return self.num_layers - self.num_kv_shared_layers

    def slides(self, layer: int) -> bool:
        """Whether `layer` attends to the last `sliding_window` tokens alone."""
        return self.layer_types[layer] == "sliding_attention"

    def kv_cache_bytes(self, tokens: int, window_capacity: int, kv_bits: int) -> int:
        """Return the KV cache of one sequence; sliding layers hold `window_capacity` at most."""
        row = 2 * self.num_key_value_heads * self.head_dim * kv_bits // 8
        return row * sum(
            min(tokens, window_capacity) if self.slides(layer) else tokens
            for layer in range(self.first_kv_shared_layer)
        )

    def kv_source(self, layer: int) -> int:
        """Return the layer whose KV cache `layer` reads: itself, or the last owner of its type."""
        if layer < self.first_kv_shared_layer:
            return layer
        owners = self.layer_types[: self.first_kv_shared_layer]
        return len(owners) - 1 - owners[::-1].index(self.layer_types[layer])


class Quantization(_Strict):
    """How the large matrices are stored: 32 bits means float32, unquantised.

    With `lm_head_screen`, logits are int4's but for those of the likeliest rows, which are exact.
    With `sparse_rows`, a single token runs only the channels that gaussian top-k leaves above zero.
    """

    bits: Literal[4, 8, 32]
    block_size: Positive
    embedding_bits: Literal[4, 8, 32]
    per_layer_embedding_bits: Literal[4, 8, 32]
    lm_head_screen: bool = False
    sparse_rows: bool = False


class BundleFile(_Strict):
    """Size and digest of one file of the bundle."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Submodel(_Strict):
    """One MatFormer slice and its cost.

    Attributes:
        effective_params: decoder weights that run, token and per-layer embeddings not counted.
        decoder_bytes: bytes of decoder weights that run, lm_head included.
        token_bytes: those that one decoded token reads where it reads less, or None.
        mmlu_percent: published score of the pretrained model, or None.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    wide_layers: tuple[int, ...]
    skipped_layers: tuple[int, ...]
    effective_params: Positive
    decoder_bytes: Positive
    token_bytes: Positive | None = None
    mmlu_percent: float | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of decoder weights that one decoded token reads."""
        return self.token_bytes or self.decoder_bytes

    @property
    def slice(self) -> Slice:
        """The layers of this sub-model."""
        return Slice(self.name, self.wide_layers, self.skipped_layers, self.mmlu_percent)


class Tokens(_Strict):
    """Ids with a meaning; None where the checkpoint has no such token."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int


class SoftTokens(_Strict):
    """How the media of one modality stand in a prompt.

    A medium is `begin`, then `count` times `soft_token`, then `end`. The positions of `soft_token`
    get the encoder's rows instead of embeddings of tokens; any other id from `first_hard_id` on
    gets its row of the file `{modality}_hard_embeddings.npy` (float32 [hard_ids, hidden_size]).
    """

    begin: int
    soft_token: int
    end: int
    count: Positive
    first_hard_id: int
    hard_ids: Positive

    @model_validator(mode="after")
    def _check(self) -> SoftTokens:
        if self.soft_token not in range(self.first_hard_id, self.first_hard_id + self.hard_ids):
            raise ValueError("soft_token lies outside the hard embeddings")
        return self


class VisionConfig(SoftTokens):
    """Pictures; there is a graph `vision_encoder_{size}.onnx` for each of `sizes`, in pixels."""

    sizes: Annotated[tuple[Positive, ...], Field(min_length=1)]


class AudioConfig(SoftTokens):
    """Clips of at most 30 s; a shorter one is filled up with the row of the last hard id."""


class GenerationDefaults(_Strict):
    """The checkpoint's own sampling defaults, from generation_config.json."""

    do_sample: bool = True
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 64
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class Source(_Strict):
    """Where the weights came from."""

    checkpoint: str
    architecture: str
    converter: str


class Manifest(_Strict):
    """The whole of manifest.json.

    `sections` maps a graph's name to the bytes of its weights; `submodels` is ordered from the
    smallest to the largest; `minimum_ram_bytes` is what the smallest sub-model needs at 4k context
    with the weights mapped. `vision` and `audio` are there when their encoders are.
    """

    format_version: Literal[2]
    name: str
    source: Source
    model: ModelConfig
    quantization: Quantization
    modalities: tuple[Modality, ...]
    sections: dict[str, int]
    submodels: Annotated[tuple[Submodel, ...], Field(min_length=1)]
    tokens: Tokens
    generation: GenerationDefaults
    minimum_ram_bytes: Positive
    files: dict[str, BundleFile]
    vision: VisionConfig | None = None
    audio: AudioConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for submodel in self.submodels:
            try:
                check_slice(submodel.slice, self.model.num_layers, self.model.num_kv_shared_layers)
            except BundleError as error:
                raise ValueError(str(error)) from error
        present = {"text": True, "vision": self.vision, "audio": self.audio}
        if self.modalities != tuple(name for name, config in present.items() if config):
            raise ValueError(f"modalities {self.modalities} and the encoders' configs disagree")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"file name {name!r} leaves the bundle")
        return self

    def submodel(self, name: str) -> Submodel:
        """Return the sub-model called `name` (case does not matter).

        Raises:
            ModelNotFound: the bundle has none of that name; the message lists those it has.
        """
        for item in self.submodels:
            if item.name.lower() == name.lower():
                return item
        known = ", ".join(item.name for item in self.submodels)
        raise ModelNotFound(f"this bundle has no sub-model {name!r}; choose auto or one of {known}")


class Bundle:
    """A bundle directory whose manifest has been read and whose files exist with their sizes.

    Attributes:
        manifest_bytes: what was read; `digest`, their sha256, stands for the whole bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, manifest_bytes: bytes) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_bytes = manifest_bytes
        self.digest = hashlib.sha256(manifest_bytes).hexdigest()

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open the bundle at `path`.

        Raises:
            BundleError: no bundle there, another format version, or a file missing or cut short.
        """
        manifest_path = path / MANIFEST
        try:
            data = manifest_path.read_bytes()
            document = json.loads(data)
        except FileNotFoundError:
            raise BundleError(
                f"{path} holds no {MANIFEST}: make a bundle with `nestd convert CHECKPOINT {path}`"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {manifest_path}: {error}") from error
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{manifest_path} has format version {version}, this nestd reads "
                f"{FORMAT_VERSION}: convert the checkpoint again"
            )
        try:
            manifest = Manifest.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"{manifest_path}: {where}: {first['msg']}") from error
        for name, entry in manifest.files.items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                state = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
                raise BundleError(f"{file} {state}: copy or convert the bundle again")
        return cls(path, manifest, data)

    def file(self, name: str) -> Path:
        """Return the path of the bundle's file `name`; BundleError if the manifest has none."""
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no {name}: convert the checkpoint again")
        return self.path / name

    def verify(self, before_each: Callable[[str], None] = lambda _name: None) -> None:
        """Compare every file with its sha256, after a call of `before_each` with its name.

        Raises:
            BundleError: names the first that differs.
        """
        for name, entry in self.manifest.files.items():
            before_each(name)
            if sha256_file(self.path / name) != entry.sha256:
                raise BundleError(
                    f"{self.path / name} does not match its sha256: copy the bundle again"
                )


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
