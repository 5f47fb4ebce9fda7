"""Prepared weights: a graph with its matrices in the layout that this CPU's kernels want.

ONNX Runtime rearranges ("prepacks") every quantised matrix when it loads a graph, into private
memory: 4.6 GB for E4B at int8. Written to a file once, the rearranged matrices are mapped at the
next load instead: private memory falls to under 100 MB, and the kernel can take back the pages of
any part that does not run.

The files belong to one bundle, one ONNX Runtime version and one kind of CPU, so they are made on
the device, at the first start and again when any of these changes. They hold the original matrices
as well (ONNX Runtime compares): 2.1 times the graph's bytes. The decoder is prepared when the
engine starts, an encoder when it is needed for the first time.

On a CPU without a kernel for blockwise int8 the decoder gets another form first
(`per_channel.py`). Encoders keep theirs: they run hundreds of rows at once, for which dequantising
a matrix costs little.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine import per_channel
from nestd.daemon.engine.cpu_class import CpuClass, detect
from nestd.daemon.engine.sessions import VERSION, save_prepared

GRAPH = "decoder.onnx"
DATA = "decoder.data"
PARTS = "parts.json"
ORIGINALS = "originals"
ROWS = "rows"
# Bytes on disk per byte of weights: originals, rearranged copies, and alignment.
GROWTH = 2.2
# The same while the decoder's other form lies beside them.
GROWTH_PER_CHANNEL = GROWTH + 1

log = logging.getLogger(__name__)


def decoder_graph(kv_bits: Literal[8, 32]) -> str:
    """Return the name of the bundle's decoder graph with a KV cache of that width."""
    return "decoder" if kv_bits == 32 else "decoder_int8_cache"


def prepared_decoder(
    bundle: Bundle, directory: Path, threads: int | None, kv_bits: Literal[8, 32] = 32
) -> Path:
    """Return the directory with the prepared decoder of `bundle`, made now if it is not there.

    Args:
        bundle: what to prepare.
        directory: where prepared weights are kept, one sub-directory a bundle.
        threads: intra-operator threads.
        kv_bits: width of the KV cache.

    Raises:
        BundleError: the disk is too small, or ONNX Runtime refuses the graph.
    """
    source = bundle.file(f"{decoder_graph(kv_bits)}.onnx")
    files = (source.name, "decoder.data", "embed_tokens.")
    return _prepared(bundle, "decoder", source, files, needed_bytes(bundle), directory, threads)


def needed_bytes(bundle: Bundle) -> int:
    """Return how much disk the preparation of the decoder takes on this CPU."""
    growth = GROWTH if detect().blockwise_int8 else GROWTH_PER_CHANNEL
    sections = bundle.manifest.sections
    return int(growth * (sections["decoder"] + sections["embed_tokens"]))


def prepared_encoder(bundle: Bundle, graph: str, directory: Path, threads: int | None) -> Path:
    """Return the prepared graph file of an encoder, made now if it is not there.

    Args:
        bundle: what holds the encoder.
        graph: its name, `audio_encoder` for example.
        directory: where prepared weights are kept.
        threads: intra-operator threads.

    Raises:
        BundleError: as `prepared_decoder`.
    """
    section = graph if graph in bundle.manifest.sections else graph.rpartition("_")[0]
    needed = int(GROWTH * bundle.manifest.sections[section])
    files = (f"{graph}.", f"{section}.")
    source = bundle.file(f"{graph}.onnx")
    return _prepared(bundle, graph, source, files, needed, directory, threads) / source.name


def _prepared(
    bundle: Bundle,
    graph: str,
    source: Path,
    files: tuple[str, ...],
    needed: int,
    directory: Path,
    threads: int | None,
) -> Path:
    """Return the directory with `source` prepared as `graph`; it depends on these `files`."""
    stem = bundle.manifest.name if graph == "decoder" else f"{bundle.manifest.name}-{graph}"
    key = _key(bundle, files)
    target = directory / f"{stem}-{key[:16]}"
    if target.is_dir():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_outdated(stem, directory)
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise BundleError(
                f"the prepared weights need {needed / 1e9:.1f} GB, {directory} has "
                f"{free / 1e9:.1f} GB free: free some space, or set `weights: resident`"
            )
        _make(bundle, graph, source, target, threads)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "make it writable"
        raise BundleError(
            f"cannot write prepared weights to {directory} ({error}): {remedy}, "
            "or set `weights: resident`"
        ) from error
    return target


def _make(bundle: Bundle, graph: str, source: Path, target: Path, threads: int | None) -> None:
    cpu = detect()
    log.info("preparing weights for this CPU: %s, %s; this takes a while, once", graph, cpu)
    start = time.monotonic()
    staging = Path(tempfile.mkdtemp(prefix=".preparing-", dir=target.parent))
    try:
        file = staging / f"{graph}.onnx"
        derived = staging / "derived"
        if file.name == GRAPH and not cpu.blockwise_int8:
            log.info("this CPU has no kernel for blockwise int8: one scale a channel instead")
            source = per_channel.derive(source, derived)
        save_prepared(source, file, staging / f"{graph}.data", threads)
        if derived.is_dir():
            shutil.rmtree(derived)
        if file.name == GRAPH:
            parts = json.dumps(_parts(file, bundle.manifest.model.nested_intermediate_size))
            (staging / PARTS).write_text(parts, encoding="ascii")
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        if staging.is_dir():
            shutil.rmtree(staging)
    log.info("weights prepared in %.0f s", time.monotonic() - start)


def _key(bundle: Bundle, files: tuple[str, ...]) -> str:
    entries = bundle.manifest.files
    parts = [entries[name].sha256 for name in sorted(entries) if name.startswith(files)]
    return hashlib.sha256("\n".join([*parts, VERSION, _cpu(detect())]).encode()).hexdigest()


def _cpu(cpu: CpuClass) -> str:
    """Return what the choice of kernels and of the graph's form depends on."""
    return "\n".join([cpu.machine, cpu.name, *cpu.features])


def _remove_outdated(stem: str, directory: Path) -> None:
    """Remove what was prepared for the same graph under another key, and broken attempts."""
    name = re.compile(re.escape(stem) + r"-[0-9a-f]{16}")
    for path in directory.iterdir():
        if path.name.startswith(".preparing-") or name.fullmatch(path.name):
            log.info("removing outdated prepared weights %s", path.name)
            shutil.rmtree(path)


def _parts(graph: Path, nested: int) -> dict[str, list[tuple[int, int]]]:
    """Return the (offset, bytes) regions of the data file by the part of the model they serve.

    Parts are `layers.3`, `layers.3.wide`, `common`, ROWS: a table of which a few rows are read here
    and there, and ORIGINALS: matrices that are only compared at load time and never read again.
    """
    import onnx  # here, because it is needed once in a bundle's life on a device

    model = onnx.load(graph, load_external_data=False)
    wide = re.compile(rf"(layers\.\d+)\.mlp\.\w+\.{nested}(\.scales)?")
    table = re.compile(r"(layers\.\d+)\.mlp\.(up|down)_rows")
    regions: dict[str, list[tuple[int, int]]] = defaultdict(list)
    tensors = list(_initializers(model.graph))
    screened = any(tensor.name.startswith("lm_head.screen") for tensor in tensors)
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") != DATA:
            continue
        own = (int(entries["offset"]), int(entries["length"]))
        if match := table.fullmatch(tensor.name):
            half = own[1] * nested // tensor.dims[0]
            regions[match[1]].append((own[0], half))
            regions[f"{match[1]}.wide"].append((own[0] + half, own[1] - half))
            continue
        if match := wide.fullmatch(tensor.name):
            part = f"{match[1]}.wide"
        elif match := re.match(r"layers\.\d+", tensor.name):
            part = match[0]
        elif tensor.name.startswith("embed_tokens.") and screened:
            part = ROWS
        else:
            part = "common"
        packed = [value for key, value in entries.items() if key.startswith("prepacked_")]
        for value in packed:
            # `key|offset;bytes;flags`, several separated by further bars.
            for piece in value.split("|")[1:]:
                offset, length = piece.split(";")[:2]
                regions[part].append((int(offset), int(length)))
        regions[ORIGINALS if packed else part].append(own)
    return regions


def _initializers(graph: Any) -> Iterator[Any]:  # noqa: ANN401  (protobuf)
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _initializers(attribute.g)
