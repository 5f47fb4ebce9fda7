"""The disk: room for prepared weights, and how fast the bundle can be read."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import time
from pathlib import Path

from nestd.bundle.manifest import Bundle
from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.doctor.mounts import device_of
from nestd.daemon.engine.prepare import needed_bytes
from nestd.daemon.settings import Settings
from nestd.daemon.units import format_bytes

READ_BYTES = 64 * 2**20
READ_SECONDS = 3.0
PIECE_BYTES = 4 * 2**20
# Reading the smallest sub-model once should not take longer than this.
PATIENCE_SECONDS = 60.0


def space(settings: Settings, bundle: Bundle) -> Finding:
    """Room for the prepared weights and for media."""
    state = settings.state_path
    there = next(path for path in (state, *state.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    needed = settings.media.store_bytes
    if settings.weights == "mapped" and not _is_prepared(bundle, state / "prepared"):
        needed += needed_bytes(bundle)
    seen = f"{state} has {format_bytes(free)} free, {format_bytes(needed)} are still needed"
    if free < needed:
        return failed(
            "disk space",
            seen,
            "free some space, set state_directory to another disk, or set weights: resident",
        )
    return ok("disk space", seen)


def speed(root: Path, bundle: Bundle) -> Finding:
    """How fast the bundle is read from its disk, past the page cache."""
    name = max(bundle.manifest.files, key=lambda item: bundle.manifest.files[item].bytes)
    file = bundle.path / name
    try:
        count, seconds = _read_directly(file)
    except OSError as error:
        return skipped("disk speed", f"{file} cannot be read past the page cache: {error}")
    if count < PIECE_BYTES:
        return skipped("disk speed", "the bundle is too small to tell")
    rate = count / seconds
    smallest = bundle.manifest.submodels[0].decoder_bytes
    wait = smallest / rate
    device = device_of(root, str(bundle.path.resolve())) or "its disk"
    seen = f"{format_bytes(int(rate))}/s from {device}: the smallest sub-model takes {wait:.1f} s"
    if wait > PATIENCE_SECONDS:
        return warning(
            "disk speed",
            seen,
            "put bundle and state_directory on an SSD (NVMe, or USB 3); an SD card should be of "
            "class A2",
        )
    return ok("disk speed", seen)


def _read_directly(file: Path) -> tuple[int, float]:
    """Return how many bytes were read in how many seconds, bounded in both."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        # O_DIRECT wants memory at page boundaries, which an anonymous map is.
        with mmap.mmap(-1, PIECE_BYTES) as piece:
            start, count = time.perf_counter(), 0
            while count < READ_BYTES and time.perf_counter() - start < READ_SECONDS:
                got = os.preadv(descriptor, [piece], count)
                count += got
                if got < PIECE_BYTES:
                    break
            return count, time.perf_counter() - start
    finally:
        os.close(descriptor)


def _is_prepared(bundle: Bundle, directory: Path) -> bool:
    """Say whether weights of this name were prepared; the engine knows whether they still fit."""
    name = re.compile(re.escape(bundle.manifest.name) + r"-[0-9a-f]{16}")
    return directory.is_dir() and any(name.fullmatch(path.name) for path in directory.iterdir())
