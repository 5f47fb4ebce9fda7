"""One linear in each form that a decoder may have: milliseconds and error on this CPU.

    python benchmarks/cpu_paths.py
    .arm64/python-cortex-a72 benchmarks/cpu_paths.py     # emulated, see docs/arm.md

Prints a table. Weights are gaussian; one feature in 32 of each row of activations is ten times as
large as the others. Emulated times compare integer forms on one CPU with each other, no more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from nestd.conversion.graph_builder import GraphBuilder, tensor_info
from nestd.conversion.weights import Matrix, WeightFile
from nestd.daemon.engine import per_channel
from nestd.daemon.engine.cpu_class import detect
from nestd.daemon.engine.sessions import VERSION, load_graph

ROWS = (1, 64)
BLOCK = 128
MINIMUM_SECONDS = 0.5


def write_linear(directory: Path, weight: npt.NDArray[np.float32], bits: int) -> Path:
    """Write a graph of one linear as the decoder has it; return its file."""
    directory.mkdir()
    rows, columns = weight.shape
    with WeightFile(directory / "linear.data") as file:
        builder = GraphBuilder("linear", file, BLOCK)
        source = Matrix(rows, columns, lambda: iter([weight]))
        y = builder.linear("x", "weight", source, bits)
        builder.op("Identity", y, output="y")
        path = directory / "linear.onnx"
        builder.save(
            path,
            [tensor_info("x", TensorProto.FLOAT, ["rows", columns])],
            [tensor_info("y", TensorProto.FLOAT, ["rows", rows])],
        )
    return path


def measure(path: Path, x: npt.NDArray[np.float32]) -> tuple[float, npt.NDArray[np.float32]]:
    """Return the seconds of one run on one thread and its result."""
    session = load_graph(path, threads=1)
    (y,) = session.run(["y"], {"x": x})
    runs, began = 0, time.process_time()
    while (spent := time.process_time() - began) < MINIMUM_SECONDS:
        session.run(["y"], {"x": x})
        runs += 1
    return spent / runs, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 2048), metavar=("N", "K"))
    rows, columns = parser.parse_args().shape
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), np.float32)
    x = random.standard_normal((max(ROWS), columns), np.float32)
    x[:, random.permutation(columns)[: columns // 32]] *= 10
    exact = x @ weight.T
    print(f"{detect()}, onnxruntime {VERSION}, {rows} x {columns}, one thread\n")
    print("| form | " + " | ".join(f"{n} rows, ms | error" for n in ROWS) + " |")
    print("|---" * (1 + 2 * len(ROWS)) + "|")
    with tempfile.TemporaryDirectory() as work:
        blockwise = write_linear(Path(work) / "8", weight, 8)
        forms = {
            f"8 bits, blocks of {BLOCK}": blockwise,
            "8 bits, per channel": per_channel.derive(blockwise, Path(work) / "channel"),
            f"4 bits, blocks of {BLOCK}": write_linear(Path(work) / "4", weight, 4),
            "float32": write_linear(Path(work) / "32", weight, 32),
        }
        for name, path in forms.items():
            cells = []
            for count in ROWS:
                seconds, y = measure(path, x[:count])
                error = np.linalg.norm(y - exact[:count]) / np.linalg.norm(exact[:count])
                cells.append(f"{1e3 * seconds:.2f} | {error:.4f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
