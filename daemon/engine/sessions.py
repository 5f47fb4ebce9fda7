"""ONNX Runtime as nestd uses it; the only file that imports onnxruntime.

Everything runs on the CPU unless execution providers are named (docs/arm.md). A `Session` here is
an `ort.InferenceSession`, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from nestd.bundle.errors import BundleError
from nestd.daemon.engine.messages import CPU_PROVIDERS

VERSION: str = ort.__version__
Session = Any  # ort.InferenceSession, which has no types

# How long a worker thread spins for more work. The default of 25 ms after every run burns a core
# while the daemon waits for nothing; 0.5 ms keeps the speed of decoding (docs/engine.md).
SPIN_MICROSECONDS = "500"


def load_graph(
    path: Path,
    threads: int | None,
    arena: bool = True,
    providers: Sequence[str] = CPU_PROVIDERS,
) -> Session:
    """Load one ONNX graph; its external data lie beside it.

    Args:
        path: the .onnx file.
        threads: intra-operator threads, None for ONNX Runtime's choice.
        arena: keep the memory of activations for the next run; False gives it back after each.
        providers: execution providers, the preferred first; the CPU takes what none of them does.

    Raises:
        BundleError: ONNX Runtime cannot load it, or has not all of `providers`.
    """
    options = _options(threads)
    options.enable_cpu_mem_arena = arena
    return _session(path, options, providers)


def save_prepared(path: Path, graph: Path, data: Path, threads: int | None) -> None:
    """Load the graph at `path` and save it with its rearranged weights as `graph` and `data`.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    options = _options(threads)
    options.optimized_model_filepath = str(graph)
    # Beyond EXTENDED the saved graph would hold operators of this very machine.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for name, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", data.name),
    ):
        options.add_session_config_entry(name, value)
    _session(path, options)


def providers() -> list[str]:
    """Return ONNX Runtime's execution providers here; nestd uses the CPU's only."""
    return list(ort.get_available_providers())


def share(buffer: npt.NDArray[Any]) -> Any:  # noqa: ANN401  (an OrtValue)
    """Return an OrtValue on the memory of `buffer`, which must outlive it."""
    return ort.OrtValue.ortvalue_from_numpy(buffer)


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    return options


def _session(
    path: Path, options: ort.SessionOptions, providers: Sequence[str] = CPU_PROVIDERS
) -> Session:
    available = ort.get_available_providers()
    if missing := [name for name in providers if name not in available]:
        raise BundleError(
            f"engine.execution_providers names {', '.join(missing)}, but this onnxruntime "
            f"{VERSION} has only {', '.join(available)}: install onnxruntime-gpu in its place "
            "(docs/arm.md says where from for a Jetson), or leave the name out"
        )
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
    # One that does not start (its libraries are missing) is left out with no more than a warning.
    if failed := [name for name in providers if name not in session.get_providers()]:
        raise BundleError(
            f"ONNX Runtime cannot start {', '.join(failed)}: its log above says which library is "
            "missing; install that, or leave the name out of engine.execution_providers"
        )
    return session
