"""zarr's own conformance suite, over pairs of source and cache store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import pytest
from zarr.core.buffer import Buffer, cpu
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    ObjectStore,
    WrapperStore,
)
from zarr.testing.store import LatencyStore, StoreTests

from doubles import WatchedStore
from pools import pool_with_neighbours
from support import buf, check_quiet, innermost
from zcache import CacheStore
from zcache.testing import cache_store_of, source_of

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

SYNC_TESTS = ("test_get_sync", "test_get_sync_missing", "test_set_sync", "test_delete_sync")
# A wrapper of zarr before 3.4 hides the synchronous methods of the store that it wraps. What the
# cache does then is in `test_sync_surface`.
WRAPPER_SKIPS = (
    {}
    if hasattr(WrapperStore, "get_sync")
    else dict.fromkeys(
        (*SYNC_TESTS, "test_delete_sync_missing"), "wrappers of zarr before 3.4 are async only"
    )
)


class CacheStoreTests(StoreTests[CacheStore, cpu.Buffer]):
    store_cls = CacheStore
    buffer_cls = cpu.Buffer

    skips: ClassVar[dict[str, str]] = {}
    """Test and why it does not apply to this pair. Any other skip is a failure."""

    def make_source(self, path: Path) -> Store:
        return MemoryStore()

    def make_cache(self, path: Path) -> Any:
        return MemoryStore()

    def make_options(self) -> dict[str, Any]:
        return {}

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "source").mkdir()  # A directory that is not there cannot be opened to read.
        return {
            "store": self.make_source(tmp_path / "source"),
            "cache_store": self.make_cache(tmp_path / "cache"),
            **self.make_options(),
        }

    @pytest.fixture(autouse=True)
    def no_silent_skip(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = request.node.originalname
        if name in self.skips:
            pytest.skip(self.skips[name])

        def refuse(reason: str = "", **_: object) -> NoReturn:
            pytest.fail(f"{name} wants to skip: {reason}")

        monkeypatch.setattr(pytest, "skip", refuse)

    def test_skips_exist(self) -> None:
        assert all(callable(getattr(StoreTests, name)) for name in self.skips)

    async def set(self, store: CacheStore, key: str, value: Buffer) -> None:
        source = innermost(source_of(store))
        if isinstance(source, MemoryStore):
            source._store_dict[key] = value
        else:
            assert isinstance(source, LocalStore)
            path = source.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.to_bytes())

    async def get(self, store: CacheStore, key: str) -> Buffer:
        source = innermost(source_of(store))
        if isinstance(source, MemoryStore):
            return source._store_dict[key]
        assert isinstance(source, LocalStore)
        return buf((source.root / key).read_bytes())

    def test_store_repr(self, store: CacheStore) -> None:
        text = repr(store)
        assert text.startswith("CacheStore(")
        assert repr(source_of(store)) in text
        assert repr(cache_store_of(store)) in text

    def test_store_supports_writes(self, store: CacheStore) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: CacheStore) -> None:
        assert store.supports_listing

    def test_sync_surface(self, store: CacheStore) -> None:
        assert store._supports_sync_io is not bool(self.skips)
        if self.skips:
            with pytest.raises(TypeError, match=r"get_sync needs .* has none\. Use get instead"):
                store.get_sync("key")
            with pytest.raises(TypeError, match="set_sync needs"):
                store.set_sync("key", buf(b"value"))
            with pytest.raises(TypeError, match="delete_sync needs"):
                store.delete_sync("key")

    @pytest.fixture(autouse=True)
    async def invariants_hold(self, request: pytest.FixtureRequest) -> Any:
        yield
        for fixture in ("store", "store_not_open"):
            if fixture in request.node.funcargs:
                await check_quiet(request.node.funcargs[fixture])


class TestMemoryMemory(CacheStoreTests):
    pass


class TestDefaultCache(CacheStoreTests):
    @pytest.fixture
    def store_kwargs(self) -> dict[str, Any]:
        return {"store": MemoryStore()}


class TestLocalMemory(CacheStoreTests):
    def make_source(self, path: Path) -> Store:
        return LocalStore(path)


class TestMemoryLocal(CacheStoreTests):
    def make_cache(self, path: Path) -> Store:
        return LocalStore(path)


class TestLocalLocal(CacheStoreTests):
    def make_source(self, path: Path) -> Store:
        return LocalStore(path)

    def make_cache(self, path: Path) -> Store:
        return LocalStore(path)


class TestMemoryPool(CacheStoreTests):
    """A pool in which two other sources have values of the same keys."""

    def make_cache(self, path: Path) -> Any:
        return pool_with_neighbours(path)


class TestLocalPool(TestMemoryPool):
    def make_source(self, path: Path) -> Store:
        return LocalStore(path)


class TestPoolInMemory(TestMemoryPool):
    def make_cache(self, path: Path) -> Any:
        return pool_with_neighbours(None)


class TestLatencyMemory(CacheStoreTests):
    skips: ClassVar[dict[str, str]] = WRAPPER_SKIPS

    def make_source(self, path: Path) -> Store:
        return LatencyStore(MemoryStore(), get_latency=0.001, set_latency=0.001)


class TestLoggingLocal(CacheStoreTests):
    skips: ClassVar[dict[str, str]] = WRAPPER_SKIPS

    def make_source(self, path: Path) -> Store:
        return LoggingStore(LocalStore(path))

    def make_cache(self, path: Path) -> Store:
        return LocalStore(path)


class TestMemoryWrapped(CacheStoreTests):
    """A cache store that is reached by its coroutines."""

    def make_cache(self, path: Path) -> Store:
        return WatchedStore(MemoryStore())


class TestObjectLocal(CacheStoreTests):
    """A source that another library reads, by coroutines only."""

    skips: ClassVar[dict[str, str]] = {
        name: "the source has coroutines only"
        for name in dir(StoreTests)
        if name.startswith("test_") and "sync" in name
    }
    path: Path

    def make_source(self, path: Path) -> Store:
        self.path = path
        return ObjectStore(pytest.importorskip("obstore.store").LocalStore(prefix=str(path)))

    def make_cache(self, path: Path) -> Any:
        return LocalStore(path)

    async def set(self, store: CacheStore, key: str, value: Buffer) -> None:
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())

    async def get(self, store: CacheStore, key: str) -> Buffer:
        return buf((self.path / key).read_bytes())


class TestFsspecPool(TestObjectLocal):
    def make_source(self, path: Path) -> Store:
        self.path = path
        return FsspecStore.from_url(f"file://{path}", storage_options={"auto_mkdir": True})

    def make_cache(self, path: Path) -> Any:
        return pool_with_neighbours(path)


class TestNoRoom(CacheStoreTests):
    """Most values of the suite do not fit, or push out the one before."""

    def make_options(self) -> dict[str, Any]:
        return {"max_size": 4}


class TestAlwaysStale(CacheStoreTests):
    def make_options(self) -> dict[str, Any]:
        return {"max_age_seconds": 0}


class TestWritesUncached(CacheStoreTests):
    def make_options(self) -> dict[str, Any]:
        return {"cache_set_data": False}
