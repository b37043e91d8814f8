"""What is kept while nothing is read again."""

from __future__ import annotations

import itertools
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from decoding import ROOM, check_decoded_quiet
from zcache import CacheStore
from zcache._decoded.admission import EVICTIONS, LARGE, SHARE, Admission
from zcache._decoded.chunk import OVERHEAD
from zcache.testing import StoreDouble

CHUNKS = 4 * EVICTIONS
KEPT = 8
shards = pytest.mark.parametrize("more", [{}, {"shards": (32,)}], ids=["chunks", "shards"])


def opened_after_half_a_pass(source: Any, more: dict[str, Any]) -> Any:
    """An array over a cache of `KEPT` chunks; of the first half of it, each chunk was read once."""
    array = zarr.create_array(
        source, name="v", shape=(4 * CHUNKS,), chunks=(4,), dtype="i4", **more
    )
    array[:] = np.arange(4 * CHUNKS) + 1
    store = CacheStore(source, source_id="s", decoded_size=KEPT * ROOM)
    array = zarr.open_array(store, path="v")
    read_once(array, 0, CHUNKS // 2)
    return array


def read_once(array: Any, first: int, last: int) -> None:
    for at in range(4 * first, 4 * last, 32):
        np.testing.assert_array_equal(array[at : at + 32], np.arange(at, at + 32) + 1)


def evictions(array: Any) -> int:
    found: int = array.store._decoded._index.stats().evictions
    return found


@shards
def test_pass_without_reuse_keeps_one_in_many_chunks(more: dict[str, Any]) -> None:
    array = opened_after_half_a_pass(MemoryStore(), more)
    before = evictions(array)
    read_once(array, CHUNKS // 2, CHUNKS)
    assert evictions(array) - before == CHUNKS // 2 // SHARE
    assert array.store.cache_stats()["decoded_size"] == KEPT * ROOM
    check_decoded_quiet(array.store)


@shards
def test_chunk_that_is_read_again_and_again_is_kept_and_so_are_others_then(
    more: dict[str, Any],
) -> None:
    array = opened_after_half_a_pass(MemoryStore(), more)
    stats = array.store.cache_stats
    for _ in range(3):
        assert array[2] == 3
    hits = stats()["decoded_hits"]
    assert hits == 1
    for at in (100, 200, 300):
        for _ in range(2):
            assert array[at] == at + 1
    assert stats()["decoded_hits"] == hits + 3


@shards
def test_many_readers_decode_a_chunk_once_that_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    # However slow the machine is.
    monkeypatch.setattr("zcache._decoded.reading.PATIENCE", 60.0)
    source = StoreDouble(MemoryStore())
    array = opened_after_half_a_pass(source, more)
    array.store._cache_store._store_dict.clear()
    before = array.store.cache_stats()
    gate = source.block("get", times=1)
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(lambda: int(array[:16].sum())) for _ in range(8)]
        gate.wait_entered()
        gate.release()
        assert {read.result(60) for read in reads} == {136}
    check_decoded_quiet(array.store)
    stats = array.store.cache_stats()
    decoded = stats["decoded_misses"] - before["decoded_misses"]
    assert decoded + stats["decoded_hits"] - before["decoded_hits"] == 32


def admits(admission: Admission, times: int = 1) -> int:
    """How many chunks it keeps of so many that were never read before."""
    return sum(admission.admits(str(next(_numbers)), 10) for _ in range(times))


_numbers = itertools.count()


def test_admission_begins_to_refuse_after_evictions_without_a_hit() -> None:
    admission = Admission(100)
    for _ in range(EVICTIONS):
        assert admits(admission) == 1
        admission.evicted(10)
    assert admits(admission, 10 * SHARE) == 10
    admission.hit()
    assert admits(admission, SHARE) == SHARE


def test_admission_of_what_was_refused_lately() -> None:
    admission = Admission(100)
    for _ in range(EVICTIONS):
        admission.evicted(10)
    assert not admission.admits("a", 0)
    # As many names as chunks are kept, at least.
    for n in range(EVICTIONS):
        admission.admits(f"b{n}", EVICTIONS + 2)
    assert admission.admits("a", EVICTIONS + 2)
    assert not admission.admits("a", EVICTIONS + 2)
    for n in range(3 * EVICTIONS):
        admission.admits(f"c{n}", 0)
    assert not admission.admits("a", 0)


@pytest.mark.parametrize(("eviction", "least"), [("none", 0.5), ("adaptive", 0.49)])
def test_loop_has_the_hits_that_the_policy_promises(eviction: str, least: float) -> None:
    source = MemoryStore()
    array = zarr.create_array(source, shape=(200, 250), chunks=(1, 250), dtype="f4")
    array[:] = 1
    store = CacheStore(source, eviction=eviction, decoded_size=100 * (1000 + OVERHEAD))
    array = zarr.open_array(store)
    hits = []
    for _ in range(8):
        for n in range(200):
            array[n]
        hits.append(store.cache_stats()["decoded_hits"])
    assert hits[-1] - hits[3] >= least * 4 * 200


def test_absences_take_little_of_the_bound_however_long_their_names_are() -> None:
    admission = Admission(2**24)
    tracemalloc.start()
    try:
        for at in range(0, 2**14, 2**10):
            admission.note_absent([f"{n:03500}" for n in range(at, at + 2**10)])
        assert tracemalloc.get_traced_memory()[0] < 2**24 // 16
    finally:
        tracemalloc.stop()


def test_admission_of_few_bytes_goes_on_until_a_sixteenth_has_gone() -> None:
    admission = Admission(160 * EVICTIONS + 16)
    for _ in range(EVICTIONS):
        admission.evicted(10)
    assert admits(admission, SHARE) == SHARE
    admission.evicted(10)
    assert admits(admission, SHARE) < SHARE


def test_admission_of_large_chunks_ends_after_few() -> None:
    admission = Admission(LARGE)
    for _ in range(2):
        assert admits(admission, SHARE) == SHARE
        admission.evicted(LARGE // 2)
    assert admits(admission, SHARE) < SHARE


@pytest.mark.parametrize("more", [{}, {"shards": (128,)}], ids=["chunks", "shards"])
def test_one_read_of_a_sparse_array_larger_than_the_bound_keeps_all_that_is_there(
    more: dict[str, Any],
) -> None:
    """Room for chunks that turn out to be absent goes to those that are there."""
    # One chunk in sixteen is there, and there is room for these.
    store = CacheStore(MemoryStore(), decoded_size=16 * ROOM)
    array = zarr.create_array(store, shape=(1024,), chunks=(4,), dtype="i4", **more)
    values = np.zeros(1024, "i4")
    values[60::64] = 1
    array[:] = values
    for _ in range(2):
        np.testing.assert_array_equal(array[:], values)
        assert store.cache_stats()["decoded_size"] == 16 * ROOM
    check_decoded_quiet(store)
    before = store.cache_stats()["decoded_hits"]
    np.testing.assert_array_equal(array[60::64], values[60::64])
    assert store.cache_stats()["decoded_hits"] == before + 16
