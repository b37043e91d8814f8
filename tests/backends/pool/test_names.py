"""Names of the sources of a pool."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pools import source_of
from support import read_through
from zcache import CachePool, CacheStore
from zcache._backends.pool.register import Register

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PAGE = 4096


def test_names_of_many_sources_count_towards_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcache._backends.directory.layout.BLOCK_SIZE", None)
    bound, path = 400 * PAGE, tmp_path / "pool"
    pool = CachePool(path, max_size=bound)
    names = [f"{n} {'x' * 4000}" for n in range(60)]
    for name in names:
        store = CacheStore(source_of(k=bytes(5 * PAGE)), cache_store=pool, source_id=name)
        assert asyncio.run(read_through(store, "k")) is not None
        folders = [path, *(path / ".zcache" / name for name in ("", "tmp", "segments"))]
        held = {*folders, *(file for folder in folders for file in folder.iterdir())}
        held.discard(path / ".zcache/index")
        blocks = sum(512 * file.stat().st_blocks for file in held)
        assert blocks <= pool.cache_info()["current_size"] <= bound
    assert {info.name for info in pool.sources()} == set(names)


def test_names_that_many_note_at_once_are_all_kept(tmp_path: Path) -> None:
    register = Register(str(tmp_path))
    names = [f"{n} {'x' * 100}" for n in range(40)]

    def note(name: str) -> None:
        for _ in range(5):
            register.add(name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(note, names))
    assert {found["name"] for found in register.names().values()} == set(names)
    # Most of what was added is out of date.
    assert (tmp_path / "sources").stat().st_size < 2 * 16384 + 40 * 200
    register.add(names[0], forget=True)
    assert {found["name"] for found in register.names().values()} == set(names[1:])
    # Half a line, of a process that was stopped.
    with (tmp_path / "sources").open("a") as file:
        file.write('{"name": "ha')
    register.add("more")
    assert {found["name"] for found in register.names().values()} == {*names[1:], "more"}
