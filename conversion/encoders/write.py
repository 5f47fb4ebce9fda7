"""The encoders of one bundle: graphs, weights and hard embeddings.

    vision_encoder_{size}.onnx: pixel_values float32 [batch, 3, size, size] in 0..1
        -> image_features float32 [batch, count, hidden_size]
    audio_encoder.onnx: input_features float32 [batch, frames, bands],
        input_features_mask bool [batch, frames], True for sound
        -> audio_features float32 [batch, tokens, hidden_size], audio_features_mask bool [batch,
        tokens], True for sound; tokens = (frames - 1) // 16 + 1 in Gemma 3n
    {modality}_hard_embeddings.npy: float32 [hard_ids, hidden_size]

Source: get_image_features, get_audio_features and Gemma3nMultimodalEmbedder of transformers 4.57.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

from nestd.bundle.manifest import Modality
from nestd.conversion.checkpoint import Checkpoint, Float32
from nestd.conversion.encoders import export, towers
from nestd.conversion.encoders.placement import EncoderWeights, write_graph
from nestd.conversion.weights import WeightFile


class EncoderWriter:
    """Writes one encoder. Making it checks config and weights and writes nothing.

    Attributes:
        embedder: the projector, `embed_vision` or `embed_audio`.
        graphs: for each graph's name, what exports it (given a folder for the exporter's files).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modality: Modality,
        embedder: Gemma3nMultimodalEmbedder,
        graphs: Mapping[str, Callable[[Path], ModelProto]],
    ) -> None:
        self.checkpoint = checkpoint
        self.modality = modality
        self.embedder = embedder
        self.graphs = graphs

    @classmethod
    def vision(cls, checkpoint: Checkpoint, sizes: tuple[int, ...]) -> EncoderWriter:
        """Return the writer of a graph for each of `sizes`; CheckpointError."""
        encoder = towers.vision_encoder(checkpoint)
        graphs = {
            f"vision_encoder_{size}": partial(export.export_vision, encoder, size) for size in sizes
        }
        return cls(checkpoint, "vision", encoder.embed_vision, graphs)

    @classmethod
    def audio(cls, checkpoint: Checkpoint) -> EncoderWriter:
        """Return the writer of the audio encoder; CheckpointError."""
        encoder = towers.audio_encoder(checkpoint)
        graphs = {"audio_encoder": partial(export.export_audio, encoder)}
        return cls(checkpoint, "audio", encoder.embed_audio, graphs)

    def write(self, bundle: Path, bits: int) -> int:
        """Write graphs, weights and hard embeddings; return the bytes of weights."""
        np.save(bundle / f"{self.modality}_hard_embeddings.npy", self._hard_embeddings())
        with (
            tempfile.TemporaryDirectory(dir=bundle) as scratch,
            WeightFile(bundle / f"{self.modality}_encoder.data") as file,
        ):
            weights = EncoderWeights(self.checkpoint, file, bits)
            for name, exported in self.graphs.items():
                write_graph(exported(Path(scratch)), bundle / f"{name}.onnx", weights)
            return file.size

    def _hard_embeddings(self) -> Float32:
        """Return the embedding of each id that only this modality has, [hard_ids, hidden_size]."""
        embedder, prefix = self.embedder, f"embed_{self.modality}"
        width = embedder.multimodal_hidden_size

        def tensor(name: str, *shape: int) -> Float32:
            return self.checkpoint.tensor(f"{prefix}.{name}.weight", shape)

        rows = _rms_norm(tensor("embedding", embedder.vocab_size, width), embedder.eps)
        rows *= tensor("hard_embedding_norm", width)
        projection = tensor("embedding_projection", embedder.text_hidden_size, width)
        return _rms_norm(rows @ projection.T, embedder.eps)


def _rms_norm(rows: Float32, epsilon: float) -> Float32:
    mean_square = np.mean(rows**2, axis=-1, keepdims=True)
    normed: Float32 = rows / np.sqrt(mean_square + np.float32(epsilon))
    return normed
