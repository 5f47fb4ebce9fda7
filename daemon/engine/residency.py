"""Which pages of the mapped weights are in memory: handed back when unused, fetched when needed.

ONNX Runtime maps the prepared decoder's data file privately and never writes to it, so its pages
may be dropped at any time: the next access takes them from the file again (madvise, Linux).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nestd.bundle.manifest import ModelConfig, Submodel
from nestd.daemon.engine.prepare import DATA, ORIGINALS, PARTS

Region = tuple[int, int]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Residency:
    """The mapped weights of one prepared decoder, by part of the model.

    Make it after the graph has been loaded: it looks up where ONNX Runtime has mapped the file.
    """

    def __init__(self, prepared: Path, model: ModelConfig) -> None:
        self._model = model
        self._data = prepared / DATA
        document = json.loads((prepared / PARTS).read_text(encoding="ascii"))
        self._parts = {name: [(r[0], r[1]) for r in regions] for name, regions in document.items()}
        self._mappings = list(mappings(self._data))
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch-weights")

    def retain(self, submodel: Submodel) -> None:
        """Drop every page that `submodel` does not need, and start to fetch those that it does.

        Dropped pages are the kernel's at once: clean copies of the file, which it may keep as cache
        until somebody needs the memory. Fetching goes on in the background.
        """
        needed = needed_parts(self._model, submodel)
        for name, regions in self._parts.items():
            if name not in needed:
                self._advise(regions, mmap.MADV_DONTNEED)
        wanted = [region for name in needed for region in self._parts.get(name, ())]
        self._fetcher.submit(self._advise, wanted, mmap.MADV_WILLNEED)

    def drop_all(self) -> None:
        """Drop every page: loading has touched them all, running will touch those that it needs.

        The originals are never read again, so they leave the kernel's cache too.
        """
        for regions in self._parts.values():
            self._advise(regions, mmap.MADV_DONTNEED)
        with self._data.open("rb") as file:
            for offset, length in self._parts.get(ORIGINALS, ()):
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)

    def _advise(self, regions: Iterable[Region], advice: int) -> None:
        for offset, length in regions:
            for start, size, file_offset in self._mappings:
                first = max(offset, file_offset)
                last = min(offset + length, file_offset + size)
                if first < last:
                    advise(start + first - file_offset, last - first, advice)


def needed_parts(model: ModelConfig, submodel: Submodel) -> set[str]:
    """Return the names of the parts that `submodel` runs."""
    kept = set(range(model.num_layers)) - set(submodel.skipped_layers)
    layers = {f"layers.{layer}" for layer in kept}
    return {"common", *layers, *(f"layers.{layer}.wide" for layer in submodel.wide_layers)}


def mappings(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (address, bytes, file offset) of each mapping of `path` in this process."""
    suffix = str(path.resolve())
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == suffix:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                yield start, end - start, int(fields[2], 16)


def advise(address: int, length: int, advice: int) -> None:
    """Give the kernel `advice` about the whole pages within a range of addresses.

    Raises:
        OSError: the kernel refuses it.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and _libc.madvise(first, last - first, advice):
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")
