"""Which pages of the mapped weights are in memory: handed back when unused, fetched when needed.

ONNX Runtime maps the prepared decoder's data file privately and never writes to it, so its pages
may be dropped at any time: the next access takes them from the file again (madvise, Linux).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nestd.bundle.manifest import ModelConfig, Submodel
from nestd.daemon.engine.prepare import DATA, ORIGINALS, PARTS, ROWS

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
        self._originals = [(offset, length) for offset, length in document[ORIGINALS]]
        mapped = sorted(mappings(self._data), key=lambda item: item[2])
        # Looked up once: there are a thousand regions and as many mappings.
        self._ranges = {
            name: [part for region in regions for part in addresses(region, mapped)]
            for name, regions in document.items()
        }
        self._advise(self._ranges.keys() & {ROWS}, mmap.MADV_RANDOM)
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch-weights")

    def retain(self, submodel: Submodel) -> None:
        """Drop every page that `submodel` does not need, and start to fetch those that it does.

        Dropped pages are the kernel's at once: clean copies of the file, which it may keep as cache
        until somebody needs the memory. Fetching goes on in the background.
        """
        needed = needed_parts(self._model, submodel)
        self._advise(self._ranges.keys() - needed, mmap.MADV_DONTNEED)
        self._fetcher.submit(self._advise, needed & self._ranges.keys(), mmap.MADV_WILLNEED)

    def drop_all(self) -> None:
        """Drop every page: loading has touched them all, running will touch those that it needs.

        The originals are never read again, so they leave the kernel's cache too.
        """
        self._advise(self._ranges, mmap.MADV_DONTNEED)
        with self._data.open("rb") as file:
            for offset, length in self._originals:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)

    def _advise(self, names: Iterable[str], advice: int) -> None:
        for name in names:
            for address, length in self._ranges[name]:
                advise(address, length, advice)


def needed_parts(model: ModelConfig, submodel: Submodel) -> set[str]:
    """Return the names of the parts that `submodel` runs."""
    kept = set(range(model.num_layers)) - set(submodel.skipped_layers)
    layers = {f"layers.{layer}" for layer in kept}
    return {"common", *layers, *(f"layers.{layer}.wide" for layer in submodel.wide_layers)}


def addresses(region: Region, mapped: Sequence[tuple[int, int, int]]) -> Iterator[Region]:
    """Yield (address, bytes) where the `region` of a file lies in memory.

    `mapped` holds (address, bytes, file offset), ascending by offset. A page may be mapped by two
    neighbours, so more than one mapping may hold the end of a region.
    """
    offset, length = region
    last = bisect_left(mapped, offset + length, key=lambda item: item[2])
    for start, size, file_offset in reversed(mapped[:last]):
        if file_offset + size <= offset:
            break
        first = max(offset, file_offset)
        yield start + first - file_offset, min(offset + length, file_offset + size) - first


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
