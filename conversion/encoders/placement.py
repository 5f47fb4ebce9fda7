"""Exported graph -> the bundle's: placeholders become operators, weights go to the weight file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nestd.conversion.checkpoint import Checkpoint
from nestd.conversion.encoders.config import ENCODER_BLOCK_SIZE
from nestd.conversion.graph_builder import (
    INLINE_BYTES,
    IR_VERSION,
    MICROSOFT,
    OPSET,
    matmul_nbits,
)
from nestd.conversion.quantize import block_for
from nestd.conversion.weights import DATA_TYPES, WeightFile, matrix

# Of the placeholders (`linears`).
DOMAIN = "nestd"


class EncoderWeights:
    """The weights of one encoder in its file; graphs of several sizes share each of them.

    Attributes:
        file: the weight file.
        bits: width of matrices; 32 keeps float32.
    """

    def __init__(self, checkpoint: Checkpoint, file: WeightFile, bits: int) -> None:
        self.file = file
        self.bits = bits
        self._checkpoint = checkpoint
        self._linears: dict[str, list[TensorProto]] = {}
        self._arrays: dict[str, TensorProto] = {}

    def linear(self, x: str, weight: str, output: str) -> tuple[NodeProto, list[TensorProto]]:
        """Return the node that multiplies `x` [..., K] by `weight` [N, K], and its initializers.

        Too narrow a matrix for a quantisation block stays float32.
        """
        source = matrix(self._checkpoint, weight, self._checkpoint.encoders[weight].shape)
        block = None if self.bits == 32 else block_for(source.columns, ENCODER_BLOCK_SIZE)
        if weight not in self._linears:
            if block is None:
                value = np.concatenate(list(source.chunks())).T
                self._linears[weight] = [self.file.array(weight, value)]
            else:
                pair = self.file.quantized(weight, source, self.bits, block)
                self._linears[weight] = list(pair)
        tensors = self._linears[weight]
        if block is None:
            return helper.make_node("MatMul", [x, weight], [output]), tensors
        return matmul_nbits(x, tensors[0], tensors[1], self.bits, block, output)

    def place(self, tensor: TensorProto) -> TensorProto:
        """Return the initializer with its data in the weight file, unless it is tiny."""
        value = numpy_helper.to_array(tensor)
        if value.nbytes <= INLINE_BYTES or value.dtype not in DATA_TYPES:
            return tensor
        digest = hashlib.sha256(value.tobytes()).hexdigest() + str(value.shape)
        if digest not in self._arrays:
            self._arrays[digest] = self.file.array(tensor.name, value)
        placed = TensorProto()
        placed.CopyFrom(self._arrays[digest])
        placed.name = tensor.name
        return placed


def write_graph(model: onnx.ModelProto, path: Path, weights: EncoderWeights) -> None:
    """Write the exported `model` with its weights placed."""
    graph = model.graph
    nodes: list[NodeProto] = []
    initializers = {item.name: weights.place(item) for item in graph.initializer}
    for node in graph.node:
        if (constant := _large_constant(node)) is not None:
            initializers[constant.name] = weights.place(constant)
            continue
        placed, tensors = _replace(node, weights)
        placed.name = node.name
        nodes.append(placed)
        initializers.update({tensor.name: tensor for tensor in tensors})
    _replace_all(graph.node, nodes)
    _replace_all(graph.initializer, initializers.values())
    del graph.value_info[:]
    # No operator of the exporter's opset that these graphs use means something else in ours.
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)])
    model.ir_version = IR_VERSION
    model.producer_name = "nestd"
    graph.name = path.stem
    path.write_bytes(model.SerializeToString())


def _large_constant(node: NodeProto) -> TensorProto | None:
    """Return the tensor of a Constant node that belongs in the weight file: a folded table."""
    if node.op_type != "Constant" or node.attribute[0].name != "value":
        return None
    tensor: TensorProto = node.attribute[0].t
    if len(tensor.raw_data) <= INLINE_BYTES:
        return None
    tensor.name = node.output[0]
    return tensor


def _replace(node: NodeProto, weights: EncoderWeights) -> tuple[NodeProto, list[TensorProto]]:
    if node.domain != DOMAIN:
        return node, []
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Linear":
        return weights.linear(node.input[0], attributes["weight"].decode(), node.output[0])
    norm = helper.make_node(
        "RMSNormalization", node.input, node.output, axis=-1, epsilon=attributes["epsilon"]
    )
    return norm, []


def _replace_all(field: object, items: Iterable[object]) -> None:
    items = list(items)
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]
