"""Decoded chunks of values of any length: what schedules and machines read beside the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.codecs import BytesCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.dtype import UInt8
from zarr.storage import StorePath

from zcache import DecodedCodecPipeline
from zcache._decoded.chunk import OVERHEAD

if TYPE_CHECKING:
    from zcache import CacheStore

CHUNK = 16
"""Bytes of a decoded chunk; the first is the length of the value, plus one."""
ROOM = CHUNK + OVERHEAD
"""Bytes that are counted for a chunk of this size."""
_SPEC = ArraySpec(
    shape=(CHUNK,),
    dtype=UInt8(),
    fill_value=0,
    config=ArrayConfig.from_dict({}),
    prototype=default_buffer_prototype(),
)


class Padded:
    """Decodes a value to its length and its bytes."""

    # As zarr's own, it only assigns to its output.
    __module__ = "zarr.core.codec_pipeline"

    async def read(self, batch: Any, out: Any, drop_axes: Any = ()) -> Any:
        for getter, spec, selection, place, _ in batch:
            value = await getter.get(spec.prototype)
            if value is None:
                out[place] = 0
                continue
            data = value.to_bytes()
            chunk = bytes([len(data) + 1]) + data
            array = np.frombuffer(chunk.ljust(CHUNK, b"\0"), "u1")
            out[place] = cpu.NDBuffer(array[selection])


_PIPELINE: Any = Padded()


async def read_decoded(store: CacheStore, key: str) -> bytes | None:
    """What `get` gives, by way of a decoded chunk."""
    pipeline = DecodedCodecPipeline(_PIPELINE, [BytesCodec()])
    out = cpu.NDBuffer(np.empty(CHUNK, "u1"))
    whole = (slice(0, CHUNK),)
    await pipeline.read([(StorePath(store, key), _SPEC, whole, whole, True)], out)
    chunk = out.as_numpy_array().tobytes()
    return chunk[1 : chunk[0]] if chunk[0] else None


def check_decoded(store: CacheStore) -> None:
    """Assert that the books of decoded chunks are right, and that they are within the bound."""
    cache: Any = store._decoded
    if cache is None:
        return
    index = cache._index
    index.validate()
    with cache._lock:
        kept = [one for one in cache._values.values() if one.memory is not None]
        # What is there, and what is reserved for what is being decoded.
        assert (
            sum(one.array.nbytes + OVERHEAD for one in kept) <= index.current_size <= cache.max_size
        )
    assert not any(one.array.flags.writeable for one in kept)


def check_decoded_quiet(store: CacheStore) -> None:
    """The same, and that nothing is under way."""
    check_decoded(store)
    cache: Any = store._decoded
    if cache is not None:
        assert cache._index.in_flight == (0, 0)
        assert not any(one.pins for one in cache._values.values())
        sizes = [
            one.array.nbytes + OVERHEAD for one in cache._values.values() if one.memory is not None
        ]
        assert sum(sizes) == cache._index.current_size
