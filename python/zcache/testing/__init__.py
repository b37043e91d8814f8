"""What tests of programs that use zcache may rely on, and what zcache's own tests are built with.

Everything here works on any `CacheStore`, whatever its cache store is, and keeps working when the
internals of zcache change.

- `check_invariants` and `check_invariants_async` compare what the index says with what the cache store
  really holds; `check_index` looks at the index alone.
- `entries`, `recency`, `missing_keys`, `in_flight`, `is_complete` and `index_slot` show what the index says; `source_of` and
  `cache_store_of` give the two stores behind a `CacheStore`.
- `record_steps` records what a store asks its index.
- `hold_index_lock` holds the lock of the index of a cache directory, as a stopped process does.
- `set_block_size`, `without_shared_index` and `patient_openings` make the volume of a cache directory what a test needs.
- `FakeClock` is a clock that a test sets, for ``CacheStore(..., clock=clock)``.
- `StoreDouble` stands in front of a store, counts what reaches it, and lets it fail, be slow, be held up
  or never answer.

Examples
--------
>>> import zarr
>>> from zcache import CacheStore
>>> from zcache.testing import StoreDouble, check_invariants
>>> source = StoreDouble(zarr.storage.MemoryStore())
>>> store = CacheStore(source, max_size="1MB")
>>> array = zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i4")
>>> array[:] = 42
>>> source.fail("get", OSError("unreachable"))
>>> int(array[0])
42
>>> check_invariants(store)
"""

from zcache.testing._clock import FakeClock
from zcache.testing._doubles import StoreDouble
from zcache.testing._invariants import (
    InvariantError,
    check_index,
    check_invariants,
    check_invariants_async,
    stored_sizes,
)
from zcache.testing._locks import hold_index_lock
from zcache.testing._plan import Gate, Request
from zcache.testing._views import (
    Entry,
    InFlight,
    Step,
    cache_store_of,
    entries,
    in_flight,
    index_slot,
    is_complete,
    missing_keys,
    recency,
    record_steps,
    shares_index,
    source_of,
)
from zcache.testing._volumes import patient_openings, set_block_size, without_shared_index

__all__ = [
    "Entry",
    "FakeClock",
    "Gate",
    "InFlight",
    "InvariantError",
    "Request",
    "Step",
    "StoreDouble",
    "cache_store_of",
    "check_index",
    "check_invariants",
    "check_invariants_async",
    "entries",
    "hold_index_lock",
    "in_flight",
    "index_slot",
    "is_complete",
    "missing_keys",
    "patient_openings",
    "recency",
    "record_steps",
    "set_block_size",
    "shares_index",
    "source_of",
    "stored_sizes",
    "without_shared_index",
]
