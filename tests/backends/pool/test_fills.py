"""Fills of a pool: all of its sources share one circuit breaker."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from pools import source_of
from support import read, said
from zcache import CachePool, CacheStore
from zcache._backends.directory.filler import DirectoryFiller

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

VALUE = bytes(60)


def opened(pool: CachePool, name: str, **options: Any) -> CacheStore:
    return CacheStore(source_of(k=VALUE), cache_store=pool, source_id=name, **options)


async def test_failure_is_logged_once_for_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def submit(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(DirectoryFiller, "submit", submit)
    pool = CachePool(tmp_path)
    stores = [opened(pool, name) for name in "abc"]
    for store in stores:
        assert await read(store, "k") == VALUE
    assert ["broken" in message for message in said(caplog)] == [True]
    assert [store.cache_stats()["cache_failures"] for store in stores] == [3, 3, 3]
