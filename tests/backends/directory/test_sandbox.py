"""Sandboxes and file systems that refuse a system call: values are right, and cached."""

from __future__ import annotations

import errno
import json
import platform
import sys
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, MemoryStore

from agent import run_script
from support import buf, read
from zcache import CacheStore
from zcache.testing import stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

CALLS = {
    "openat2": 437,
    "preadv2": 327,
    "fsetxattr": 190,
    "fgetxattr": 193,
    "linkat": 265,
    "renameat2": 316,
    "link": 86,
    "renameat": 264,
    "unlinkat": 263,
}

_IN_SANDBOX = """
import asyncio, ctypes, json, os, struct, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore
from zcache import CacheStore
from zcache.testing import StoreDouble, stored_sizes

numbers, error, root, elsewhere, prepared = json.loads(sys.argv[1])
load, allow, refuse = (0x20, 0, 0, 0), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | error)
jumps = [(0x15, len(numbers) - n, 0, number) for n, number in enumerate(numbers)]
program = b"".join(struct.pack("HBBI", *one) for one in (load, *jumps, allow, refuse))
kept = ctypes.create_string_buffer(program)
header = ctypes.create_string_buffer(
    struct.pack("HxxxxxxP", len(jumps) + 3, ctypes.addressof(kept))
)
libc = ctypes.CDLL(None, use_errno=True)
if prepared:
    CacheStore(MemoryStore(), cache_store=LocalStore(root), source_id="x").close()
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, header, 0, 0):
    print(json.dumps("no seccomp"))
    sys.exit()

values = {f"a/c/{n}": bytes([n]) * 5000 for n in range(20)}
source = StoreDouble(MemoryStore({key: cpu.Buffer.from_bytes(value) for key, value in values.items()}))
store = CacheStore(source, cache_store=LocalStore(root), max_size="1MB", source_id="x")
if elsewhere:
    os.symlink(elsewhere, root + "/a")
async def main():
    for _ in range(2):
        for key, value in values.items():
            assert (await store.get(key, default_buffer_prototype())).to_bytes() == value
        assert store.drain_sync()
asyncio.run(main())
print(json.dumps([source.calls["get"], len(stored_sizes(store)), store.cache_stats()["cache_failures"]]))
"""


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    "names",
    [
        "openat2",
        "preadv2",
        "openat2 preadv2",
        "fsetxattr fgetxattr",
        "linkat",
        "linkat link",
        "linkat link renameat2",
    ],
)
def test_refused_calls_cost_no_caching(tmp_path: Path, names: str, error: int) -> None:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("the numbers of system calls are those of x86-64")
    outcome = in_sandbox(names, error, tmp_path / "cache")
    assert outcome == [20, 20, 0]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux",
    reason="the numbers are those of x86-64",
)
def test_refused_openat2_links_lead_nowhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    requests, stored, _ = in_sandbox("openat2", errno.EPERM, tmp_path / "cache", elsewhere)
    assert (requests, stored) == (40, 0)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux",
    reason="the numbers are those of x86-64",
)
async def test_refused_moves_and_removals_leave_nothing_in_the_way(tmp_path: Path) -> None:
    names, cache = "linkat link renameat2 renameat unlinkat", tmp_path / "cache"
    in_sandbox(names, errno.EPERM, cache, prepared=True)
    left = [path for path in cache.rglob("*") if path.name in map(str, range(20))]
    assert left, "names that were taken, and could neither be filled nor removed"
    assert len(list(cache.rglob(".zcache-*"))) <= 2
    source = MemoryStore({f"a/c/{n}": buf(bytes(5000)) for n in range(20)})
    store = CacheStore(source, cache_store=LocalStore(cache), max_size="1MB", source_id="x")
    # On a busy machine the first reads come before the index is open.
    while len(stored_sizes(store)) < 20:
        for n in range(20):
            assert await read(store, f"a/c/{n}") == bytes(5000)
        assert await store.drain()
    assert list(cache.rglob(".zcache-*")) == []


def in_sandbox(
    names: str, error: int, cache: Path, elsewhere: Path | None = None, *, prepared: bool = False
) -> list[int]:
    """Source reads of 40 reads of 20 keys, values that are cached then, and failures of the cache."""
    numbers = [CALLS[name] for name in names.split()]
    given = [numbers, error, str(cache), elsewhere and str(elsewhere), prepared]
    done = run_script(_IN_SANDBOX, json.dumps(given))
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    if outcome == "no seccomp":
        pytest.skip("no seccomp here")
    return list(outcome)
