"""The policy of a pool: its own, whatever its stores ask for, or that of the stores over it."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

import zcache
from forks import fork as process_of
from forks import wait
from pools import POOL_PATHS, one_of, source_of
from support import check_quiet, fill
from zcache import CachePool, CacheStore, OptionTypeError, OptionValueError
from zcache._core import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize("kind", ["store", "pool", "directory"])
def test_copy_with_another_policy_says_so_in_the_log(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning may be an error, which ends the worker that unpickles its task."""
    options: dict[str, Any] = {"eviction": "none"}
    place: Any = tmp_path if kind == "directory" else CachePool(tmp_path)
    if kind == "pool":
        place = CachePool(tmp_path, eviction="none")
    made = place if kind == "pool" else store_over(place, "1", **options)
    packed = pickle.dumps(made)
    del made, place
    gc.collect()
    place = tmp_path if kind == "directory" else CachePool(tmp_path, eviction="lru")
    used = store_over(place, "1", eviction="lru")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copies = [pickle.loads(packed) for _ in range(2)]
    found = [record for record in caplog.records if "is in use with" in record.getMessage()]
    assert len(found) == 1
    assert used.eviction == "lru"
    del copies


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


# ------------------------------------------------------------------------- other processes

OTHER = """
import json, sys, warnings
from zarr.storage import MemoryStore
from zcache import CachePool, CacheStore

pool, held = CachePool(sys.argv[1]), {}
print("null", flush=True)
for line in sys.stdin:
    name, eviction = json.loads(line)
    if eviction is None:
        held.pop(name)
        answer = None
    else:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            held[name] = CacheStore(MemoryStore(), cache_store=pool, source_id=name, eviction=eviction)
        answer = held[name].eviction, [str(one.message) for one in told]
    print(json.dumps(answer), flush=True)
"""


@contextmanager
def other_process(path: Path) -> Iterator[tuple[Callable[..., Any], subprocess.Popen[str]]]:
    """Another process that has the pool open.

    What is called has it make a store with a policy, which it holds under a name, or drop it again; the answer is the
    policy in force and what that store was told.
    """
    command = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout

        def tell(name: str, eviction: str | None) -> Any:
            print(json.dumps([name, eviction]), file=process.stdin, flush=True)
            return json.loads(said.readline())

        assert json.loads(said.readline()) is None
        yield tell, process
        process.stdin.close()


@pytest.mark.slow
def test_pool_of_another_process_that_asks_for_no_policy_holds_no_store_to_one(
    tmp_path: Path,
) -> None:
    pool = CachePool(tmp_path)
    with other_process(tmp_path) as (tell, _), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Which of the two was opened first makes no difference.
        store = store_over(pool, "1", eviction="adaptive")
        assert store.eviction == "adaptive"
        assert tell("2", "adaptive") == ["adaptive", []]
        del store
        again = store_over(pool, "1", eviction="adaptive")
        assert tell("2", None) is None
        policy, told = tell("2", "none")
        assert policy == again.eviction == "adaptive"
        assert "is in use with eviction='adaptive'" in told[0]


@pytest.mark.slow
def test_pool_with_a_policy_is_told_of_none_that_no_one_has_asked_for(tmp_path: Path) -> None:
    without = CachePool(tmp_path)
    with other_process(tmp_path) as (tell, _):
        assert tell("1", "none") == ["none", []]
        assert tell("1", None) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pool = CachePool(tmp_path, eviction="adaptive")
        assert pool == without
        assert tell("1", "none")[0] == "adaptive"
        # It uses that one, too.
        assert store_over(pool, "2").eviction == "adaptive"


@pytest.mark.slow
def test_policy_of_a_pool_is_free_once_the_last_store_that_uses_it_has_gone(tmp_path: Path) -> None:
    pool = CachePool(tmp_path)
    with other_process(tmp_path) as (tell, _):
        held = [store_over(pool, name, eviction="none") for name in "12"]
        assert tell("3", "lru")[0] == "none"
        assert tell("3", None) is None
        held.pop()
        assert tell("3", "lru")[0] == "none"
        assert tell("3", None) is None
        held.clear()
        assert tell("3", "lru") == ["lru", []]
        # The pool here has followed.
        with pytest.warns(UserWarning, match="is in use with eviction='lru'"):
            store = store_over(pool, "1", eviction="none")
        assert store.eviction == "lru"


@pytest.mark.slow
def test_pool_with_a_policy_holds_others_to_it_as_long_as_it_lives(tmp_path: Path) -> None:
    """Also where one without a policy, or a second one with the same, has the directory open."""
    plain = CachePool(tmp_path)
    one, other = CachePool(tmp_path, eviction="none"), CachePool(tmp_path, eviction="none")
    del one
    with pytest.warns(UserWarning, match="not by eviction='adaptive'"):
        assert store_over(plain, "a", eviction="adaptive").eviction == "none"
    del other
    assert store_over(plain, "b", eviction="adaptive").eviction == "adaptive"


def test_policy_of_a_process_that_was_killed_is_in_force_no_more(tmp_path: Path) -> None:
    pool = CachePool(tmp_path)
    with other_process(tmp_path) as (tell, process):
        assert tell("1", "none") == ["none", []]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store_over(pool, "2", eviction="adaptive").eviction == "adaptive"


@pytest.mark.slow
def test_policy_of_a_store_in_a_forked_child_is_in_force_as_long_as_that_lives(
    tmp_path: Path,
) -> None:
    pool = CachePool(tmp_path)
    with other_process(tmp_path) as (tell, _):
        held = [store_over(pool, "1", eviction="none")]

        def child() -> None:
            # As another participant, from its first use on; the parent is none in here.
            assert held[0].eviction == "none"
            os.write(there, b"1")
            os.read(here, 1)

        here, to_child = os.pipe()
        from_child, there = os.pipe()
        children = [process_of(child)]
        os.read(from_child, 1)
        held.clear()
        assert tell("2", "lru")[0] == "none"
        assert tell("2", None) is None
        os.write(to_child, b"1")
        assert wait(children) == [0]
        assert tell("2", "lru") == ["lru", []]
        for pipe in (here, to_child, from_child, there):
            os.close(pipe)


def test_policy_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionValueError, match="invalid eviction: 'no policy'"):
        CachePool(tmp_path / "pool", eviction="no policy")  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="invalid minimise: 3"):
        CachePool(tmp_path / "pool", minimise=3)  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="invalid read_only: 1"):
        CachePool(tmp_path / "pool", read_only=1)  # type: ignore[arg-type]
    assert not (tmp_path / "pool").exists()
