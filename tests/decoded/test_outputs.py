"""Outputs of reads: which memory they have."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore, StorePath

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


def whole(out: cpu.NDBuffer) -> list[Any]:
    """A batch of one chunk that covers an output."""
    return [(None, None, None, tuple(slice(0, n) for n in out.shape), True)]


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


@pytest.mark.parametrize("selection", [np.s_[:], np.s_[1:, 3:-7], np.s_[::2], np.s_[0, :]])
def test_outputs_of_zarr_are_covered_by_their_batches(selection: Any) -> None:
    array = zarr.create_array(
        CacheStore(MemoryStore(), decoded_size="256 MiB"),
        shape=(3, 5 * HUGE),
        chunks=(2, HUGE),
        dtype="u1",
        fill_value=1,
    )
    found = array[selection]
    assert found.base is not None
    assert (found == 1).all()
    del found
    assert array.get_orthogonal_selection(selection).base is not None


def test_output_that_a_batch_does_not_cover_keeps_the_rest() -> None:
    array = opened()
    used = array[:]
    used[:] = -2
    del used
    gc.collect()
    assert unused(array) == VALUES.nbytes
    inner = array._async_array
    spec = ArraySpec(
        shape=(512, 512),
        dtype=inner.metadata.dtype,
        fill_value=0,
        config=inner.config,
        prototype=default_buffer_prototype(),
    )
    chunk = (slice(0, 512), slice(0, 512))
    batches = [
        [((0, 0), (slice(0, 512), slice(0, 512)))],
        [
            ((0, 0), (slice(512, 1024), slice(0, 512))),
            ((0, 1), (slice(512, 1024), slice(512, 1024))),
        ],
        # As many elements as the output has.
        [((n // 2, n % 2), (slice(0, 512), slice(0, 512))) for n in range(4)],
        [((0, n % 2), (slice(0, 512), slice(512 * (n % 2), 512 * (n % 2 + 1)))) for n in range(4)],
        [((0, 0), (np.arange(512)[:, None], np.arange(512)))],
    ]
    for batch in batches:
        expected = np.full((SIDE, SIDE), -1, "i4")
        out = cpu.NDBuffer.create(shape=(SIDE, SIDE), dtype=np.dtype("i4"), fill_value=-1)
        infos = []
        for (row, column), place in batch:
            path = StorePath(array.store, f"c/{row}/{column}")
            infos.append((path, spec, chunk, place, True))
            expected[place] = VALUES[512 * row :, 512 * column :][:512, :512]
        asyncio.run(inner.codec_pipeline.read(infos, out))
        np.testing.assert_array_equal(out.as_numpy_array(), expected)


def test_unused_memory_is_bounded() -> None:
    outputs = Outputs(4 * HUGE)
    arrays = []
    for size in [HUGE, HUGE + 1, 2 * HUGE, 3 * HUGE]:
        out = cpu.NDBuffer(np.empty(size, "u1"))
        outputs.renew(out, whole(out))
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
        assert Outputs(limit).renew(out, whole(out)) is array


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
