"""Outputs of reads: which memory they have."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from zcache import CacheStore
from zcache._decoded.buffers import HUGE
from zcache._decoded.outputs import Outputs

SIDE = 1024
VALUES = np.arange(SIDE * SIDE, dtype="i4").reshape(SIDE, SIDE)


def opened(size: int | str = "256 MiB", **more: Any) -> Any:
    array = zarr.create_array(
        CacheStore(MemoryStore(), decoded_size=size),
        shape=(SIDE, SIDE),
        chunks=(512, 512),
        dtype="i4",
        **more,
    )
    array[:] = VALUES
    return array


def unused(array: Any) -> int:
    found: int = array.store._decoded.outputs._size
    return found


def test_memory_of_an_output_is_used_again_once_nobody_has_it() -> None:
    array = opened()
    first = array[:]
    part = first[10:20]
    where = first.ctypes.data
    del first
    second = array[:]
    assert second.ctypes.data != where
    np.testing.assert_array_equal(part, VALUES[10:20])
    del part
    gc.collect()
    assert unused(array) == VALUES.nbytes
    third = array[:]
    assert third.ctypes.data == where
    third[:] = 0
    np.testing.assert_array_equal(second, VALUES)
    assert unused(array) == 0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_output_is_as_without_decoded_chunks(order: str, zarr_format: int) -> None:
    more = {"order": order} if zarr_format == 2 else {"config": {"order": order}}
    array = opened(zarr_format=zarr_format, **more)
    plain = zarr.open_array(array.store._store)
    if zarr_format == 3 and hasattr(plain, "with_config"):
        plain, array = (one.with_config({"order": order}) for one in (plain, array))
    for selection in [np.s_[:], np.s_[:, 3:1000], np.s_[::2]]:
        for _ in range(2):
            found, expected = array[selection], plain[selection]
            np.testing.assert_array_equal(found, expected)
            assert (found.dtype, found.strides) == (expected.dtype, expected.strides)
            assert found.flags.writeable
            assert type(found) is type(expected)


def test_output_of_a_user_is_filled_in_its_own_memory() -> None:
    array = opened()
    mine = np.zeros((SIDE, SIDE), "i4")
    array.get_basic_selection(..., out=cpu.NDBuffer(mine))
    np.testing.assert_array_equal(mine, VALUES)
    view = np.zeros((SIDE, 2 * SIDE), "i4")
    array.get_basic_selection(..., out=cpu.NDBuffer(view[:, ::2]))
    np.testing.assert_array_equal(view[:, ::2], VALUES)
    buffer = cpu.NDBuffer.create(shape=(SIDE, SIDE), dtype="i4")
    array.get_basic_selection(..., out=buffer)
    np.testing.assert_array_equal(buffer.as_numpy_array(), VALUES)
    buffer = cpu.NDBuffer.create(shape=(SIDE, SIDE), dtype="i4")
    seen = memoryview(buffer.as_numpy_array())
    array.get_basic_selection(..., out=buffer)
    np.testing.assert_array_equal(np.asarray(seen), VALUES)


def test_unused_memory_is_bounded() -> None:
    outputs = Outputs(4 * HUGE)
    arrays = []
    for size in [HUGE, HUGE + 1, 2 * HUGE, 3 * HUGE]:
        out = cpu.NDBuffer(np.empty(size, "u1"))
        outputs.renew(out)
        arrays.append(out.as_numpy_array())
        assert arrays[-1].base is not None
    del out
    while arrays:
        arrays.pop()
        assert outputs._size <= 4 * HUGE
    assert outputs._size == sum(size * len(free) for size, free in outputs._free.items()) > 0


def test_small_outputs_and_those_of_small_caches_stay_as_they_are() -> None:
    for limit, size in [(4 * HUGE, HUGE - 1), (HUGE - 1, HUGE)]:
        out = cpu.NDBuffer(np.empty(size, "u1"))
        array = out._data
        assert Outputs(limit).renew(out) is array


def test_output_is_left_alone_where_references_are_not_counted_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a free-threaded interpreter another thread may have it, whatever the count says."""
    monkeypatch.setattr("sys._is_gil_enabled", lambda: False, raising=False)
    array = opened()
    first = array[:]
    assert first.base is None
    np.testing.assert_array_equal(first, VALUES)
    del first
    gc.collect()
    assert unused(array) == 0
