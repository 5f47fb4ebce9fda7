"""Checkpoint -> bundle, in numbered steps.

The bundle is written in a directory beside its destination and renamed when it is whole, so an
interrupted or failing conversion leaves nothing that looks like a bundle. Memory stays small at any
model size: matrices stream in pieces of 64 MB. Encoders need about 2 GB, for torch and what the
exporter computes while it traces.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import yaml

from nestd.bundle.errors import BundleError, CheckpointError
from nestd.bundle.manifest import (
    MANIFEST,
    Bundle,
    BundleFile,
    Manifest,
    Modality,
    ModelConfig,
    Quantization,
    Source,
    sha256_file,
)
from nestd.bundle.submodels import Slice, check_slice, parse_slices, slices_for
from nestd.conversion import assets
from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.costs import MINIMUM_CONTEXT, OVERHEAD_BYTES, cost
from nestd.conversion.decoder import DecoderBytes, write_decoder, write_int8_cache_decoder
from nestd.conversion.embeddings import (
    SCREENED_ROWS,
    EmbeddingTable,
    write_embed_tokens,
    write_per_layer_embeddings,
)
from nestd.conversion.encoders.config import IMAGE_SIZES, EncoderPlan, plan_encoders
from nestd.conversion.estimates import bytes_to_read, check_disk
from nestd.conversion.model_config import read_model_config
from nestd.conversion.progress import Progress
from nestd.conversion.sources.open import open_checkpoint
from nestd.conversion.sources.resolve import resolve
from nestd.conversion.weights import WeightFile

if TYPE_CHECKING:  # it imports torch
    from nestd.conversion.encoders.write import EncoderWriter

SUBMODELS_FILE = "submodels.yaml"
# Rearranged for the kernels, a block carries its scale and its sum: at 4 bits and blocks of 32 that
# is half as much again as the weights themselves, at blocks of 128 an eighth.
DEFAULT_BLOCK_SIZE = 128


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What `nestd convert` may be told.

    Attributes:
        bits: of attention and feed-forward weights; 32 keeps float32, for comparisons.
        block_size: weights that share a scale; None takes 128. Smaller is more faithful and slower.
        per_layer_embedding_bits: of the PLE table; None takes 8, or 32 where `bits` is 32.
        submodels: a YAML file of sub-models; None takes submodels.yaml of the checkpoint, or what
            the shape contains.
        modalities: to convert, text always; None takes all that the checkpoint has.
        image_sizes: side lengths in pixels, a vision graph each.
        encoder_bits: of the encoders' matrices; None takes 8, or 32 where `bits` is 32.
        mmproj: the GGUF file of the towers, for a text model in a GGUF file; None takes the one
            beside it where the source is a directory.
        lm_head_screen: find the likeliest tokens with an int4 lm_head, score only those exactly.
        sparse_rows: decode layers with gaussian top-k by the channels that it leaves above zero.
    """

    bits: Literal[4, 8, 32] = 8
    block_size: int | None = None
    per_layer_embedding_bits: Literal[4, 8, 32] | None = None
    submodels: Path | None = None
    modalities: tuple[Modality, ...] | None = None
    image_sizes: tuple[int, ...] = IMAGE_SIZES
    encoder_bits: Literal[8, 32] | None = None
    mmproj: Path | None = None
    lm_head_screen: bool = False
    sparse_rows: bool = False

    def quantization(self) -> Quantization:
        """Return the resolved widths."""
        wide: Literal[8, 32] = 32 if self.bits == 32 else 8
        block_size = self.block_size or DEFAULT_BLOCK_SIZE
        if block_size < 16 or block_size & (block_size - 1):
            raise CheckpointError(f"--block-size must be a power of two from 16, not {block_size}")
        for option in ("lm_head_screen", "sparse_rows"):
            if getattr(self, option) and self.bits == 32:
                name = option.replace("_", "-")
                raise CheckpointError(f"--{name} is for quantised weights: leave out --bits 32")
        return Quantization(
            bits=self.bits,
            block_size=block_size,
            embedding_bits=wide,
            per_layer_embedding_bits=self.per_layer_embedding_bits or wide,
            lm_head_screen=self.lm_head_screen,
            sparse_rows=self.sparse_rows,
        )


def convert(source: str, destination: Path, options: ConvertOptions, log: TextIO) -> Bundle:
    """Convert the checkpoint `source` to a new bundle at `destination`.

    Args:
        source: a directory, a GGUF file, a Hugging Face repository id, `kaggle:...` or
            `ollama:...`.
        destination: a directory that does not exist yet.
        options: widths, sub-models and modalities.
        log: where progress and remarks go.

    Raises:
        CheckpointError: the checkpoint cannot be converted; the sentence says why.
        BundleError: the destination exists, or the disk is too small.
        ConfigError: an image size that no tower takes.
    """
    if destination.exists():
        raise BundleError(f"{destination} exists already: remove it or choose another name")
    path = resolve(source)
    with open_checkpoint(path, options.mmproj) as checkpoint:
        _convert(checkpoint, source, destination, options, log)
    return Bundle.open(destination)


def _convert(
    checkpoint: Checkpoint, source: str, destination: Path, options: ConvertOptions, log: TextIO
) -> None:
    quantization = options.quantization()
    nested, slices = _read_submodels(checkpoint.assets, options.submodels)
    model = read_model_config(checkpoint.config, nested)
    slices = slices or slices_for(
        model.intermediate_size, model.nested_intermediate_size, model.num_kv_shared_layers
    )
    for item in slices:
        check_slice(item, model.num_layers, model.num_kv_shared_layers)
    bits = options.encoder_bits or (32 if options.bits == 32 else 8)
    plan = plan_encoders(checkpoint, options.modalities, options.image_sizes, bits)
    encoders = _encoder_writers(checkpoint, plan)
    check_disk(destination, checkpoint, model, quantization, plan)
    for remark in checkpoint.remarks:
        log.write(f"note: {remark}\n")
    with _staging(destination) as staging:
        writer = _Writer(checkpoint, model, quantization, plan, staging, log)
        writer.write_graphs(encoders)
        writer.write_assets()
        writer.write_manifest(slices, destination.name, source)
        staging.rename(destination)


class _Writer:
    """Writes the parts of one bundle into a staging directory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        quantization: Quantization,
        encoders: EncoderPlan,
        staging: Path,
        log: TextIO,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.quantization = quantization
        self.encoders = encoders
        self.staging = staging
        self.log = log
        self.sections: dict[str, int] = {}
        self.decoder = DecoderBytes()

    def write_graphs(self, encoders: Mapping[str, EncoderWriter]) -> None:
        """Stream the graphs and their weights."""
        model, quantization = self.model, self.quantization
        total = bytes_to_read(self.checkpoint, model, quantization, self.encoders)
        progress = Progress(total, self.log)
        self.checkpoint.on_bytes = progress.advance
        block = quantization.block_size

        # 1. The token table, which is the lm_head too.
        with WeightFile(self.staging / "embed_tokens.data") as weights:
            shape = (model.vocab_size, model.hidden_size)
            tokens = EmbeddingTable.write(
                self.checkpoint,
                "embed_tokens.weight",
                shape,
                quantization.embedding_bits,
                weights,
                block,
            )
            write_embed_tokens(self.staging / "embed_tokens.onnx", model, weights, tokens)
            self.sections["embed_tokens"] = weights.size

        # 2. The per-layer embeddings, which stay on storage.
        with WeightFile(self.staging / "per_layer_embeddings.data") as weights:
            width = model.num_layers * model.hidden_size_per_layer_input
            table = EmbeddingTable.write(
                self.checkpoint,
                "embed_tokens_per_layer.weight",
                (model.vocab_size_per_layer_input, width),
                quantization.per_layer_embedding_bits,
                weights,
                block,
            )
            path = self.staging / "per_layer_embeddings.onnx"
            write_per_layer_embeddings(path, model, weights, table)
            self.sections["per_layer_embeddings"] = weights.size

        # 3. The decoder with every sub-model in it.
        with WeightFile(self.staging / "decoder.data") as weights:
            self.decoder = write_decoder(
                self.staging / "decoder.onnx", self.checkpoint, model, quantization, weights, tokens
            )
            self.sections["decoder"] = weights.size
        write_int8_cache_decoder(self.staging, self.checkpoint, model)

        # 4. The encoders with their projectors.
        for name, encoder in encoders.items():
            self.sections[name] = encoder.write(self.staging, self.encoders.bits)
        progress.finish()

    def write_assets(self) -> None:
        """Copy what the daemon needs to turn messages into ids and back."""
        path = self.checkpoint.assets
        assets.copy_tokenizer(path, self.staging)
        assets.write_licence(path, self.staging)
        if not assets.write_chat_template(path, self.staging):
            self.log.write(
                "note: the checkpoint has no chat template, so the bundle completes plain text\n"
            )

    def write_manifest(self, slices: list[Slice], name: str, source: str) -> None:
        """Digest every file and write the manifest, last."""
        lm_head = self.sections["embed_tokens"]
        if self.quantization.lm_head_screen:  # the screen is part of the decoder's own bytes
            lm_head = lm_head * SCREENED_ROWS // self.model.vocab_size
        submodels = sorted(
            (cost(self.model, self.quantization, item, self.decoder, lm_head) for item in slices),
            key=lambda item: item.effective_params,
        )
        cache = self.model.kv_cache_bytes(MINIMUM_CONTEXT, MINIMUM_CONTEXT, kv_bits=32)
        manifest = Manifest(
            format_version=2,
            name=name,
            source=Source(
                checkpoint=source if not Path(source).exists() else self.checkpoint.path.name,
                architecture=_architecture(self.checkpoint),
                converter=f"nestd {version('nestd')}",
            ),
            model=self.model,
            quantization=self.quantization,
            modalities=self.encoders.modalities,
            vision=self.encoders.vision,
            audio=self.encoders.audio,
            sections=self.sections,
            submodels=tuple(submodels),
            tokens=assets.read_tokens(self.checkpoint.assets, self.checkpoint.config),
            generation=assets.read_generation_defaults(self.checkpoint.assets),
            minimum_ram_bytes=submodels[0].decoder_bytes + cache + OVERHEAD_BYTES,
            files={
                file.name: BundleFile(bytes=file.stat().st_size, sha256=sha256_file(file))
                for file in sorted(self.staging.iterdir())
            },
        )
        text = manifest.model_dump_json(indent=1)
        (self.staging / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read_submodels(path: Path, chosen: Path | None) -> tuple[int | None, list[Slice]]:
    """Return (nested width or None, sub-models or none) from a YAML file."""
    file = chosen or path / SUBMODELS_FILE
    if chosen is None and not file.is_file():
        return None, []
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    slices = parse_slices(document, str(file))
    nested = document.get("nested_intermediate_size")
    if nested is not None and (not isinstance(nested, int) or nested < 1):
        raise CheckpointError(f"{file}: nested_intermediate_size must be a positive whole number")
    return nested, slices


def _encoder_writers(checkpoint: Checkpoint, plan: EncoderPlan) -> dict[str, EncoderWriter]:
    """Return what writes each encoder; CheckpointError where torch and optimum are missing."""
    if plan.modalities == ("text",):
        return {}
    try:
        from nestd.conversion.encoders.write import EncoderWriter
    except ImportError as error:
        raise CheckpointError(
            f"the encoders of {checkpoint.path} need more libraries ({error}): pip install "
            "'nestd[convert]', or convert the text part alone with --modalities text"
        ) from error
    writers = {}
    if plan.vision:
        writers["vision_encoder"] = EncoderWriter.vision(checkpoint, plan.vision.sizes)
    if plan.audio:
        writers["audio_encoder"] = EncoderWriter.audio(checkpoint)
    return writers


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures") or [checkpoint.config["model_type"]]
    return str(names[0])


@contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """Yield a directory beside `destination` that is gone afterwards unless it was renamed."""
    parent = destination.absolute().parent
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    staging.chmod(0o755)
    try:
        yield staging
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BundleError(
                f"the disk of {parent} is full: free some space and convert again"
            ) from error
        raise
    finally:
        if staging.is_dir():
            shutil.rmtree(staging)
