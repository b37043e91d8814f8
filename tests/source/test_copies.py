"""What pickled copies of a cache share with it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import Store
from zarr.core.buffer.cpu import Buffer
from zarr.storage import LocalStore, LoggingStore, MemoryStore, WrapperStore

from doubles import DictStore
from zcache._source.copies import is_equal, source_of_copy, without_contents
from zcache._source.identity import SourceId, identify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Own(WrapperStore[Store]):
    """A store of the user's own that must not be compared."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Cache:
    """What is asked of a cache."""

    source: Any
    home: int | None = field(default_factory=os.getpid)

    @property
    def source_id(self) -> SourceId:
        return identify(self.source)


def memory(value: bytes = b"1") -> MemoryStore:
    return MemoryStore({"a": Buffer.from_bytes(value)})


@pytest.mark.parametrize("kind", [memory, lambda: Own(memory()), DictStore])
def test_source_of_copy_at_home_is_the_original(kind: Callable[..., Store]) -> None:
    source, copied = kind(), kind()
    assert source_of_copy(Cache(source), copied, is_first=True) is source


def test_source_of_copy_that_was_elsewhere_is_its_own() -> None:
    source, copied = DictStore(), DictStore()
    for is_first in (True, False):
        assert source_of_copy(Cache(source, home=None), copied, is_first=is_first) is copied


def test_source_of_copy_that_comes_back_from_elsewhere_is_none() -> None:
    """It may have been written to there."""
    back = source_of_copy(Cache(DictStore(), home=os.getpid()), DictStore(), is_first=False)
    assert back is None


def test_source_of_copy_of_a_source_with_a_name_is_its_own(tmp_path: Path) -> None:
    copied = LocalStore(tmp_path)
    assert source_of_copy(Cache(LocalStore(tmp_path)), copied, is_first=True) is copied


def test_source_of_copy_of_a_source_with_another_name_by_now_is_none(tmp_path: Path) -> None:
    """An environment, or a link, may have changed since."""
    arrived = Cache(LocalStore(tmp_path / "one"), home=None)
    assert source_of_copy(arrived, LocalStore(tmp_path / "two"), is_first=True) is None


def test_is_equal_of_stores_with_one_path(tmp_path: Path) -> None:
    one, other = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    assert is_equal(one, WrapperStore(LocalStore(tmp_path / "a")))
    assert is_equal(one, one.with_read_only(True))
    assert not is_equal(one, other)
    assert not is_equal(one, Own(one))
    assert not is_equal(Own(one), Own(one))
    assert not is_equal(memory(), memory())


def test_source_of_copy_keeps_whether_it_is_read_only() -> None:
    source = memory()
    found = source_of_copy(Cache(source), memory().with_read_only(True), is_first=True)
    assert found is not None
    assert found.read_only
    assert isinstance(found, MemoryStore)
    assert found._store_dict is source._store_dict


def test_without_contents_empties_memory_behind_wrappers(tmp_path: Path) -> None:
    inner = memory()
    emptied = without_contents(WrapperStore(LoggingStore(inner, log_level="ERROR")))
    assert type(emptied) is WrapperStore
    assert emptied._store._store._store_dict == {}
    assert list(inner._store_dict) == ["a"]
    local = LocalStore(tmp_path)
    assert without_contents(local) is local


@pytest.mark.parametrize("error", [NotImplementedError, ValueError])
def test_source_of_copy_that_cannot_be_read_only_is_none(error: type[Exception]) -> None:
    class Fixed(Own):
        def with_read_only(self, read_only: bool = False) -> Any:
            raise error

    copied = Fixed(memory().with_read_only(True))
    assert source_of_copy(Cache(Fixed(memory())), copied, is_first=True) is None
