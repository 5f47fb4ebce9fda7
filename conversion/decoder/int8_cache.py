"""decoder.onnx -> decoder_int8_cache.onnx: the same graph and weights, its KV cache in int8.

The scales need no calibration. Keys and values are RMS-normalised by head, so a head's vector of
head_dim D has at most the length sqrt(D): a value is at most sqrt(D), a key of channel i at most
sqrt(D) times the larger norm weight of the two channels that RoPE turns into each other. A scale
per channel that maps this bound to 127 clips nothing, whatever the text.

ONNX Runtime refuses a quantised cache to layers that read another's unless they have `present`
outputs. So these are outputs of the graph, through both levels of If, to be bound to the source's
buffers as well: ONNX Runtime then writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from nestd.bundle.manifest import ModelConfig
from nestd.conversion.checkpoint import Checkpoint

Scales = npt.NDArray[np.float32]
LARGEST = 127
PARTS = ("key", "value")


def write_int8_cache_decoder(directory: Path, checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Write `decoder_int8_cache.onnx` beside the `decoder.onnx` in `directory`."""
    decoder = onnx.load(directory / "decoder.onnx", load_external_data=False)
    norms = {
        layer: checkpoint.tensor(f"layers.{layer}.self_attn.k_norm.weight", (model.head_dim,))
        for layer in range(model.first_kv_shared_layer)
    }
    _to_int8_cache(decoder, model, norms)
    (directory / "decoder_int8_cache.onnx").write_bytes(decoder.SerializeToString())


def key_scales(model: ModelConfig, norm: npt.NDArray[np.float32]) -> Scales:
    """Return float32 [1, kv_heads, 1, head_dim] from k_norm's weight [head_dim]."""
    halves = np.abs(norm).reshape(2, -1)
    largest = np.tile(halves.max(axis=0), 2)
    return _scales(model, largest)


def value_scales(model: ModelConfig) -> Scales:
    """Return float32 [1, kv_heads, 1, head_dim]."""
    return _scales(model, np.ones(model.head_dim, np.float32))


def _scales(model: ModelConfig, largest: npt.NDArray[np.float32]) -> Scales:
    channels = largest * np.float32(np.sqrt(model.head_dim) / LARGEST)
    shape = (1, model.num_key_value_heads, 1, model.head_dim)
    return np.ascontiguousarray(np.broadcast_to(channels, shape))


def _to_int8_cache(
    decoder: onnx.ModelProto, model: ModelConfig, norms: dict[int, npt.NDArray[np.float32]]
) -> None:
    """Change `decoder` in place; `norms` are k_norm's weights [head_dim] of the cache owners."""
    graph = decoder.graph
    for info in (*graph.input, *graph.output):
        if info.name.startswith(("past_key_values.", "present.")):
            info.type.tensor_type.elem_type = TensorProto.INT8
    for layer, norm in norms.items():
        for part, scales in (("key", key_scales(model, norm)), ("value", value_scales(model))):
            name = f"layers.{layer}.cache.{part}.scales"
            graph.initializer.append(numpy_helper.from_array(scales, name))
    for node in _attention_nodes(graph):
        _quantise(node)
    tail = next(node for node in graph.node if "logits" in node.output)
    for layer in range(model.first_kv_shared_layer, model.num_layers):
        _surface(graph, tail, layer, model.kv_source(layer))


def _attention_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _attention_nodes(attribute.g)


def _quantise(node: onnx.NodeProto) -> None:
    source = node.input[3].split(".")[1]  # past_key_values.{i}.key or present.{i}.key
    node.input.extend([""] * (12 - len(node.input)))
    node.input.extend(f"layers.{source}.cache.{part}.scales" for part in PARTS)
    node.attribute.extend(
        [
            helper.make_attribute("k_quant_type", "PER_CHANNEL"),
            helper.make_attribute("v_quant_type", "PER_CHANNEL"),
            helper.make_attribute("kv_cache_bit_width", 8),
        ]
    )


def _surface(graph: onnx.GraphProto, tail: onnx.NodeProto, layer: int, source: int) -> None:
    """Make `present` of `layer`, which reads the cache of `source`, outputs of the whole graph."""
    inside = _branch(tail, "then_branch")
    around = next(
        node
        for node in inside.node
        if node.op_type == "If" and _branch(node, "then_branch").name == f"layers.{layer}"
    )
    (attention,) = _attention_nodes(_branch(around, "then_branch"))
    for part in PARTS:
        past, name = f"present.{source}.{part}", f"{layer}.{part}"
        attention.output.append(f"attended.{name}")
        _output(_branch(around, "then_branch"), f"attended.{name}")
        _pass_on(_branch(around, "else_branch"), past, f"skipped.{name}")
        around.output.append(f"kept.{name}")
        _output(inside, f"kept.{name}")
        _pass_on(_branch(tail, "else_branch"), past, f"unread.{name}")
        tail.output.append(f"present.{name}")
        info = next(item for item in graph.output if item.name == past)
        graph.output.append(info)
        graph.output[-1].name = f"present.{name}"


def _branch(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    graph: onnx.GraphProto = next(item.g for item in node.attribute if item.name == name)
    return graph


def _pass_on(graph: onnx.GraphProto, past: str, name: str) -> None:
    graph.node.append(helper.make_node("Identity", [past], [name], name=name))
    _output(graph, name)


def _output(graph: onnx.GraphProto, name: str) -> None:
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
