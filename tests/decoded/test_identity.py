"""Which arrays share decoded chunks: those with the same codecs, and no others."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import pickle
import threading
import tracemalloc
import warnings
from dataclasses import dataclass, field, make_dataclass
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numcodecs
import numpy as np
import pytest
import zarr
from numcodecs.abc import Codec as Numcodec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.codecs import numcodecs as wrapped
from zarr.core.array_spec import ArrayConfig
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.core.dtype import Int16
from zarr.registry import register_codec
from zarr.storage import MemoryStore

from zcache import CacheStore, with_decoded_cache
from zcache._decoded import cache as cache_module
from zcache._decoded import identity
from zcache._decoded.identity import identity_of
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable

NEXT: dict[str, Any] = {}
"""Class and key of the codec of what is opened next."""
VALUES = np.arange(8, dtype="u1")


class Encrypting(BytesBytesCodec):
    """Leaves its key out of what it writes into metadata."""

    is_fixed_size = True
    key: Any

    @classmethod
    def from_dict(cls, data: Any) -> Any:
        return NEXT["kind"](key=NEXT["key"])

    def to_dict(self) -> Any:
        return {"name": "encrypting"}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return input_byte_length

    def number(self) -> int:
        key: int = self.key
        return key

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        plain = np.frombuffer(chunk_bytes.to_bytes(), "u1") ^ np.uint8(self.number())
        return chunk_spec.prototype.buffer.from_bytes(plain.tobytes())

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await self._decode_single(chunk_bytes, chunk_spec)


@dataclass(frozen=True)
class Compared(Encrypting):
    key: int = 0


@dataclass(frozen=True)
class NotCompared(Encrypting):
    key: int = field(default=0, compare=False)


class Inherited(Encrypting):
    """Equal to all of its class: so says the dataclass that it inherits from."""

    def __init__(self, key: int) -> None:
        object.__setattr__(self, "key", key)


class Slotted(Encrypting):
    __slots__ = ("key",)

    def __init__(self, key: int) -> None:
        object.__setattr__(self, "key", key)


class Nested(Inherited):
    def __init__(self, key: int) -> None:
        super().__init__({"keys": [Compared(key), np.array([key])], "of": {key, 2.5}})  # type: ignore[arg-type]

    def number(self) -> int:
        found: int = self.key["keys"][0].key
        return found


class Closure(Inherited):
    """What it has is a function."""

    def __init__(self, key: int) -> None:
        super().__init__(lambda: key)  # type: ignore[arg-type]

    def number(self) -> int:
        found: int = self.key()
        return found


class Called(Inherited):
    """What it has is a function that somebody gives it."""

    def number(self) -> int:
        found: int = self.key()  # type: ignore[operator]
        return found


class Counting(Inherited):
    """What it has changes as it decodes."""

    def number(self) -> int:
        object.__setattr__(self, "count", getattr(self, "count", 0) + 1)
        return super().number()


class Subclassed(Inherited):
    """What it has is more than a dict."""

    def __init__(self, key: int) -> None:
        super().__init__(_Bare({"": key}))  # type: ignore[arg-type]

    def number(self) -> int:
        found: int = self.key[""]
        return found


class _Bare(dict[str, int]):
    pass


register_codec("encrypting", Encrypting)
KINDS = [Compared, NotCompared, Inherited, Slotted, Nested, Closure, Subclassed]


def opened(kind: type[Encrypting], key: int, store: Any) -> Any:
    NEXT.update(kind=kind, key=key)
    return zarr.open_array(store, mode="r+")


def read(array: Any) -> tuple[list[int], int]:
    """What is read, and how many decoded hits that took."""
    before = array.store.cache_stats()["decoded_hits"]
    found = array[:].tolist()
    return found, array.store.cache_stats()["decoded_hits"] - before


@pytest.mark.parametrize("shards", [None, (8,)], ids=["chunks", "shards"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_codecs_that_differ_in_what_they_do_not_write_share_no_chunks(
    kind: type[Encrypting], shards: Any
) -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    codec: Any = kind(key=7)  # type: ignore[call-arg]
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), shards=shards, dtype="u1", compressors=[codec]
    )
    array[:] = VALUES
    plain, other = VALUES.tolist(), (VALUES ^ 7 ^ 9).tolist()
    for key, expected in ((7, plain), (9, other), (7, plain)):
        one = opened(kind, key, store)
        for _ in range(2):
            assert read(one)[0] == expected
        assert read(array)[0] == plain
    is_shared = kind not in (Closure, Subclassed)
    assert read(opened(kind, 7, store)) == (plain, 2 if is_shared else 0)
    assert read(opened(kind, 9, store)) == (other, 2 if is_shared else 0)
    assert read(array) == (plain, 2)


def test_codecs_of_two_classes_share_no_chunks() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    zarr.create_array(store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Compared(7)])[:] = (
        VALUES
    )

    class Inverted(Compared):
        def number(self) -> int:
            return 255 ^ self.key

    plain, inverted = VALUES.tolist(), (VALUES ^ 255).tolist()
    for _ in range(2):
        assert read(opened(Compared, 7, store))[0] == plain
        assert read(opened(Inverted, 7, store))[0] == inverted
    assert read(opened(Compared, 7, store)) == (plain, 2)
    assert read(opened(Inverted, 7, store)) == (inverted, 2)


class Keyed(Numcodec):  # type: ignore[misc]
    """Of format 2, with an attribute that its config does not show."""

    codec_id = "keyed"

    def __init__(self) -> None:
        self._key = NEXT["key"]

    def encode(self, buf: Any) -> Any:
        return (np.frombuffer(buf, "u1") ^ np.uint8(self._key)).tobytes()

    def decode(self, buf: Any, out: Any = None) -> Any:
        return self.encode(buf)


numcodecs.register_codec(Keyed)


@pytest.mark.parametrize("place", ["compressors", "filters"])
def test_codecs_of_format_2_that_differ_in_hidden_attributes_share_no_chunks(place: str) -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    NEXT["key"] = 7
    more: Any = {"compressors": None, place: [Keyed()]}
    array = zarr.create_array(store, shape=(8,), chunks=(4,), dtype="u1", zarr_format=2, **more)
    array[:] = VALUES
    for key, expected in ((7, VALUES), (9, VALUES ^ 7 ^ 9), (7, VALUES)):
        NEXT["key"] = key
        for _ in range(2):
            assert read(zarr.open_array(store))[0] == expected.tolist()
    assert read(zarr.open_array(store)) == (VALUES.tolist(), 2)
    assert read(array) == (VALUES.tolist(), 2)


FORMAT_2: dict[str, Any] = {
    "none": {"compressors": None},
    "default": {},
    "blosc": {"compressors": numcodecs.Blosc("lz4", 3)},
    "zstd": {"compressors": numcodecs.Zstd(2)},
    "lz4": {"compressors": numcodecs.LZ4()},
    "gzip": {"compressors": numcodecs.GZip(2)},
    "zlib": {"compressors": numcodecs.Zlib()},
    "bz2": {"compressors": numcodecs.BZ2()},
    "lzma": {"compressors": numcodecs.LZMA()},
    "delta": {"filters": [numcodecs.Delta("i4")]},
    "scale": {"filters": [numcodecs.FixedScaleOffset(1, 2.0, "i4", "i4")]},
    "shuffle": {"filters": [numcodecs.Shuffle(4)]},
    "astype": {"filters": [numcodecs.AsType("i8", "i4")]},
    "checksums": {"filters": [numcodecs.Delta("i4"), numcodecs.CRC32(), numcodecs.Adler32()]},
    "fletcher": {"filters": [numcodecs.Fletcher32(), numcodecs.JenkinsLookup3()]},
}
FORMAT_3: dict[str, Any] = {
    "none": {"compressors": None},
    "default": {},
    "blosc": {"compressors": [BloscCodec()]},
    "many": {"compressors": [GzipCodec(level=1), ZstdCodec(level=2), Crc32cCodec()]},
    "transposed": {"filters": [TransposeCodec(order=(0,))], "serializer": BytesCodec(endian="big")},
    "shards": {"shards": (8,), "compressors": [BloscCodec(shuffle="shuffle")]},
    "nested": {"serializer": ShardingCodec(chunk_shape=(4,), codecs=[BytesCodec(), GzipCodec()])},
}
with warnings.catch_warnings(action="ignore"):  # They are in no specification.
    FORMAT_3["numcodecs"] = {
        "filters": [wrapped.Delta(dtype="<i4")],
        "compressors": [wrapped.LZMA()],
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("zarr_format", "more"),
    [
        pytest.param(zarr_format, more, id=f"{zarr_format}-{name}")
        for zarr_format, known in ((2, FORMAT_2), (3, FORMAT_3))
        for name, more in known.items()
    ],
)
def test_copies_with_stock_codecs_share_their_chunks(zarr_format: int, more: Any) -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    chunks = (8,) if "serializer" in more else (4,)
    array = zarr.create_array(
        store, shape=(8,), chunks=chunks, dtype="i4", zarr_format=zarr_format, **more
    )
    array[:] = VALUES
    np.testing.assert_array_equal(array[:], VALUES)
    kept = array.store.cache_stats()["decoded_misses"]
    for one in (
        zarr.open_array(store),
        copy.deepcopy(zarr.open_array(store)),
        pickle.loads(pickle.dumps(array)),
        pickle.loads(pickle.dumps(zarr.open_array(store))),
        array,
    ):
        np.testing.assert_array_equal(one[:], VALUES)
    assert array.store.cache_stats()["decoded_misses"] == kept


class Holder:
    """What a codec may be made of; equal to all of its class, by what it says of itself."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    @functools.cached_property
    def default(self) -> int:
        """May be set as well."""
        return 0


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Bits(enum.IntFlag):
    """With values that have no names."""

    LOW = 1


def spec(order: Any) -> ArrayConfig:
    """A part of what a codec is told of its array."""
    return ArrayConfig(order=order, write_empty_chunks=False)


def sharded(key: int) -> ShardingCodec:
    return ShardingCodec(chunk_shape=(4,), codecs=[BytesCodec(), Compared(key)])


def twice() -> Any:
    found: Any = make_dataclass("Twice", ["one", "other"])(1, 2)
    found.one = found.other = found
    return found


def around() -> list[Any]:
    """A list in itself."""
    circle: list[Any] = []
    circle.append(circle)
    return circle


def folded() -> list[Any]:
    """A list with two to the power of 60 elements."""
    inner: list[Any] = [1]
    for _ in range(60):
        inner = [inner, inner]
    return inner


PARTS: list[Callable[[], Any]] = [
    *(partial(lambda one: one, one) for one in (1, True, 1.0, 0.0, -0.0, "1", b"1", None)),
    *(lambda: [1], lambda: (1,), lambda: {1}, lambda: {1: 2}, lambda: {(1, 2)}, dict, set, tuple),
    *(lambda: {"a": 2, "b": 3}, lambda: {"b": 3, "a": 2}),
    *(lambda: np.int8(1), lambda: np.int16(1), lambda: np.dtype("i4"), lambda: np.dtype(">i4")),
    *(lambda: np.arange(3), lambda: np.arange(4), lambda: Level.LOW, lambda: Level.HIGH),
    *(lambda: Compared(1), lambda: Compared(2), lambda: NotCompared(1), numcodecs.GZip, BytesCodec),
    *(lambda: sharded(1), lambda: sharded(2), lambda: Bits(16), lambda: Bits(32)),
    *(lambda: Int16(endianness="little"), lambda: Int16(endianness="big"), lambda: spec("C")),
    *(lambda: np.dtype(("<i4", (2,))), lambda: np.dtype(("<f4", (2,))), lambda: spec("F")),
    *(lambda: logging.getLogger("zcache"), lambda: len, lambda: Holder),
]
"""Makers of what is alike only if it comes from one of them."""


def test_identity_is_that_of_equal_parts_and_of_no_others() -> None:
    found = [identity_of(Holder(make())) for make in PARTS]
    assert len(set(found)) == len(found)
    assert [identity_of(Holder(make())) for make in PARTS] == found
    assert identity_of(*map(Holder, (1, 2))) != identity_of(*map(Holder, (2, 1)))


def test_attribute_that_could_have_been_computed_counts() -> None:
    one, other = Holder(3), Holder(3)
    vars(one)["default"] = 7
    assert identity_of(one) != identity_of(other)


class Mode(NamedTuple):
    name: str


class Locked(Mode):
    """What it is, is not in its fields."""

    def __new__(cls, key: int) -> Self:
        made = super().__new__(cls, "xor")
        made.key = key  # type: ignore[attr-defined]
        return made


class Measured(np.float64):
    unit = "m"


NOTED: Any = {"key": 7}
OBJECTS: list[Callable[[], Any]] = [
    *(lambda: Locked(7), lambda: Measured(1.0), lambda: np.dtype("u1", metadata=NOTED)),
    lambda: np.zeros(1, [("a", "i4"), ("b", np.dtype("u1", metadata=NOTED))]),
    *(threading.Lock, lambda: lambda: None, lambda: (n for n in ()), lambda: date(2026, 1, 1)),
    *(lambda: _Bare({"": 1}), lambda: Holder(1), lambda: functools.partial(len)),
    *(
        around,
        folded,
        twice,
        lambda: [0] * 2000,
        lambda: 1 << 20_000,
        lambda: "1" * 200_000,
        lambda: np.zeros(200_000),
    ),
]


@pytest.mark.parametrize("make", OBJECTS)
def test_identity_of_what_is_not_plain_or_too_much_is_its_own(make: Callable[[], Any]) -> None:
    one, other = Holder(make()), Holder(make())
    assert identity_of(one) == identity_of(one) != identity_of(other)


def test_codecs_with_functions_of_one_name_share_no_chunks() -> None:
    """As a cell of a notebook has when it is run once more."""

    def opened_with(constant: int) -> Any:
        def number() -> int:
            return constant

        number.__module__, number.__qualname__ = __name__, "named"
        return opened(Called, number, store)  # type: ignore[arg-type]

    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Compared(key=7)]
    )
    array[:] = VALUES
    for key in (7, 9, 7):
        assert read(opened_with(key))[0] == (VALUES ^ 7 ^ key).tolist()


def test_codec_that_was_given_its_key_after_a_read_is_another_one() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Compared(key=7)]
    )
    array[:] = VALUES
    unlocked, locked = (opened(Inherited, None, store) for _ in range(2))  # type: ignore[arg-type]
    for one in (unlocked, locked):
        with pytest.raises(TypeError):
            one[:]
    unlocked.metadata.codecs[-1].__init__(7)
    assert read(unlocked)[0] == VALUES.tolist()
    for _ in range(2):
        with pytest.raises(TypeError):
            locked[:]
    locked.metadata.codecs[-1].__init__(9)
    assert read(locked)[0] == (VALUES ^ 7 ^ 9).tolist()
    assert read(unlocked) == (VALUES.tolist(), 2)


@pytest.mark.parametrize("shards", [None, (8,)], ids=["chunks", "shards"])
def test_codec_that_was_given_its_key_after_a_read_of_the_fill_value_is_another_one(
    shards: Any,
) -> None:
    """No chunk was there that it could have decoded, whether that is kept or not."""
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = zarr.create_array(
        store,
        shape=(16,),
        chunks=(4,),
        shards=shards,
        dtype="u1",
        compressors=[Compared(7)],
        fill_value=0,
    )
    array[12:] = VALUES[4:]
    arrays = [opened(Inherited, None, store) for _ in range(2)]  # type: ignore[arg-type]
    for one in arrays:
        for part in (slice(0, 8), slice(8, 12), slice(8, 12)):
            assert not one[part].any()
        with pytest.raises(TypeError):
            one[12:]
    for one, key in zip(arrays, (7, 9), strict=True):
        codec: Any = one.metadata.codecs[-1]
        if shards is not None:
            codec = codec.codecs[-1]
        codec.__init__(key)
        assert one[12:].tolist() == (VALUES[4:] ^ 7 ^ key).tolist()


def test_codec_that_changes_by_itself_is_the_same_after_a_failure() -> None:
    """It may count, or make what it needs when it decodes first."""
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, decoded_size="1MB", max_size=0)
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Counting(key=7)]
    )
    array[:] = VALUES
    assert read(array)[0] == VALUES.tolist()
    assert read(array) == (VALUES.tolist(), 2)
    source.fail("get", OSError("down"), times=1)
    store.invalidate_sync("c/0")
    with pytest.raises(OSError, match="down"):
        array[:]
    assert read(array) == (VALUES.tolist(), 1)


def test_pipeline_of_other_codecs_than_the_metadata_shares_no_chunks() -> None:
    source = MemoryStore()
    array = zarr.create_array(source, shape=(8,), chunks=(4,), dtype="u1", compressors=None)
    array[:] = VALUES
    keyed = BatchedCodecPipeline.from_codecs([BytesCodec(), Compared(7)])
    object.__setattr__(array._async_array, "codec_pipeline", keyed)
    found = with_decoded_cache(array, "1MB")
    assert found[:].tolist() == (VALUES ^ 7).tolist()
    assert zarr.open_array(found.store)[:].tolist() == VALUES.tolist()
    assert found[:].tolist() == (VALUES ^ 7).tolist()


def test_identity_of_what_changes_meanwhile_is_its_own() -> None:
    """A codec may keep something for itself, in the threads in which it decodes."""
    one = Holder({"": 0})
    ends = threading.Event()

    def change() -> None:
        while not ends.is_set():
            for n in range(1000):
                one.key[n] = n
            for n in range(1000):
                del one.key[n]

    changing = threading.Thread(target=change)
    changing.start()
    try:
        assert all(len(identity_of(one)) == 16 for _ in range(1000))
    finally:
        ends.set()
        changing.join()


def test_layouts_of_many_shapes_keep_no_copies_of_a_codec() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Inherited(np.full(1 << 20, 7))]
    )
    pipeline = array._async_array.codec_pipeline
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    identities = {pipeline._identity, *(identity_of(*pipeline._codecs) for _ in range(3))}
    assert len(identities) == 1
    assert tracemalloc.get_traced_memory()[0] - before < 1 << 16
    tracemalloc.stop()


def test_identity_of_what_is_gone_is_of_nothing_else() -> None:
    identity_of(Holder(None))
    known = len(identity._known)
    found = {identity_of(Holder(lambda: None)) for _ in range(100)}
    assert len(found) == 100
    # Others may have gone meanwhile.
    assert len(identity._known) <= known


def test_ways_of_decoding_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LAYOUTS", 4)
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = zarr.create_array(
        store, shape=(8,), chunks=(4,), dtype="u1", compressors=[Closure(key=7)]
    )
    array[:] = VALUES
    for key in (7, 9) * 6:
        expected = VALUES ^ 7 ^ key
        one = opened(Closure, key, store)
        assert [read(one)[0] for _ in range(2)] == [expected.tolist()] * 2
        assert read(array)[0] == VALUES.tolist()
    assert store._decoded is not None
    assert len(store._decoded._layouts) == 4
