"""The one module of `zcache.testing` that knows the internals of a `CacheStore`.

The rest of the package sees the internals through these functions only, so that they alone change when
the internals do.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zarr.storage import LocalStore, MemoryStore

from zcache._backends import tombstones
from zcache._backends.directory import layout
from zcache._backends.directory.files import count_folders
from zcache._backends.directory.rebuild import Rebuild
from zcache._backends.pool.layout import FOLDERS, PoolLayout
from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
from zcache._byte_ranges import to_request
from zcache._core import Index, SegmentFiles, cache_key, file_owner
from zcache.exceptions import OptionTypeError
from zcache.store import CacheStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer

    from zcache._cache import Cache
    from zcache._runtime.latch import Outcome

T = TypeVar("T")

RANGES: Final = tombstones.RANGES
"""Where a cache store holds byte ranges of values."""


def check_type(store: object) -> None:
    """See that it is a `CacheStore`."""
    if not isinstance(store, CacheStore):
        raise OptionTypeError(f"invalid store: {type(store).__name__}. Give a zcache.CacheStore.")


def _cache_of(store: CacheStore) -> Cache:
    check_type(store)
    return store._cache


def ask(store: CacheStore, question: Callable[[Index], T]) -> T:
    """Ask the index something, and wait for its lock where another process holds it."""
    return _cache_of(store).shared.handle.call_blocking(lambda index: question(_real(index)))


def ask_all(store: CacheStore, question: Callable[[Index], T]) -> T:
    """The same; of a pool, about all of its sources."""
    pool = getattr(_cache_of(store).shared.place, "pool", None)
    if pool is None:
        return ask(store, question)
    found: T = pool.handle.call_blocking(lambda index: question(_real(index)))
    return found


def pool_sizes(cache: Store) -> Mapping[str, int] | None:
    """Sizes of what the segments of a pool hold, by name; None for any other cache store."""
    if not isinstance(cache, PoolStore):
        return None
    files = SegmentFiles(os.path.join(cache.root, ".zcache", "segments"), holes=True)
    return {name: size for name, size, _ in files.values()}


def cache_store(store: CacheStore) -> Store:
    """The cache store."""
    return _cache_of(store).cache


def source_store(store: CacheStore) -> Store:
    """The source."""
    check_type(store)
    return store._store


def memory_values(cache: Store) -> Mapping[str, Buffer] | None:
    """The values of a cache in memory; None for any other cache store."""
    if isinstance(cache, MemoryStore) and type(cache) in (MemoryStore, PoolMemoryStore):
        return cache._store_dict
    return None


def directory_root(cache: Store) -> str | None:
    """The root of a cache directory; None for any other cache store."""
    return str(cache.root) if type(cache) is LocalStore else None


def is_ours(path: str) -> bool:
    """Whether zcache wrote a file, by its time or by the note beside it."""
    try:
        return file_owner(path) != "foreign"
    except OSError:
        return False


def disk_usage(store: CacheStore) -> int | None:
    """Bytes that a cache directory takes, if whole blocks count; without the files of the index."""
    cache = cache_store(store)
    if isinstance(cache, PoolStore):
        return _pool_usage(store, str(cache.root))
    root = directory_root(cache)
    if root is None or _block_size(store) <= 1:
        return None
    size, values = 0, []
    for top in (root, os.path.join(root, RANGES)):
        for folder, folders, names in os.walk(top):
            if folder == root and ".zcache" in folders:
                folders.remove(".zcache")
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if is_ours(path):
                        size += os.lstat(path).st_blocks * 512
                        values.append(os.path.relpath(path, root))
    return size + count_folders(root, values)


def own_folders(store: CacheStore) -> int:
    """Bytes that a cache directory counts before it holds a value, whatever its bound."""
    cache, block = cache_store(store), _block_size(store)
    if isinstance(cache, PoolStore):
        return FOLDERS * block
    root = directory_root(cache)
    return 0 if root is None or block <= 1 else count_folders(root, [])


def _block_size(store: CacheStore) -> int:
    """Bytes of the blocks that a cache store counts; 1 where it counts bytes."""
    shared = _cache_of(store).shared
    pool: Any = getattr(shared.place, "pool", None)
    size: int = (shared if pool is None else pool).handle.limits.get("unit", 1)
    return size


def raw_entries(
    store: CacheStore, *, everything: bool
) -> list[tuple[str, ByteRequest | None, int, str, str]]:
    """Key, byte range, size, name in the cache store and state of each entry."""
    found = (ask_all if everything else ask)(store, Index.entries)
    return [
        (
            key,
            to_request(span),
            size,
            key if span is None else cache_key(key, span),
            state,
        )
        for key, span, size, state in found
    ]


def _pool_usage(store: CacheStore, root: str) -> int | None:
    if _block_size(store) <= 1:
        return None
    usage = 0
    for folder, folders, names in os.walk(root):
        if folder == os.path.join(root, ".zcache"):
            folders.remove("index")
        usage += os.lstat(folder).st_blocks * 512
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                usage += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return usage


def own_names(store: CacheStore, sizes: dict[str, int]) -> dict[str, int]:
    """What of this is the store's, by its own names: all of it but in a pool."""
    label = getattr(_cache_of(store).shared.place, "label", None)
    if label is None:
        return sizes
    folders = {f"{label}/": "", f"{RANGES}{label}/": RANGES}
    return {
        own + name.removeprefix(folder): size
        for name, size in sizes.items()
        for folder, own in folders.items()
        if name.startswith(folder)
    }


def raw_recency(store: CacheStore) -> list[tuple[str, ByteRequest | None]]:
    """Keys and byte ranges, least recently used first."""
    return [(key, to_request(span)) for key, span in ask(store, Index.recency)]


def absent_keys(store: CacheStore) -> list[str]:
    """Keys that are remembered as missing, least recently used first."""
    return ask(store, Index.absent_keys)


def raw_in_flight(store: CacheStore) -> tuple[int, int]:
    """How many flights and reservations there are."""
    return ask(store, lambda index: index.in_flight)


def current_size(store: CacheStore) -> int:
    """Bytes that the index counts."""
    return ask(store, lambda index: index.current_size)


def live_entries(store: CacheStore) -> int:
    """How many entries the index says can be served."""
    return ask(store, len)


def validate(store: CacheStore) -> None:
    """Have the index recompute all that it counts."""
    ask(store, Index.validate)


def index_of(store: CacheStore) -> Index:
    """The index itself."""
    return _real(_cache_of(store).shared.handle.index)


def is_complete(store: CacheStore) -> bool:
    """Whether the index knows all that the cache store holds."""
    return ask(store, lambda index: index.is_complete)


def slot(store: CacheStore) -> int | None:
    """The slot of this process in a shared index."""
    return ask(store, lambda index: index.slot)


def set_block_size(size: int | None) -> int | None:
    """Set in what directories count, and return what was in force before."""
    before, layout.BLOCK_SIZE = layout.BLOCK_SIZE, size
    return before


@contextlib.contextmanager
def replaced_openings(step: Callable[..., Any]) -> Iterator[None]:
    """Have all directories and pools open their index by this."""
    with contextlib.ExitStack() as stack:
        for kind in (layout.Layout, PoolLayout):
            stack.enter_context(_replaced(kind, "open_index", step))
        yield


@contextlib.contextmanager
def patient_rebuilds(seconds: float) -> Iterator[None]:
    """Have openings wait so long for a rebuild, but those that a test has shortened."""
    wait = Rebuild.wait

    def wait_longer(self: Rebuild, work: Outcome[None], patience: float | None) -> None:
        is_shortened = patience is not None and patience < 0.1
        wait(self, work, patience if is_shortened else seconds)

    with _replaced(Rebuild, "wait", wait_longer):
        yield


@contextlib.contextmanager
def _replaced(kind: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    before = vars(kind).get(name)
    setattr(kind, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(kind, name)
        else:
            setattr(kind, name, before)


@contextlib.contextmanager
def intercepted(
    store: CacheStore, then: Callable[[str, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Tell each step of the index that a store takes: its name, arguments and answer."""
    handle: Any = _cache_of(store).shared.handle
    inner = handle.index

    def take(step: Callable[..., Any], index: Any, *args: Any) -> Any:
        answer = step(_real(index), *args)
        if getattr(step, "__objclass__", None) is Index:
            then(step.__name__, args, answer)
        return answer

    handle.take, handle.tells_steps = take, True
    handle.show(_Intercepted(inner, then))
    try:
        yield
    finally:
        del handle.take, handle.tells_steps
        # Another one has taken its place where it was lost meanwhile.
        handle.show(_real(handle.index))


def _real(index: Any) -> Index:
    """The index itself, behind what tells its steps."""
    found: Index = getattr(index, "intercepted_index", index)
    return found


class _Intercepted:
    """Stands before an index and tells each step."""

    def __init__(self, inner: Any, then: Callable[[str, tuple[Any, ...], Any], None]) -> None:
        self.intercepted_index = inner
        self._then = then

    def __len__(self) -> int:
        return len(self.intercepted_index)

    def view(self, *args: Any) -> _Intercepted:
        return _Intercepted(self.intercepted_index.view(*args), self._then)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.intercepted_index, name)
        if not callable(found) or name == "stats":
            return found

        def call(*args: Any) -> Any:
            answer = found(*args)
            self._then(name, args, answer)
            return answer

        return call
