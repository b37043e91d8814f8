"""What lies in a dict of this process is not compared with a checksum, and has none."""

from __future__ import annotations

from typing import Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore

from zcache import CacheStore
from zcache.testing import record_steps

PROTOTYPE = default_buffer_prototype()


@pytest.mark.parametrize("verify", ["first", "always", "never"])
async def test_neither_a_fill_nor_a_hit_computes_a_checksum(verify: Any) -> None:
    store = CacheStore(MemoryStore({"k": cpu.Buffer.from_bytes(b"value")}), verify=verify)
    with record_steps(store) as steps:
        for request in (None, None, RangeByteRequest(1, 3), RangeByteRequest(1, 3)):
            assert await store.get("k", PROTOTYPE, request) is not None
    found = [step.answer for step in steps if step.name == "lookup"]
    # Of a whole value its size alone; a range names the entry, and no checksum: there is nothing to verify.
    assert found[:2] == [None, 5]
    assert [(*hit[:4], *hit[5:]) for hit in found[2:]] == [("k", 5, 1, 2, None, False)] * 2
    assert "mark_verified" not in {step.name for step in steps}
    await store.set("k", cpu.Buffer.from_bytes(b"other"))
    with record_steps(store) as steps:
        assert await store.get("k", PROTOTYPE, RangeByteRequest(1, 3)) is not None
    hit = steps[0].answer
    assert (*hit[:4], *hit[5:]) == ("k", 5, 1, 2, None, False)


async def test_indexes_in_memory_hash_with_a_seed_that_nobody_knows() -> None:
    """The same keys lie elsewhere in each index: its strings and slots are written in another order."""
    import zcache._core as core

    def chains(seed: int | None) -> int:
        index = core.Index(seed=seed)
        index.adopt([(0, 1, f"a/c/{n}") for n in range(1000)])
        index.validate()
        return len(index)

    assert chains(None) == chains(0) == 1000
    signature = core.Index.__text_signature__
    assert signature is None or "seed=None" in signature
