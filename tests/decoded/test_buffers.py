"""Memory of decoded chunks."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from zcache import CacheStore
from zcache._decoded.buffers import SLAB, Buffers

MAX = 16 * SLAB


@pytest.mark.parametrize("size", [1, 1000, 1024, 5000, 2**17 + 1, 2**21, 2**23])
def test_memory_is_nobody_elses(size: int) -> None:
    buffers = Buffers(MAX)
    count = min(300, 2**25 // size)
    pieces = [buffers.take(size, MAX) for _ in range(count)]
    for n, piece in enumerate(pieces):
        assert piece.nbytes == size
        piece[:] = n % 251
    for n, piece in enumerate(pieces):
        assert (piece == n % 251).all()


def test_memory_is_used_again() -> None:
    buffers = Buffers(MAX)
    piece = buffers.take(5000, MAX)
    where = piece.ctypes.data
    buffers.give_back(piece, MAX)
    assert buffers.take(5000, MAX).ctypes.data == where


def test_unused_memory_goes_back_to_the_system_while_its_neighbours_are_used() -> None:
    buffers = Buffers(MAX)
    size = 2**16 + 100
    one, other = buffers.take(size, MAX), buffers.take(size, MAX)
    one[:] = other[:] = 7
    slab = other.base
    at = other.ctypes.data - slab.ctypes.data
    buffers.give_back(other, 0)
    del other
    # What the system has taken back reads as zeros, but for the pages that others share.
    assert np.count_nonzero(slab[at : at + size]) < 2 * 2**16
    assert (slab[at + 2**12 : at + size - 2**12] == 0).all()
    assert (one == 7).all()
    assert buffers._size == 0


def test_small_cache_maps_no_more_than_it_holds() -> None:
    buffers = Buffers(2**20)
    assert buffers.take(2**16, 2**20).base is None


def test_pieces_of_many_sizes_lie_side_by_side() -> None:
    buffers = Buffers(MAX)
    pieces = [buffers.take(size, MAX) for size in range(1024, 100_000, 1000)]
    assert len({id(piece.base) for piece in pieces}) == 1
    for n, piece in enumerate(pieces):
        piece[:] = n
    assert all((piece == n).all() for n, piece in enumerate(pieces))


def test_slab_that_is_full_is_kept_whole() -> None:
    buffers = Buffers(MAX)
    pieces = [buffers.take(2**20, MAX) for _ in range(SLAB // 2**20)]
    for piece in pieces:
        piece[:] = 7
    buffers.clear()
    assert buffers.take(2**20, MAX).base is not pieces[0].base
    assert all((piece == 7).all() for piece in pieces)


@pytest.mark.parametrize("size", [1024, 3000, 5000])
def test_one_small_piece_in_use_keeps_no_more_than_its_pages(size: int) -> None:
    buffers = Buffers(MAX)
    pieces = [buffers.take(size, MAX) for _ in range(500)]
    whole = pieces[0].base
    for piece in pieces:
        piece[:] = 7
    used = pieces.pop(250)
    while pieces:
        buffers.give_back(pieces.pop(), 0)
    assert (used == 7).all()
    assert np.count_nonzero(whole) <= size + 2 * mmap.PAGESIZE
    # What comes next shares no memory with it.
    for piece in [buffers.take(size, MAX) for _ in range(500)]:
        piece[:] = 8
    assert (used == 7).all()


def test_emptied_cache_gives_its_memory_back() -> None:
    store = CacheStore(MemoryStore(), decoded_size=MAX)
    array = zarr.create_array(store, shape=(2**22,), chunks=(2**16,), dtype="u1")
    array[:] = np.arange(2**22) % 100 + 1
    for _ in range(2):
        array[:]
    cache: Any = store._decoded
    slabs = {id(kept.memory.base): kept.memory.base for kept in cache._values.values()}
    assert sum(map(np.count_nonzero, slabs.values())) == 2**22
    assert cache.outputs._size >= 2**21
    sync(store.clear_cache())
    # What the system has taken back reads as zeros.
    assert not any(slab.any() for slab in slabs.values())
    assert cache.outputs._size == 0
    for _ in range(2):
        np.testing.assert_array_equal(array[:], np.arange(2**22) % 100 + 1)
