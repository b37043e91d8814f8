"""Names of sources: the same in every process, different for different data, and without secrets."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zarr.storage
from zarr.abc.store import Store
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    WrapperStore,
    ZipStore,
)

from zcache import CacheStore
from zcache._identity import Named, identify, overlap, same_source, transient


def test_local_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    names = {
        identify(store)
        for store in (
            LocalStore(tmp_path / "data"),
            LocalStore("data"),
            LocalStore(tmp_path / "link", read_only=True),
            WrapperStore(LocalStore(tmp_path / "data")),
        )
    }
    assert names == {f"file://{os.path.realpath(tmp_path / 'data')}"}
    assert identify(ZipStore(tmp_path / "a.zip", mode="w")) == f"zip://{tmp_path / 'a.zip'}"


def remote(protocol: Any, path: str, **options: Any) -> Any:
    """What `identify` asks of an `FsspecStore`."""
    return SimpleNamespace(
        fs=SimpleNamespace(protocol=protocol, storage_options=options), path=path
    )


@pytest.mark.parametrize(
    ("store", "name"),
    [
        (remote(("s3", "s3a"), "bucket/a.zarr"), "s3://bucket/a.zarr"),
        (remote("s3", "bucket/a.zarr", key="me", secret="hush"), "s3://bucket/a.zarr"),
        (remote("s3", "b/a", endpoint_url="http://node:9000"), "s3://b/a at http://node:9000"),
        (
            remote("s3", "b/a", client_kwargs={"endpoint_url": "http://me:hush@node:9000"}),
            "s3://b/a at http://node:9000",
        ),
        (remote("https", "https://me:hush@node/a.zarr"), "https://node/a.zarr"),
        (remote("https", "https://node/a@2.zarr"), "https://node/a@2.zarr"),
        (remote("s3", "b/a/"), "s3://b/a"),
        (remote(("abfs", "az"), "c/a", account_name="me", sas_token="hush"), "abfs://c/a at me"),
        (remote("abfs", "c/a", sas_token="hush"), None),
        (remote("memory", "/a"), None),
    ],
)
def test_remote_sources(store: Any, name: str | None) -> None:
    assert identify(store) == name


def test_fsspec(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url(f"file://{tmp_path}/a", read_only=True)
    two = FsspecStore.from_url(f"file://{tmp_path}/b", read_only=True)
    assert identify(one) == f"file://{tmp_path}/a"
    assert identify(one) != identify(two)


def test_obstore() -> None:
    stores = pytest.importorskip("obstore.store")
    storage = pytest.importorskip("zarr.storage").ObjectStore
    options = {"access_key_id": "me", "secret_access_key": "hush", "region": "x"}
    one = identify(storage(stores.S3Store("bucket", prefix="a", **options)))
    assert one is not None
    assert "bucket" in one
    assert "hush" not in one
    assert one == identify(storage(stores.S3Store("bucket", prefix="a", **options)))
    for other in (
        stores.S3Store("bucket", prefix="b", **options),
        stores.S3Store("other", prefix="a", **options),
        stores.S3Store("bucket", prefix="a", endpoint="http://node:9000", **options),
    ):
        assert identify(storage(other)) not in (one, None)
    assert identify(storage(stores.MemoryStore())) is None


class Unnamed(MemoryStore):
    """A store without a name."""


class Numbered:
    """A store whose text is another one in each process."""

    def __str__(self) -> str:
        return f"<{id(self):#x}>"


def test_sources_without_a_name() -> None:
    assert identify(Unnamed()) is None
    assert identify(Numbered()) is None
    values: dict[str, Any] = {}
    one = MemoryStore(values)
    assert transient(one) == transient(MemoryStore(values))
    assert transient(one) != transient(MemoryStore())


class Constant(MemoryStore):
    """A store whose text is the same for all of them."""

    def __str__(self) -> str:
        return "<Constant>"


class Upper(LocalStore):
    """Shows other bytes than the directory, and says so."""

    def __str__(self) -> str:
        return f"upper:{self.root}"


def test_texts_that_tell_no_two_apart(tmp_path: Path) -> None:
    assert identify(Constant()) is None
    assert not same(Constant(), Constant())
    plain, upper = LocalStore(tmp_path), Upper(tmp_path)
    assert identify(upper) not in (None, identify(plain))
    assert same(upper, Upper(tmp_path))
    assert not same(upper, plain)


def test_an_archive_without_a_path(tmp_path: Path) -> None:
    try:
        stores = [ZipStore(io.BytesIO(), mode="w") for _ in range(2)]  # type: ignore[arg-type]
        repr(stores)
    except (TypeError, AssertionError):
        pytest.skip("zarr before 3.4 takes no open files")
    assert identify(stores[0]) is None
    assert not same(*stores)
    assert not overlap(stores[0], LocalStore(Path.cwd() / "None" / "cache"))


def test_the_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    one = identify(remote("s3", "b/a"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@node:9000")
    assert identify(remote("s3", "b/a")) == f"{one} at http://node:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://node:9001")
    assert identify(remote("s3", "b/a")) == f"{one} at http://node:9001"
    given = identify(remote("s3", "b/a", endpoint_url="http://other"))
    assert given == f"{one} at http://other"
    assert identify(remote("gs", "b/a")) == "gs://b/a"


def test_parts_of_one_memory() -> None:
    managed = getattr(zarr.storage, "ManagedMemoryStore", None)
    if managed is None:
        pytest.skip("not in this zarr")
    whole, one, other = (managed("x", path=path) for path in ("", "a", "a2"))
    assert not same(one, other)
    assert not same(one, whole)
    assert same(one, managed("x", path="a", read_only=True))
    assert overlap(one, whole)
    assert not overlap(one, other)
    cache = MemoryStore()
    CacheStore(one, cache_store=cache)
    with pytest.raises(ValueError, match="holds the cache of"):
        CacheStore(other, cache_store=cache)


def test_memory_of_fsspec_by_other_spellings() -> None:
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url("memory://spelled")
    for other in (
        FsspecStore(one.fs, path="spelled"),
        FsspecStore(one.fs, path="/spelled", read_only=True),
    ):
        assert overlap(one, other)
        assert same(one, other)
    assert overlap(one, FsspecStore(one.fs, path="/spelled/cache"))
    assert not overlap(one, FsspecStore(one.fs, path="/spelled2"))


def test_overlap(tmp_path: Path) -> None:
    one = LocalStore(tmp_path / "a")
    assert overlap(one, WrapperStore(LocalStore(tmp_path / "a/b")))
    assert overlap(WrapperStore(LocalStore(tmp_path / "a/b")), one)
    assert not overlap(one, LocalStore(tmp_path / "ab"))
    assert not overlap(MemoryStore(), MemoryStore())
    values: dict[str, Any] = {}
    assert overlap(MemoryStore(values), MemoryStore(values, read_only=True))


def test_overlap_of_other_kinds_of_stores(tmp_path: Path) -> None:
    """One directory is one place, whichever library reads it, and so is a bucket."""
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url(f"file://{tmp_path}/a")
    for other, expected in [
        (FsspecStore.from_url(f"file://{tmp_path}/a"), True),
        (FsspecStore.from_url(f"file://{tmp_path}/a", read_only=True), True),
        (FsspecStore.from_url(f"file://{tmp_path}/a/cache"), True),
        (FsspecStore.from_url(f"file://{tmp_path}/ab"), False),
        (LocalStore(tmp_path / "a"), True),
        (LocalStore(tmp_path), True),
        (LocalStore(tmp_path / "b"), False),
        (MemoryStore(), False),
    ]:
        assert overlap(one, other) is overlap(other, one) is expected, other
    bucket = remote(("s3", "s3a"), "bucket/a", key="me")
    for store, expected in [
        (remote("s3", "bucket/a/cache"), True),
        (remote("s3", "bucket"), True),
        (remote("s3", "bucket/ab"), False),
        (remote("s3", "bucket/a", endpoint_url="http://node:9000"), False),
        (remote("gs", "bucket/a"), False),
    ]:
        assert overlap(bucket, store) is overlap(store, bucket) is expected, store


def test_overlap_by_obstore(tmp_path: Path) -> None:
    stores = pytest.importorskip("obstore.store")
    storage = pytest.importorskip("zarr.storage").ObjectStore
    (tmp_path / "a").mkdir()
    one = storage(stores.LocalStore(tmp_path / "a"))
    assert overlap(one, storage(stores.LocalStore(tmp_path / "a"), read_only=True))
    assert overlap(one, LocalStore(tmp_path))
    assert not overlap(one, LocalStore(tmp_path / "b"))
    assert overlap(storage(stores.S3Store("bucket", prefix="a")), remote("s3", "bucket/a/cache"))


def same(one: Any, other: Any) -> bool:
    return same_source(named(one), named(other))


def named(store: Any, given: str | None = None) -> Named:
    return Named(store, given or identify(store) or transient(store), given is not None)


def test_sources_that_are_named(tmp_path: Path) -> None:
    one, other = LocalStore(tmp_path / "a"), MemoryStore()
    assert same_source(named(one, "x"), named(other, "x"))
    assert not same_source(named(one, "x"), named(one, "y"))
    # Only one of them says anything.
    assert same_source(named(one, "x"), named(one))
    assert same_source(named(other), named(other, "x"))
    assert not same_source(named(other), named(one, "x"))


def test_same_source(tmp_path: Path) -> None:
    one = LocalStore(tmp_path / "a")
    assert same(one, WrapperStore(LocalStore(tmp_path / "a", read_only=True)))
    assert not same(one, LocalStore(tmp_path / "a/b"))
    assert not same(MemoryStore(), MemoryStore())
    pytest.importorskip("fsspec")
    reader = FsspecStore.from_url(f"file://{tmp_path}/a", read_only=True)
    assert same(reader, FsspecStore.from_url(f"file://{tmp_path}/a"))
    assert same(reader, one)
    assert not same(reader, FsspecStore.from_url(f"file://{tmp_path}/a/b"))


class Below(WrapperStore[Store]):
    """Shows what lies below a prefix."""

    def __init__(self, store: Store, prefix: str) -> None:
        super().__init__(store)
        self.prefix = prefix

    def __str__(self) -> str:
        return f"{self._store}/{self.prefix}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Below) and str(self) == str(other)

    __hash__ = None  # type: ignore[assignment]


class Logging(LoggingStore[Store]):
    """Says what zarr's says."""


def test_wrappers_of_zarrs(tmp_path: Path) -> None:
    assert identify(Logging(LocalStore(tmp_path))) == identify(LocalStore(tmp_path))


def test_wrappers_that_say_what_they_show(tmp_path: Path) -> None:
    whole = LocalStore(tmp_path)
    one, other = Below(whole, "a"), Below(whole, "b")
    assert identify(one) == f"Below:file://{tmp_path}/a of file://{tmp_path}"
    assert identify(WrapperStore(one)) == identify(Below(LocalStore(tmp_path), "a"))
    assert identify(other) not in (identify(one), identify(whole))
    assert same(one, Below(LocalStore(tmp_path), "a"))
    assert not same(one, other)
    assert not same(one, whole)
    assert not same_source(named(one, "x"), named(whole))
    assert not same_source(named(one, "x"), named(other))


class Vague(Below):
    """Says what it shows, but not of what; and compares as any wrapper of zarr's."""

    __eq__ = WrapperStore.__eq__
    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"below {self.prefix}"


def test_wrappers_of_what_has_no_name(tmp_path: Path) -> None:
    for kind in (Below, Vague):
        memory = MemoryStore()
        one, other = kind(memory, "a"), kind(memory, "b")
        assert identify(one) is None
        assert transient(one) == transient(kind(memory, "a"))
        assert same(one, kind(memory, "a"))
        assert transient(memory) != transient(one) != transient(other)
        for different in (other, memory, kind(MemoryStore(), "a")):
            assert not same(one, different)
    assert identify(Vague(LocalStore(tmp_path / "x"), "a")) != identify(
        Vague(LocalStore(tmp_path / "y"), "a")
    )


class Counting(WrapperStore[Store]):
    """Its text tells how often it was asked."""

    asked = 0

    def __str__(self) -> str:
        self.asked += 1
        return f"asked {self.asked} times: {self._store}"


def test_a_text_that_changes_is_the_first_one(tmp_path: Path) -> None:
    source, cache = Counting(LocalStore(tmp_path)), Counting(MemoryStore())
    assert identify(source) == identify(source) is not None
    one, other = (CacheStore(source, cache_store=cache) for _ in range(2))
    assert one._engine.index is other._engine.index


class Listed(Store):
    """A source of the user's own, that only `repr` tells of."""

    def __init__(self, store: Store, prefix: str) -> None:
        super().__init__()
        self._store = store
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"Listed({self._store}, {self.prefix})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


Listed.__abstractmethods__ = frozenset()  # Nobody reads from it.


class Silent(WrapperStore[Store]):
    """A wrapper that only compares."""

    def __init__(self, store: Store, prefix: str) -> None:
        super().__init__(store)
        self.prefix = prefix

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.prefix == other.prefix

    __hash__ = None  # type: ignore[assignment]


def test_stores_that_say_what_they_show_in_another_way(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    names = {identify(Listed(local, prefix)) for prefix in "ab"}
    assert None not in names
    assert len(names) == 2
    assert identify(Silent(local, "a")) is None
    one = Silent(local, "a")
    assert transient(one) == transient(one)
    # One after the other they may have one address, and are not the same for that.
    assert len({transient(Silent(local, f"{number}")) for number in range(50)}) == 50
    for kind in (Listed, Silent):
        assert same(kind(local, "a"), kind(local, "a"))
        assert not same(kind(local, "a"), kind(local, "b"))
        assert not same(kind(local, "a"), local)


def test_caches_below_prefixes_of_one_memory() -> None:
    """They have names in common and are two places: one index would mix them up."""
    memory, source = MemoryStore(), MemoryStore()
    one, other, again = (CacheStore(source, cache_store=Below(memory, p)) for p in "aba")
    assert one._engine.index is again._engine.index
    assert one._engine.index is not other._engine.index


def test_file_systems_within_others(tmp_path: Path) -> None:
    """The path alone does not tell what is read: the archive, the directory, the references do."""
    pytest.importorskip("fsspec")
    wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper").AsyncFileSystemWrapper
    within = pytest.importorskip("fsspec.implementations.dirfs").DirFileSystem
    references = pytest.importorskip("fsspec.implementations.reference").ReferenceFileSystem
    filesystem = pytest.importorskip("fsspec").filesystem

    def directory(name: str) -> FsspecStore:
        inner = within(path=str(tmp_path / name), fs=filesystem("file"))
        return FsspecStore(wrapper(inner, asynchronous=True), path="")

    def reference(name: str) -> FsspecStore:
        found = {"version": 1, "refs": {"zarr.json": [str(tmp_path / name)]}}
        inner = references(found, asynchronous=True, remote_protocol="file")
        return FsspecStore(inner, path="", read_only=True)

    for make in (directory, reference):
        assert identify(make("a")) == identify(make("a")) is not None
        assert identify(make("a")) != identify(make("b"))
        assert same(make("a"), make("a"))
        assert not same(make("a"), make("b"))
    # Nobody can tell.
    assert identify(remote("sftp", "/a", host="node")) is None


def made_with(**options: Any) -> Any:
    """A store on a file system that tells what it was made with."""
    store = remote("sftp", "/a", **options)
    store.fs.to_json = lambda: json.dumps({"cls": "x", "protocol": "sftp", **options})
    return store


def test_who_asks_is_not_in_the_name() -> None:
    """Passwords and tokens change from day to day, and nobody may guess them from a name."""
    name = identify(made_with(host="node", port=22))
    assert name == identify(made_with(port=22, password="hush", sshkey="x", host="node"))
    assert name not in (None, identify(made_with(host="other", port=22)))
    assert len({identify(made_with(keyspace=at, author=at)) for at in "ab"}) == 2
    inner = {"target_options": {"host": "node", "token": "hush"}}
    assert identify(made_with(**inner)) == identify(made_with(target_options={"host": "node"}))
    assert identify(made_with(**inner)) != identify(made_with(target_options={"host": "other"}))
    # Names of values are none of options.
    keys = [identify(made_with(fo={"keys/0": [n]})) for n in "ab"]
    assert keys[0] != keys[1]
    # What ends with the process has no name that outlives it.
    assert identify(made_with(fs={"protocol": "memory"}, at="a")) is None


def test_long_lists_of_references_are_read_once() -> None:
    store, asked = made_with(host="node"), []
    told = store.fs.to_json
    store.fs = Hashable(protocol="sftp", to_json=lambda: asked.append(1) or told())
    assert identify(store) == identify(store) is not None
    assert len(asked) == 1


class Hashable(SimpleNamespace):
    """A file system as those of fsspec are."""

    __hash__ = object.__hash__


class Odd(MemoryStore):
    """A store of which nothing can be asked."""

    fs = object()
    path = "a"

    def __str__(self) -> str:
        raise RuntimeError("not now")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not now")

    __hash__ = None  # type: ignore[assignment]


class OddWrapper(WrapperStore[Store]):
    """A wrapper of which nothing can be asked."""

    __str__ = Odd.__str__
    __eq__ = Odd.__eq__
    __hash__ = None  # type: ignore[assignment]


def test_odd_stores() -> None:
    for store in (Odd(), OddWrapper(MemoryStore())):
        assert identify(store) is None
        assert not overlap(store, MemoryStore())
        assert CacheStore(store).cache_info()["cached_keys"] == 0
