"""Slots of the KV cache: sequences keep their rows when they are moved, and give memory back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine import small_manifest

from nestd.daemon.engine.kv_cache import KVCache, KVCaches, View

MODEL = small_manifest().model
SLOTS, CAPACITY = 5, 12


def append(cache: KVCache, tag: int, count: int) -> None:
    """Write rows that show whose they are and where."""
    for buffer in cache.caches.buffers.values():
        for row in range(cache.length, cache.length + count):
            buffer[cache.slot, :, row] = 100 * tag + row
    cache.length += count


def rows_of(view: View, cache: KVCache) -> list[list[float]]:
    place = cache.slot - view.first
    return [list(item[place, 0, : cache.length, 0]) for item in view.buffers.values()]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_sequences_keep_their_rows_through_any_life(data: st.DataObject) -> None:
    caches = KVCaches(MODEL, SLOTS, CAPACITY)
    live: dict[int, KVCache] = {}
    for tag in range(1, 15):
        action = data.draw(st.sampled_from(["new", "append", "free", "together", "forget"]))
        if action == "new" and len(live) < SLOTS:
            live[tag] = caches.new()
        if not live:
            continue
        some = data.draw(st.lists(st.sampled_from(sorted(live)), min_size=1, unique=True))
        cache = live[some[0]]
        if action == "append":
            append(cache, some[0], data.draw(st.integers(0, cache.room)))
        elif action == "forget":
            cache.length = data.draw(st.integers(0, cache.length))
        elif action == "free":
            caches.free(live.pop(some[0]))
        elif action == "together":
            view = caches.together([live[item] for item in some])
            assert all(len(item) == len(some) for item in view.buffers.values())
            for item in some:
                expected = [100.0 * item + row for row in range(live[item].length)]
                assert all(rows == expected for rows in rows_of(view, live[item]))
    assert len({cache.slot for cache in live.values()}) == len(live)
    for tag, cache in live.items():
        for rows in cache.copy().buffers.values():
            np.testing.assert_array_equal(rows[0, :, 0], 100 * tag + np.arange(cache.length))


def test_neighbours_are_not_moved_and_their_view_is_the_same_again() -> None:
    caches = KVCaches(MODEL, 3, CAPACITY)
    first, second, _ = (caches.new() for _ in range(3))
    view = caches.together([first, second])
    assert (first.slot, second.slot) == (0, 1)
    assert caches.together([second, first]) is view
    buffer = caches.buffers["0.key"]
    assert np.shares_memory(view.buffers["0.key"], buffer)


def test_a_hole_is_closed_by_moving_the_shorter_neighbour() -> None:
    caches = KVCaches(MODEL, 3, CAPACITY)
    short, gone, long = (caches.new() for _ in range(3))
    append(short, 1, 2)
    append(long, 2, 9)
    caches.free(gone)
    assert caches.together([short, long]).first == 1
    assert (short.slot, long.slot) == (1, 2)


def test_no_more_sequences_fit_than_there_are_slots() -> None:
    caches = KVCaches(MODEL, 1, CAPACITY)
    only = caches.new()
    with pytest.raises(ValueError, match="slots"):
        caches.new()
    caches.free(only)
    assert caches.new().slot == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_only_written_rows_are_resident_and_a_freed_or_moved_sequence_gives_them_back() -> None:
    tokens = 1 << 17
    caches = KVCaches(MODEL, 3, tokens)
    size = caches.bytes_of(tokens)
    assert size == 16 * 2**20
    before = resident_bytes()
    first, second = caches.new(), caches.new()
    for buffer in caches.buffers.values():
        buffer[:2] = 1
    first.length = second.length = tokens
    assert resident_bytes() - before == pytest.approx(2 * size, rel=0.1)
    caches.free(first)
    assert resident_bytes() - before == pytest.approx(size, rel=0.1)
    third, fourth = caches.new(), caches.new()
    fourth.length = 1
    caches.together([third, second, fourth])
    caches.free(third)
    caches.together([second, fourth])
    assert resident_bytes() - before == pytest.approx(size, rel=0.1)
