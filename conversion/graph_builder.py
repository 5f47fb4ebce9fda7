"""A thin writer of ONNX graphs: nodes, initializers and If branches, weights streamed on the way.

Every activation inside a graph is [rows, features]. An initializer belongs to the graph whose node
reads it, If branches included: ONNX Runtime prepacks a weight only in its own graph, and a matrix
that is not prepacked is dequantised at every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from nestd.conversion.quantize import block_for
from nestd.conversion.weights import Matrix, WeightFile

OPSET = 23
IR_VERSION = 11
MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024


class GraphBuilder:
    """Builds one graph or one If branch of it.

    Attributes:
        weights: the file that this graph's large initializers stream to.
        block_size: preferred quantisation block of linears.
    """

    def __init__(
        self,
        name: str,
        weights: WeightFile,
        block_size: int,
        counter: itertools.count[int] | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.block_size = block_size
        self._counter = counter or itertools.count()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[TensorProto] = []

    def branch(self, name: str) -> GraphBuilder:
        """Return a builder for an If branch; it may read this graph's values by name."""
        return GraphBuilder(name, self.weights, self.block_size, self._counter)

    def op(
        self,
        op_type: str,
        *inputs: str,
        output: str | None = None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401  (ONNX attributes)
    ) -> str:
        """Add a node with one output and return the output's name."""
        (result,) = self.ops(op_type, *inputs, outputs=[output or ""], domain=domain, **attributes)
        return result

    def ops(
        self,
        op_type: str,
        *inputs: str,
        outputs: Sequence[str] | int,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401  (ONNX attributes)
    ) -> list[str]:
        """Add a node with several outputs: their names (empty ones chosen here) or their number."""
        node = f"{op_type}_{next(self._counter)}"
        names = [""] * outputs if isinstance(outputs, int) else list(outputs)
        names = [given or f"{node}:{index}" for index, given in enumerate(names)]
        self._nodes.append(
            helper.make_node(op_type, inputs, names, name=node, domain=domain, **attributes)
        )
        return names

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Add an inline initializer and return its name."""
        name = f"constant_{next(self._counter)}"
        self._initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, value: npt.NDArray[np.float32]) -> str:
        """Add a float32 initializer, in the weight file unless it is tiny."""
        if value.nbytes <= INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(value, name))
        else:
            self._initializers.append(self.weights.array(name, value))
        return name

    def initializer(self, tensor: TensorProto) -> str:
        """Add an initializer whose data lie elsewhere and return its name."""
        self._initializers.append(tensor)
        return tensor.name

    def linear(self, x: str, name: str, source: Matrix, bits: int) -> str:
        """Multiply rows `x` [rows, K] by the transpose of `source` [N, K]; return [rows, N].

        Too narrow a matrix for a quantisation block stays float32.
        """
        block = None if bits == 32 else block_for(source.columns, self.block_size)
        if block is None:
            weight = self.initializer(self.weights.floats(name, source))
            return self.op("Gemm", x, weight, transB=1)
        packed, scales = self.weights.quantized(name, source, bits, block)
        return self.quantized_linear(x, packed, scales, bits, block)

    def quantized_linear(
        self, x: str, packed: TensorProto, scales: TensorProto, bits: int, block: int
    ) -> str:
        """Multiply rows `x` by quantised weights with the layout of `WeightFile.quantized`."""
        node, tensors = matmul_nbits(x, packed, scales, bits, block)
        node.name = f"MatMulNBits_{next(self._counter)}"
        node.output.append(f"{node.name}:0")
        self._initializers.extend(tensors)
        self._nodes.append(node)
        return str(node.output[0])

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape `x` to `shape` (-1 is worked out, 0 copies the dimension)."""
        return self.op("Reshape", x, self.constant(shape, np.int64))

    def rms_norm(self, x: str, scale: str, epsilon: float) -> str:
        """Normalise the last axis of `x` by its root mean square and multiply by `scale`."""
        return self.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon)

    def branch_graph(self, outputs: Sequence[str]) -> onnx.GraphProto:
        """Return this branch as the graph attribute of an If; its outputs are floats."""
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        return helper.make_graph(self._nodes, self.name, [], infos, self._initializers)

    def save(
        self,
        path: Path,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Write the model; its large weights are in the weight file already."""
        graph = helper.make_graph(
            self._nodes, self.name, list(inputs), list(outputs), self._initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nestd"
        )
        helper.set_model_props(model, metadata or {})
        path.write_bytes(model.SerializeToString())


def tensor_info(name: str, elem_type: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Return a graph input or output; strings are dynamic dimensions."""
    return helper.make_tensor_value_info(name, elem_type, shape)


def matmul_nbits(
    x: str, packed: TensorProto, scales: TensorProto, bits: int, block: int, *outputs: str
) -> tuple[onnx.NodeProto, list[TensorProto]]:
    """Return a MatMulNBits on weights with the layout of `WeightFile.quantized`, and those.

    `accuracy_level` 4 quantises activations to int8 per block; at any other level ONNX Runtime
    dequantises the whole matrix at every run.
    """
    rows, row_bytes = packed.dims
    columns = row_bytes * 8 // bits
    shaped = TensorProto()
    shaped.CopyFrom(packed)
    del shaped.dims[:]
    shaped.dims.extend([rows, columns // block, block * bits // 8])
    node = helper.make_node(
        "MatMulNBits",
        [x, packed.name, scales.name],
        outputs,
        domain=MICROSOFT,
        N=rows,
        K=columns,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    return node, [shaped, scales]
