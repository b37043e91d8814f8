"""Names of sources: the same in every process, different for different data, and without secrets."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer
from zarr.experimental.cache_store import CacheStore as ZarrCacheStore
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    ObjectStore,
    WrapperStore,
    ZipStore,
)
from zarr.testing.store import LatencyStore

from support import logged
from zcache import CachePool, CacheStore
from zcache._source import identity
from zcache._source.identity import (
    EPHEMERAL,
    SourceId,
    identify,
    keeps_values_in_process,
    location_named,
    same_source,
    say_unnamed,
)
from zcache._source.location import Location, location_here

if TYPE_CHECKING:
    from pathlib import Path

HUSH = "hush"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment may name accounts of the person who runs the tests."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))


def same(one: Store, other: Store) -> bool:
    return same_source((one, identify(one)), (other, identify(other)))


def name_of(store: Store) -> str | None:
    """The name that a source has in every process."""
    found = identify(store)
    assert not found.given
    return None if found.is_ephemeral else found.name


def s3(path: str = "bucket/a", **options: Any) -> FsspecStore:
    pytest.importorskip("s3fs")
    return FsspecStore.from_url(f"s3://{path}", storage_options=options)


# ------------------------------------------------------------------------------- names


def test_location_named_is_that_of_the_source(tmp_path: Path) -> None:
    stores = [LocalStore(tmp_path), ZipStore(tmp_path / "a.zip", mode="w"), MemoryStore()]
    for store in stores:
        assert location_named(identify(store).name) == location_here(store)
    assert location_named("icechunk:1CECHNKREP0F1RSTCMT0@s3://b/a@b") == Location("s3://", "b/a@b")
    name = identify(stores.pop()).name
    del store
    gc.collect()
    assert location_named(name) is None
    assert location_named("mine") is None


def test_identify_directories_and_archives(tmp_path: Path) -> None:
    assert name_of(LocalStore(tmp_path)) == f"file://{os.path.realpath(tmp_path)}"
    archive = os.path.realpath(tmp_path / "a.zip")
    assert name_of(ZipStore(tmp_path / "a.zip", mode="w")) == f"zip://{archive}"


def test_identify_wrappers_of_zarr_shows_what_they_wrap(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    for store in (
        WrapperStore(local),
        LoggingStore(local, log_level="ERROR"),
        LatencyStore(WrapperStore(local)),
        ZarrCacheStore(local, cache_store=MemoryStore()),
    ):
        assert identify(store) == identify(local)
        assert same(store, LocalStore(tmp_path))


def test_identify_a_cache_of_zcache_shows_its_source(tmp_path: Path) -> None:
    cache = pytest.importorskip("zcache").CacheStore(LocalStore(tmp_path))
    assert identify(cache) == identify(LocalStore(tmp_path))


def test_identify_with_source_id_is_that() -> None:
    found = identify(MemoryStore(), "runs of 2024")
    assert found == SourceId("runs of 2024", given=True)
    assert not found.is_ephemeral
    # Whatever the user writes outlives the process.
    assert not identify(MemoryStore(), f"{EPHEMERAL}1").is_ephemeral


def test_identify_the_same_in_another_process(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import json, sys
        from zarr.storage import FsspecStore, LocalStore, MemoryStore
        from zcache._source.identity import identify
        stores = [LocalStore(sys.argv[1]), MemoryStore()]
        print(json.dumps([identify(store).name for store in stores]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    named, unnamed = json.loads(done.stdout)
    assert named == identify(LocalStore(tmp_path)).name
    assert unnamed.startswith(EPHEMERAL)


# ------------------------------------------------------------------------------- no name


class Below(WrapperStore[Store]):
    """Shows what lies below a prefix; its text and its comparison tell of it."""

    def __init__(self, store: Store, prefix: str) -> None:
        super().__init__(store)
        self.prefix = prefix

    def __str__(self) -> str:
        return f"{self._store}/{self.prefix}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Below) and str(self) == str(other)

    __hash__ = None  # type: ignore[assignment]


class Upper(LocalStore):
    """Shows other bytes than the directory."""


class Terse(MemoryStore):
    """A store that tells its state in its text, but not which data."""

    def __str__(self) -> str:
        return f"<Terse read_only={self.read_only}>"

    __repr__ = __str__


def test_identify_classes_of_the_users_own_have_no_name(tmp_path: Path) -> None:
    for make in (lambda: Below(LocalStore(tmp_path), "a"), lambda: Upper(tmp_path), Terse):
        one, other = make(), make()
        assert name_of(one) is None
        assert same(one, one)
        assert same(one, WrapperStore(one))
        assert not same(one, other)
        assert not same(one, LocalStore(tmp_path))


def test_identify_stores_with_one_terse_text_differ() -> None:
    """They had one name by their text, and served each other's bytes."""
    one, other = Terse(), Terse()
    assert str(one) == str(other)
    assert identify(one) != identify(other)
    assert not same(one, other)


def test_identify_file_systems_that_read_others_have_no_name(tmp_path: Path) -> None:
    filesystem = pytest.importorskip("fsspec").filesystem
    wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper").AsyncFileSystemWrapper

    def wrapped(protocol: str, **options: Any) -> FsspecStore:
        options = {"skip_instance_cache": True, **options}
        return FsspecStore(wrapper(filesystem(protocol, **options), asynchronous=True), path="a")

    (tmp_path / "a.zip").write_bytes(b"PK\5\6" + bytes(18))
    cached = {"target_protocol": "file", "cache_storage": str(tmp_path / "cache")}
    for protocol, options in [
        ("dir", {"path": str(tmp_path), "fs": filesystem("file")}),
        ("zip", {"fo": str(tmp_path / "a.zip")}),
        ("simplecache", cached),
        ("filecache", cached),
        ("blockcache", cached),
        ("memory", {}),
    ]:
        assert name_of(wrapped(protocol, **options)) is None, protocol
    references = filesystem(
        "reference",
        fo={"version": 1, "refs": {"a/zarr.json": [str(tmp_path / "x")]}},
        remote_protocol="file",
        asynchronous=True,
    )
    assert name_of(FsspecStore(references, path="a", read_only=True)) is None


@pytest.mark.slow
def test_identify_subclasses_of_file_systems_have_no_name() -> None:
    s3fs = pytest.importorskip("s3fs")

    class Versioned(s3fs.S3FileSystem):  # type: ignore[misc]
        """Reads yesterday's objects."""

    assert name_of(FsspecStore(Versioned(asynchronous=True, anon=True), path="bucket/a")) is None


def test_identify_obstore_in_memory_has_no_name() -> None:
    stores = pytest.importorskip("obstore.store")
    bucket = stores.MemoryStore()
    one, other = ObjectStore(bucket), ObjectStore(bucket, read_only=True)
    assert name_of(one) is None
    assert same(one, other)
    assert not same(one, ObjectStore(stores.MemoryStore()))


# ------------------------------------------------------------------------------- in one process


def test_identify_holders_of_one_dict_are_one_source() -> None:
    values: dict[str, Any] = {}
    one, other = MemoryStore(values), MemoryStore(values, read_only=True)
    assert identify(one) == identify(other)
    assert same(one, LoggingStore(other, log_level="ERROR"))
    assert not same(one, MemoryStore(dict(values)))


def test_identify_file_systems_of_one_object_are_one_source() -> None:
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url("memory://identity/a")
    assert same(one, FsspecStore.from_url("memory://identity/a", read_only=True))
    assert not same(one, FsspecStore.from_url("memory://identity/b"))


def test_identify_spellings_of_one_folder_are_one_source(tmp_path: Path) -> None:
    """They had names of their own, so one did not hear of what was written through the other."""
    filesystem = pytest.importorskip("fsspec").filesystem
    wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper").AsyncFileSystemWrapper
    files = filesystem("file")
    below = filesystem("dir", path=str(tmp_path), fs=files)

    def store(path: str) -> FsspecStore:
        return FsspecStore(wrapper(below, asynchronous=True), path=path)

    one = store("a")
    for path in ("/a", "a/", "/a/"):
        assert same(one, store(path))
        assert identify(one) == identify(store(path))
    assert not same(one, store("b"))


def test_identify_keeps_a_name_as_long_as_a_holder_lives() -> None:
    values: dict[str, Any] = {}
    one, other = MemoryStore(values), MemoryStore(values)
    name = identify(one)
    assert identify(other) == name
    del one
    gc.collect()
    assert identify(MemoryStore(values)) == name


def test_identify_forgets_names_of_what_is_gone() -> None:
    """One after the other may have one address, and is not the same for that."""
    before = len(identity._known)
    assert len({identify(MemoryStore()).name for _ in range(50)}) == 50
    gc.collect()
    assert len(identity._known) <= before


class Referenced(MemoryStore):
    """Nothing refers to it weakly."""


def test_identify_what_knows_no_weak_references_has_a_new_name_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its address may be reused once it is gone, and nothing would tell."""

    def refuse(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr(identity.weakref, "finalize", refuse)
    store = Referenced()
    assert identify(store) != identify(store)
    assert same(store, store)


def _child(values: dict[str, Any], answers: Any) -> None:
    store = MemoryStore(values)
    one = (store, identify(store))
    answers.put((one[1].name, same_source(one, (store, SourceId(f"{EPHEMERAL}of the parent")))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_identify_after_a_fork_gives_another_name() -> None:
    """What a child does to its memory, its parent does not see."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    values: dict[str, Any] = {}
    store = MemoryStore(values)
    name = identify(store).name
    with warnings.catch_warnings():
        # Threads of other tests do not matter here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=_child, args=(values, answers))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    theirs, still_one = answers.get()
    assert theirs.startswith(EPHEMERAL)
    assert theirs != name
    # Yet what the child has inherited is what it was.
    assert still_one
    assert identify(store).name == name


def test_same_source_of_sources_that_are_named(tmp_path: Path) -> None:
    local, memory = LocalStore(tmp_path), MemoryStore()
    x, y = SourceId("x", given=True), SourceId("y", given=True)
    assert same_source((local, x), (memory, x))
    assert not same_source((local, x), (local, y))
    # Only one of them says anything.
    assert same_source((local, x), (local, identify(local)))
    assert same_source((memory, identify(memory)), (memory, x))
    assert not same_source((memory, identify(memory)), (local, x))
    by_rule = SourceId(identify(local).name, given=True)
    assert same_source((memory, by_rule), (local, identify(local)))


# ------------------------------------------------------------------------------- sites and accounts


@pytest.mark.slow
def test_identify_sites_of_profiles_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two S3 sites that only `endpoint_url` of an AWS profile tells apart."""
    (tmp_path / "aws-config").write_text(
        "".join(f"[profile {site}]\nendpoint_url = http://{site}:9000\n" for site in ("a", "b"))
    )
    names = {name_of(s3(profile=site)) for site in ("a", "b")}
    assert names == {"s3://bucket/a at http://a:9000", "s3://bucket/a at http://b:9000"}
    for site in ("a", "b"):
        monkeypatch.setenv("AWS_PROFILE", site)
        store = s3(skip_instance_cache=True)
        assert name_of(store) == f"s3://bucket/a at http://{site}:9000"


def test_identify_accounts_of_the_environment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Azure accounts that only the environment tells apart."""
    stores = pytest.importorskip("obstore.store")
    names = set()
    for account in ("one", "two"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
        names.add(name_of(ObjectStore(stores.AzureStore("container", prefix="a"))))
    assert names == {
        f"az://container/a at https://{a}.blob.core.windows.net" for a in ("one", "two")
    }


def test_identify_accounts_of_the_environment_differ_by_adlfs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adlfs = pytest.importorskip("adlfs")
    names = set()
    for account in ("one", "two"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
        filesystem = adlfs.AzureBlobFileSystem(anon=True, skip_instance_cache=True)
        filesystem.asynchronous = True
        names.add(name_of(FsspecStore(filesystem, path="container/a")))
    assert names == {
        f"az://container/a at https://{a}.blob.core.windows.net" for a in ("one", "two")
    }


# ------------------------------------------------------------------------------- icechunk


def repository(storage: Any) -> Any:
    return pytest.importorskip("icechunk").Repository.create(storage)


def local_repository(path: Path) -> Any:
    icechunk = pytest.importorskip("icechunk")
    return repository(icechunk.local_filesystem_storage(str(path)))


async def commit(repo: Any, data: bytes) -> None:
    session = repo.writable_session("main")
    await session.store.set("zarr.json", Buffer.from_bytes(data))
    session.commit("changed")


GROUP = b'{"zarr_format":3,"node_type":"group","attributes":{"v":%d}}'


async def test_identify_snapshots_of_one_repository(tmp_path: Path) -> None:
    repo = local_repository(tmp_path / "a")
    first = repo.readonly_session("main")
    assert name_of(first.store) == (
        f"icechunk:{first.snapshot_id}@{identify(LocalStore(tmp_path / 'a')).name}"
    )
    assert same(first.store, repo.readonly_session("main").store)
    again = pytest.importorskip("icechunk").Repository.open(repo.storage)
    assert same(first.store, again.readonly_session("main").store)
    await commit(repo, GROUP % 1)
    assert not same(first.store, repo.readonly_session("main").store)


def test_identify_first_snapshots_of_two_repositories_differ(tmp_path: Path) -> None:
    """All repositories begin with the same snapshot."""
    one, other = (local_repository(tmp_path / at).readonly_session("main") for at in "ab")
    assert one.snapshot_id == other.snapshot_id
    assert identify(one.store) != identify(other.store)
    assert not same(one.store, other.store)


def test_identify_snapshots_in_memory_have_no_name() -> None:
    icechunk = pytest.importorskip("icechunk")
    one, other = (
        repository(icechunk.in_memory_storage()).readonly_session("main").store for _ in range(2)
    )
    assert name_of(one) is None
    assert name_of(other) is None
    assert not same(one, other)


async def test_identify_sessions_that_write_have_no_name(tmp_path: Path) -> None:
    """What is not committed is in no snapshot."""
    repo = local_repository(tmp_path / "a")
    sessions = [repo.writable_session("main") for _ in range(2)]
    one, other = (session.store for session in sessions)
    for store in (one, one.with_read_only(True)):
        assert name_of(store) is None
        assert not same(store, other)
        assert not same(store, repo.readonly_session("main").store)
    assert same(one, one.with_read_only(True))
    await one.set("zarr.json", Buffer.from_bytes(GROUP % 1))
    sessions[0].commit("changed")
    # From now on it is a snapshot like others.
    assert same(one, repo.readonly_session("main").store)


async def test_identify_stores_of_one_session_are_one_source(tmp_path: Path) -> None:
    """A session gives another store each time."""
    session = local_repository(tmp_path / "a").writable_session("main")
    one, other = session.store, session.store
    assert one is not other
    assert same(one, other)
    name = identify(one).name
    del one
    gc.collect()
    # It is known as long as one of its stores lives.
    assert identify(session.store).name == identify(other).name == name
    pool = CachePool()
    writer, reader = (CacheStore(store, cache_store=pool) for store in (other, session.store))
    assert reader == writer
    for value in (GROUP % 1, GROUP % 2):
        await writer.set("zarr.json", Buffer.from_bytes(value))
        found = await reader.get("zarr.json", default_buffer_prototype())
        assert found is not None
        assert found.to_bytes() == value


def test_identify_snapshots_with_virtual_chunks_have_no_name(tmp_path: Path) -> None:
    """The same manifests may mean other values with another configuration."""
    icechunk = pytest.importorskip("icechunk")
    config = icechunk.RepositoryConfig.default()
    store = icechunk.local_filesystem_store(str(tmp_path))
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(f"file://{tmp_path}/x/", store)
    )
    storage = icechunk.local_filesystem_storage(str(tmp_path / "a"))
    repo = icechunk.Repository.create(storage, config)
    assert name_of(repo.readonly_session("main").store) is None


def test_sources_that_are_known_to_keep_their_values_in_their_process(tmp_path: Path) -> None:
    class Own(WrapperStore[Any]):
        pass

    class OwnMemory(MemoryStore):
        pass

    local = LocalStore(tmp_path)
    for store in (
        MemoryStore(),
        OwnMemory(),
        LoggingStore(MemoryStore(), log_level="ERROR"),
        Own(MemoryStore()),
        CacheStore(MemoryStore()),
        LocalStore("/proc/self/cwd"),
    ):
        assert keeps_values_in_process(store)
    for store in (local, Own(local), WrapperStore(local), CacheStore(Own(local))):
        assert not keeps_values_in_process(store)


def test_file_systems_in_memory_keep_their_values_in_their_process() -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = FsspecStore.from_url("memory://a")
    assert keeps_values_in_process(memory)
    folder = fsspec.filesystem("dir", fs=memory.fs, path="b", asynchronous=True)
    assert keeps_values_in_process(FsspecStore(folder, path="c"))


def test_buckets_in_memory_keep_their_values_in_their_process(tmp_path: Path) -> None:
    stores = pytest.importorskip("obstore.store")
    assert keeps_values_in_process(ObjectStore(stores.MemoryStore()))
    assert not keeps_values_in_process(ObjectStore(stores.LocalStore(tmp_path)))


def test_sessions_that_can_be_written_keep_their_values_in_their_process(tmp_path: Path) -> None:
    repo = local_repository(tmp_path)
    session = repo.writable_session("main")
    assert keeps_values_in_process(session.store)
    assert not keeps_values_in_process(repo.readonly_session("main").store)
    if hasattr(session, "fork"):
        assert keeps_values_in_process(session.fork().store)


def test_identify_snapshots_on_servers_differ_and_show_no_secret() -> None:
    icechunk = pytest.importorskip("icechunk")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    boto3 = pytest.importorskip("boto3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        keys = {"aws_access_key_id": HUSH, "aws_secret_access_key": HUSH}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="data")
        found = {}
        for prefix in ("a", "b"):
            storage = icechunk.s3_storage(
                bucket="data",
                prefix=prefix,
                region="us-east-1",
                access_key_id=HUSH,
                secret_access_key=HUSH,
                endpoint_url=url,
                allow_http=True,
                force_path_style=True,
            )
            session = repository(storage).readonly_session("main")
            found[prefix] = name_of(session.store)
        for prefix, name in found.items():
            assert name == f"icechunk:{session.snapshot_id}@s3://data/{prefix} at {url}"
    finally:
        server.stop()


# ------------------------------------------------------------------------------- secrets


def test_identify_shows_no_secret_and_knows_a_renewed_one() -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    stores = pytest.importorskip("obstore.store")
    signed = "X-Amz-Algorithm=AWS4&X-Amz-Date={0}&X-Amz-Signature={0}"
    shared = "sv=2024&se={0}&sr=c&sp=r&sig={0}"

    def sources(secret: str) -> dict[str, Store]:
        token = {"headers": {"Authorization": f"Bearer {secret}"}}
        made = {
            "parameters": FsspecStore.from_url(
                "https://node/a", storage_options={"params": {"token": secret}}
            ),
            "user": FsspecStore.from_url(f"https://me:{secret}@node/c"),
            "header": FsspecStore.from_url("https://node/d", storage_options=token),
            "client header": FsspecStore.from_url(
                "https://node/e", storage_options={"client_kwargs": token}
            ),
            "presigned of obstore": ObjectStore(
                stores.HTTPStore(f"https://node/f?{signed.format(secret)}")
            ),
            "keys of obstore": ObjectStore(
                stores.S3Store("b", access_key_id=secret, secret_access_key=secret)
            ),
            "shared access of obstore": ObjectStore(
                stores.AzureStore("c", account_name="acc", sas_token=shared.format(secret))
            ),
        }
        if "s3fs" in sys.modules:
            made["keys"] = s3(key=secret, secret=secret, token=secret)
            made["endpoint"] = s3("b/c", endpoint_url=f"http://me:{secret}@node:9000")
        return made

    pytest.importorskip("s3fs")
    first, renewed = sources("hush"), sources("hushhush")
    names = {kind: name_of(store) for kind, store in first.items()}
    assert None not in names.values(), names
    assert names == {kind: name_of(store) for kind, store in renewed.items()}
    assert len(set(names.values())) == len(names)
    assert HUSH not in json.dumps(names)


# ------------------------------------------------------------------------------- log


def test_say_unnamed_says_it_once_for_each_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zcache")
    one, other = Terse(), LoggingStore(MemoryStore(), log_level="ERROR")
    for store in (one, one, WrapperStore(one), other, other):
        say_unnamed(store, LocalStore(tmp_path))
    found = logged(caplog)
    assert [record.getMessage() for record in found] == [
        f"source {kind} has no name outside this process, so a persistent cache starts cold: pass "
        "source_id= to keep it warm"
        for kind in ("Terse", "MemoryStore")
    ]
    assert {record.levelname for record in found} == {"WARNING"}


def test_say_unnamed_of_a_cache_in_memory_is_for_information(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "zcache")
    say_unnamed(Terse(), MemoryStore())
    assert [record.levelname for record in logged(caplog)] == ["INFO"]


@pytest.mark.parametrize("query", ["?set", "?X-Amz-Signature", "?sv=1&sig", "#f"])
def test_say_unnamed_shows_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, query: str
) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    source = FsspecStore.from_url(f"https://me:{HUSH}@node/a{query}={HUSH}")
    assert name_of(source) is None
    say_unnamed(source, LocalStore(tmp_path))
    assert "source FsspecStore(https://node/a) has no name" in caplog.text
    assert HUSH not in caplog.text
