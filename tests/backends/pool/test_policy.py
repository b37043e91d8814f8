"""The policy of a pool: its own, whatever its stores ask for, or that of the stores over it."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import zcache
from pools import POOL_PATHS, one_of, source_of
from support import check_quiet, fill
from zcache import CachePool, CacheStore, OptionTypeError, OptionValueError
from zcache._core import POLICIES

if TYPE_CHECKING:
    from pathlib import Path


where = one_of(POOL_PATHS)


def store_over(pool: CachePool, name: str, **options: Any) -> CacheStore:
    return CacheStore(source_of(), cache_store=pool, source_id=name, **options)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_stores_over_a_pool_go_by_its_policy(where: Path | None, eviction: Any) -> None:
    pool = CachePool(where, max_size=100, eviction=eviction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stores = [store_over(pool, name) for name in "12"]
        same = store_over(pool, "3", eviction=eviction)
        stores.append(zcache.open(source_of(), cache=pool, source_id="4"))
        copy = pickle.loads(pickle.dumps(pool))
        stores.append(store_over(copy, "5"))
    for store in [*stores, same]:
        assert store.eviction == eviction
    await fill(stores[0], **{f"k{n}": bytes(20) for n in range(10)})
    # What came first stays under "none", and only there.
    if eviction != "adaptive":
        assert stores[0].is_cached("k0") == (eviction == "none")
    await check_quiet(stores[0])


def test_store_with_another_policy_than_that_of_its_pool_is_told(where: Path | None) -> None:
    pool = CachePool(where, eviction="adaptive", minimise="bytes")
    with pytest.warns(UserWarning, match=r"eviction='adaptive', minimise='bytes'.*eviction='lru'"):
        store = store_over(pool, "1", eviction="lru")
    assert store.eviction == "adaptive"
    with pytest.warns(UserWarning, match="minimise='seconds'"):
        store_over(pool, "2", minimise="seconds")


@pytest.mark.parametrize(
    "make",
    [
        lambda pool: CachePool(pool.path, eviction="none"),
        lambda pool: store_over(pool, "1", eviction="none"),
        lambda pool: zcache.open(source_of(), cache=pool, source_id="1", eviction="none"),
        lambda pool: zcache.open(source_of(), cache=pool.path, source_id="1", eviction="none"),
    ],
    ids=["pool", "store", "open", "open path"],
)
def test_warning_about_another_policy_is_about_the_line_of_the_user(
    tmp_path: Path, make: Any
) -> None:
    pool = CachePool(tmp_path / "pool")
    held = store_over(pool, "2", eviction="adaptive")
    with pytest.warns(UserWarning, match="is in use with eviction='adaptive'") as told:
        made = make(pool)
    assert [warning.filename for warning in told] == [__file__]
    assert made is not None
    assert held.eviction == "adaptive"


def test_pool_that_is_in_use_with_another_policy_says_so(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool")
    store = store_over(pool, "1", eviction="none")
    with pytest.warns(UserWarning, match=r"eviction='none'.*not by eviction='adaptive'"):
        again = CachePool(tmp_path / "pool", eviction="adaptive")
    assert again == pool
    assert store.eviction == "none"
    del store
    # It is not in use any more.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CachePool(tmp_path / "pool", eviction="adaptive", max_size=100)
        assert store_over(again, "1").eviction == "adaptive"


def test_pool_without_a_policy_goes_by_that_of_its_stores(where: Path | None) -> None:
    pool = CachePool(where)
    assert store_over(pool, "1", eviction="none").eviction == "none"
    assert store_over(pool, "1").eviction == "lru"


def test_policy_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionValueError, match="invalid eviction: 'no policy'"):
        CachePool(tmp_path / "pool", eviction="no policy")  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="invalid minimise: 3"):
        CachePool(tmp_path / "pool", minimise=3)  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="invalid read_only: 1"):
        CachePool(tmp_path / "pool", read_only=1)  # type: ignore[arg-type]
    assert not (tmp_path / "pool").exists()
