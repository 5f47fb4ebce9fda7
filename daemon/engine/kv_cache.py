"""Keys and values of all running sequences: slots of buffers that ONNX Runtime extends in place.

One float32 pair [slots, kv_heads, capacity, head_dim] for each layer that owns a cache; all other
layers read one of these. Its shape is the same for every sub-model, so a sequence may change its
sub-model between any two tokens. Rows behind `length` are garbage.

Sequences that step together lie in neighbouring slots, so a batch is a view and no copy. This file
alone knows the layout.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import ModelConfig
from nestd.daemon.engine.residency import advise

Buffers = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class View:
    """Neighbouring slots as the decoder's inputs and outputs.

    Attributes:
        first: the first slot.
        buffers: as those of the caches, of these slots only.
    """

    first: int
    buffers: Buffers


@dataclass(frozen=True, eq=False, slots=True)
class KVRows:
    """A copy of a sequence's rows, outside of any slot: [kv_heads, length, head_dim] each."""

    buffers: Buffers
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(item.nbytes for item in self.buffers.values())


class KVCaches:
    """Slots for sequences of up to `capacity` tokens each.

    Attributes:
        slots: how many sequences fit.
        capacity: tokens that fit in each.
        buffers: [slots, ...] by graph input name without prefix, for example `0.key`.
    """

    def __init__(self, model: ModelConfig, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        shape = (slots, model.num_key_value_heads, capacity, model.head_dim)
        self.buffers: Buffers = {
            f"{layer}.{part}": _zero_pages(shape)
            for layer in range(model.first_kv_shared_layer)
            for part in ("key", "value")
        }
        # Weak, or the two would keep each other's memory alive.
        self._owners: WeakValueDictionary[int, KVCache] = WeakValueDictionary()
        self._views: dict[tuple[int, int], View] = {}

    def new(self) -> KVCache:
        """Return an empty sequence in a free slot.

        Raises:
            ValueError: all slots are taken.
        """
        slot = next((slot for slot in range(self.slots) if slot not in self._owners), None)
        if slot is None:
            raise ValueError(f"all {self.slots} slots of the KV cache are taken")
        cache = self._owners[slot] = KVCache(self, slot)
        return cache

    def together(self, sequences: Sequence[KVCache]) -> View:
        """Return the view of exactly these `sequences`, moving as few rows as that takes.

        Where each of them lies in it is its `slot` less the view's `first`.
        """
        count = len(sequences)
        wanted = set(sequences)

        def moved(first: int) -> int:
            inside = range(first, first + count)
            return sum(
                1 + owner.length
                for owner in self._owners.values()
                if (owner.slot in inside) != (owner in wanted)
            )

        first = min(range(self.slots - count + 1), key=moved)
        inside = range(first, first + count)
        strangers = [slot for slot in inside if self._owners.get(slot) not in wanted]
        for slot in strangers:
            outside = next(item for item in sequences if item.slot not in inside)
            self._exchange(outside.slot, slot)
        return self._view(first, count)

    def free(self, cache: KVCache) -> None:
        """Give the slot of `cache` and its memory back."""
        del self._owners[cache.slot]
        self._discard(cache.slot)

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes of so many tokens of one sequence."""
        rows = self.slots * self.capacity
        return sum(tokens * buffer.nbytes // rows for buffer in self.buffers.values())

    def _view(self, first: int, count: int) -> View:
        view = self._views.get((first, count))
        if view is None:
            buffers = {name: item[first : first + count] for name, item in self.buffers.items()}
            view = self._views[first, count] = View(first, buffers)
        return view

    def _exchange(self, one: int, other: int) -> None:
        """Let the sequence in slot `one` and what is in slot `other`, if any, change places."""
        here, there = self._owners.pop(one), self._owners.pop(other, None)
        for buffer in self.buffers.values():
            kept = None if there is None else buffer[other, :, : there.length].copy()
            buffer[other, :, : here.length] = buffer[one, :, : here.length]
            if kept is not None:
                buffer[one, :, : kept.shape[1]] = kept
        here.slot = other
        self._owners[other] = here
        if there is None:
            self._discard(one)
        else:
            there.slot = one
            self._owners[one] = there

    def _discard(self, slot: int) -> None:
        """Give the pages of a slot back to the kernel; they are zeros when they are next read."""
        for buffer in self.buffers.values():
            advise(buffer[slot].ctypes.data, buffer[slot].nbytes, mmap.MADV_DONTNEED)


class KVCache:
    """One sequence in its slot.

    Attributes:
        slot: where it lies now.
        length: tokens in the cache; lower it to forget the last ones.
    """

    def __init__(self, caches: KVCaches, slot: int) -> None:
        self.caches = caches
        self.slot = slot
        self.length = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.caches.capacity - self.length

    def copy(self) -> KVRows:
        """Return a copy of the rows."""
        rows = {
            name: buffer[self.slot, :, : self.length].copy()
            for name, buffer in self.caches.buffers.items()
        }
        return KVRows(rows, self.length)

    def fill(self, rows: KVRows, count: int) -> None:
        """Take the first `count` of `rows`; whatever was here is forgotten."""
        for name, buffer in self.caches.buffers.items():
            buffer[self.slot, :, :count] = rows.buffers[name][:, :count]
        self.length = count


def _zero_pages(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return zeros of which only what is written becomes resident, in pages of the usual size.

    With huge pages a short answer would hold 2 MiB for each head of each layer.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
