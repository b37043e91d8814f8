"""Where a path leads is settled once: what a source is named by is what is read and written."""

from __future__ import annotations

import asyncio
import os
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zarr
from zarr.storage import FsspecStore, LocalStore, LoggingStore, ObjectStore, WrapperStore, ZipStore

import zcache
from support import buf, read, read_through
from zcache import CachePool, CacheStore, with_decoded_cache
from zcache._source.answers import UnnamedError
from zcache._source.identity import identify
from zcache._source.settled import real_path, settled
from zcache.exceptions import NoSuchSourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store


def fsspec_store(path: str) -> Store:
    pytest.importorskip("fsspec")
    made = FsspecStore.from_url(f"file://{Path.cwd() / path}")
    # As who gives a file system does it.
    return FsspecStore(made.fs, path=path)


def obstore_store(path: str) -> Store:
    return ObjectStore(pytest.importorskip("obstore.store").LocalStore(path))


KINDS: dict[str, Callable[[str], Any]] = {
    "path": lambda path: path,
    "local": LocalStore,
    "fsspec": fsspec_store,
    "wrapped": lambda path: WrapperStore(LoggingStore(LocalStore(path), log_level="ERROR")),
}


@pytest.fixture
def months(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders, and a link to the first of them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("jan", "feb"):
        for key in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / key).write_text(name)
        with zipfile.ZipFile(f"{name}.zip", "w") as archive:
            archive.writestr("a", name)
            archive.writestr("b", name)
    move(tmp_path, "jan")
    return Path(os.path.realpath(tmp_path))


def move(where: Path, month: str) -> None:
    """Have the links lead there."""
    for suffix in ("", ".zip"):
        link = where / f"latest{suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{month}{suffix}")


def name_of(store: CacheStore) -> str:
    return store._cache.source_id.name


@pytest.mark.parametrize("path", ["latest", "./x/../latest", "absolute"])
@pytest.mark.parametrize("kind", KINDS)
async def test_link_that_leads_elsewhere_later_is_not_followed(
    kind: str, path: str, months: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (months / "x").mkdir()
    pool = CachePool(months / "pool", max_size="8 MiB")
    given = KINDS[kind](str(months / "latest") if path == "absolute" else path)
    store = zcache.open(given, cache=pool)
    assert name_of(store) == f"file://{months}/jan"
    assert await read_through(store, "a") == b"jan"
    packed = pickle.dumps(store)
    move(months, "feb")
    monkeypatch.chdir("/")
    await store.set("new", buf(b"new"))
    copies = [store, pickle.loads(packed), store.with_read_only(True)]
    for one in copies:
        assert await read_through(one, "b") == b"jan"
    assert (months / "jan/new").read_bytes() == b"new"
    assert not (months / "feb/new").exists()
    for month in ("jan", "feb"):
        other = zcache.open(LocalStore(months / month), cache=pool)
        for key in ("a", "b"):
            assert await read_through(other, key) == month.encode()
    assert len(pool.sources()) == 2


def test_link_to_an_archive_is_followed_once(months: Path) -> None:
    pool = CachePool(months / "pool", max_size="8 MiB")
    stores = [
        zcache.open("latest.zip", cache=pool),
        zcache.open(f"zip://{months}/latest.zip", cache=pool),
    ]
    move(months, "feb")
    for store in stores:
        assert name_of(store) == f"zip://{months}/jan.zip"
        assert asyncio.run(read_through(pickle.loads(pickle.dumps(store)), "a")) == b"jan"


@pytest.mark.parametrize("path", ["new.zip", "latest.zip", "absolute.zip"])
def test_archive_is_written_by_the_store_that_was_given_alone(path: str, months: Path) -> None:
    if path == "absolute.zip":
        path = str(months / path)
    with ZipStore(path, mode="a") as archive:
        store = CacheStore(archive)
        assert store._store is archive
        zarr.create_array(store, name="x", shape=2, dtype="i4")[:] = 1
        asyncio.run(archive.set("mine", buf(b"1")))
        asyncio.run(store.set("theirs", buf(b"2")))
    with zipfile.ZipFile(path) as found:
        assert {"x/zarr.json", "mine", "theirs"} <= set(found.namelist())
        assert found.testzip() is None


def test_store_of_obstore_is_used_itself_and_named_by_where_its_path_leads(months: Path) -> None:
    pool = CachePool(months / "pool", max_size="8 MiB")
    given = obstore_store("latest")
    store = CacheStore(given, cache_store=pool)
    assert store._store is given
    packed = pickle.dumps(store)
    move(months, "feb")
    for one, month in ((store, "jan"), (pickle.loads(packed), "feb")):
        assert name_of(one) == f"file://{months}/{month}"
        assert asyncio.run(read_through(one, "a")) == month.encode()


def test_archive_that_was_opened_elsewhere_has_no_name(months: Path) -> None:
    archive = ZipStore("latest.zip")
    archive._sync_open()
    assert identify(archive).name == f"zip://{months}/jan.zip"
    move(months, "feb")
    assert identify(archive).is_ephemeral
    pool = CachePool(months / "pool", max_size="8 MiB")
    store = zcache.open(archive, cache=pool)
    assert asyncio.run(read_through(store, "a")) == b"jan"
    assert asyncio.run(read_through(zcache.open("latest.zip", cache=pool), "a")) == b"feb"
    archive.close()
    # The next one to read opens what the path leads to.
    assert identify(archive).name == f"zip://{months}/feb.zip"


@pytest.mark.parametrize("kind", ["local", "fsspec", "wrapped"])
def test_store_over_a_path_without_links_is_used_itself(kind: str, months: Path) -> None:
    store = KINDS[kind](str(months / "jan"))
    assert settled(store) is store
    assert CacheStore(store)._store is store


def test_stores_over_one_place_are_equal_and_tell_it(months: Path) -> None:
    pool = CachePool(max_size="8 MiB")
    by_link, by_path = (
        CacheStore(LocalStore(p), cache_store=pool) for p in ("latest", months / "jan")
    )
    assert by_link == by_path
    assert str(by_link) == f"cache://file://{months}/jan"
    read_only = CacheStore(LocalStore("latest", read_only=True), cache_store=pool)
    assert read_only.read_only
    assert asyncio.run(read(read_only, "a")) == b"jan"


def test_folder_that_is_not_there_yet_is_made_where_the_link_leads(months: Path) -> None:
    (months / "link").symlink_to("later/x")
    store = CacheStore(LocalStore("link"))
    zarr.create_array(store, shape=2, dtype="i4")[:] = 1
    assert (months / "later/x/zarr.json").exists()


async def test_wrapper_of_the_users_own_reads_as_it_does_and_has_no_name(months: Path) -> None:
    class Own(WrapperStore[Any]):
        pass

    store = CacheStore(Own(LocalStore(months / "latest")))
    assert store._cache.source_id.is_ephemeral
    assert await read(store, "a") == b"jan"


def test_array_with_decoded_chunks_stays_where_the_link_has_led(months: Path) -> None:
    for month, value in (("jan", 1), ("feb", 2)):
        zarr.create_array(months / month, name="x", shape=2, dtype="i4")[:] = value
    array = with_decoded_cache(zarr.open_array(LocalStore("latest"), path="x"), "1MB")
    move(months, "feb")
    other = with_decoded_cache(zarr.open_array(LocalStore("jan"), path="x"), "1MB")
    assert list(array[:]) == list(other[:]) == [1, 1]
    other[:] = 3
    assert list(array[:]) == [3, 3]
    array[:] = 4
    assert list(other[:]) == [4, 4]


# ------------------------------------------------------------------------------- paths


def test_real_path_is_that_of_the_system(months: Path) -> None:
    (months / "up").symlink_to("latest/..")
    (months / "root").symlink_to("/")
    for path in (
        "latest/a",
        "latest/../jan/none",
        "up/jan",
        f"root{months}/./feb/",
        "//",
        "nothing/at/all",
    ):
        assert real_path(path) == os.path.realpath(path)


@pytest.mark.parametrize(
    "path", ["/proc/self/root/tmp", "/proc/self/cwd", "/proc/1/root", "/usr/../proc"]
)
def test_real_path_below_proc_is_not_known(path: str) -> None:
    with pytest.raises(UnnamedError):
        real_path(path)
    store = LocalStore(path)
    assert settled(store) is store
    assert identify(store).is_ephemeral


def test_path_out_of_a_folder_that_is_not_there_leads_nowhere(months: Path) -> None:
    for path in ("none/../jan", "jan/a/../../jan", "latest/none/../../jan"):
        assert not Path(path).exists()
        with pytest.raises(NoSuchSourceError):
            zcache.open(path)
        store = LocalStore(path)
        assert settled(store) is store
        assert identify(store).is_ephemeral


def test_real_path_of_a_link_to_itself_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnnamedError):
        real_path(str(tmp_path / "loop"))
