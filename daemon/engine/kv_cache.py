"""Keys and values of all running sequences: slots of buffers that ONNX Runtime extends in place.

One pair [slots, kv_heads, capacity, head_dim] for each layer that owns a cache, float32 or int8;
all other layers read one of these. Its shape is the same for every sub-model, so a sequence may
change its sub-model between any two tokens. Buffers of sliding layers have the capacity of the
window and hold the tokens from `start` on (`window.py`). Rows behind the last token are garbage.

Sequences that step together lie in neighbouring slots, so a batch is a view and no copy. This file
alone knows the layout.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import ModelConfig
from nestd.daemon.engine.residency import advise
from nestd.daemon.engine.window import Window

Rows = npt.NDArray[np.generic]  # float32 or int8
Buffers = dict[str, Rows]


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
    """A copy of a sequence's rows, outside of any slot: [kv_heads, rows, head_dim] each.

    Attributes:
        buffers: of sliding layers the tokens [start, length), of others [0, length).
    """

    buffers: Buffers
    start: int
    length: int
    window: Window

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(item.nbytes for item in self.buffers.values())

    def holds(self, count: int) -> bool:
        """Whether a sequence can go on behind the first `count` tokens."""
        return count <= self.length and self.window.holds(self.start, count)


class KVCaches:
    """Slots for sequences of up to `capacity` tokens each.

    Attributes:
        slots: how many sequences fit.
        capacity: tokens that fit in each.
        window: the shape of sliding layers' caches.
        buffers: [slots, ...] by graph input name without prefix, for example `0.key`.
        sliding: names of the buffers of sliding layers.
    """

    def __init__(
        self,
        model: ModelConfig,
        slots: int,
        capacity: int,
        window: Window | None = None,
        kv_bits: Literal[8, 32] = 32,
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self.window = window or Window.of(model.sliding_window, capacity, None)
        self._bytes_of = partial(model.kv_cache_bytes, kv_bits=kv_bits)
        self.buffers: Buffers = {}
        self.sliding: set[str] = set()
        for layer in range(model.first_kv_shared_layer):
            rows = self.window.capacity if model.slides(layer) else capacity
            shape = (slots, model.num_key_value_heads, rows, model.head_dim)
            for part in ("key", "value"):
                name = f"{layer}.{part}"
                self.buffers[name] = _zero_pages(shape, np.float32 if kv_bits == 32 else np.int8)
                if model.slides(layer):
                    self.sliding.add(name)
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
        return self._bytes_of(tokens, self.window.capacity)

    def rows_of(self, name: str, cache: KVCache) -> int:
        """Return how many rows of the buffer `name` the sequence has in its slot."""
        return cache.length - (cache.start if name in self.sliding else 0)

    def _view(self, first: int, count: int) -> View:
        view = self._views.get((first, count))
        if view is None:
            buffers = {name: item[first : first + count] for name, item in self.buffers.items()}
            view = self._views[first, count] = View(first, buffers)
        return view

    def _exchange(self, one: int, other: int) -> None:
        """Let the sequence in slot `one` and what is in slot `other`, if any, change places."""
        here, there = self._owners.pop(one), self._owners.pop(other, None)
        for name, buffer in self.buffers.items():
            kept = None if there is None else buffer[other, :, : self.rows_of(name, there)].copy()
            rows = self.rows_of(name, here)
            buffer[other, :, :rows] = buffer[one, :, :rows]
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
        start: the first token in the buffers of sliding layers.
    """

    def __init__(self, caches: KVCaches, slot: int) -> None:
        self.caches = caches
        self.slot = slot
        self.start = 0
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens in the cache; lower it to forget the last ones.

        Raises:
            ValueError: what the next token would see has left the window.
        """
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not self.caches.window.holds(self.start, length):
            raise ValueError(f"tokens before {self.start} are gone: no way back to {length}")
        self._length = length

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.caches.capacity - self.length

    def make_room(self, rows: int) -> None:
        """Let `rows` more tokens fit the buffers of sliding layers.

        Raises:
            ValueError: more than a window takes in one step.
        """
        start = self.caches.window.start_for(self.start, self.length, rows)
        if start != self.start:
            first, last = start - self.start, self.length - self.start
            for name in self.caches.sliding:
                buffer = self.caches.buffers[name][self.slot]
                buffer[:, : last - first] = buffer[:, first:last]
            self.start = start

    def copy(self) -> KVRows:
        """Return a copy of the rows."""
        rows = {
            name: buffer[self.slot, :, : self.caches.rows_of(name, self)].copy()
            for name, buffer in self.caches.buffers.items()
        }
        return KVRows(rows, self.start, self.length, self.caches.window)

    def fill(self, rows: KVRows, count: int) -> None:
        """Take the first `count` tokens of `rows`; whatever was here is forgotten.

        Raises:
            ValueError: the window of `rows` has moved beyond them.
        """
        if not rows.holds(count):
            raise ValueError(f"{count} tokens are not what a sequence can go on from")
        # A smaller window than the one that these come from takes what it needs.
        self.start = self.caches.window.start_for(rows.start, count, 0)
        self.length = count
        for name, buffer in self.caches.buffers.items():
            first = self.start - rows.start if name in self.caches.sliding else 0
            wanted = self.caches.rows_of(name, self)
            buffer[self.slot, :, :wanted] = rows.buffers[name][:, first : first + wanted]


def _zero_pages(shape: tuple[int, ...], kind: type[np.float32] | type[np.int8]) -> Rows:
    """Return zeros of which only what is written becomes resident, in pages of the usual size.

    With huge pages a short answer would hold 2 MiB for each head of each layer.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, np.dtype(kind).itemsize * math.prod(shape), flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(shape)
