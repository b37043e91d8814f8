"""Options of a `CacheStore`: what has no meaning is refused, and the error names the way out."""

from __future__ import annotations

from zarr.abc.store import Store
from zarr.storage import LocalStore

from zcache._identity import innermost, overlap


def check_verify(verify: object) -> str:
    if verify not in ("first", "always", "never"):
        raise ValueError(f'verify={verify!r} must be "first", "always" or "never".')
    return str(verify)


def check_source_id(source_id: object) -> str | None:
    if source_id is None or (isinstance(source_id, str) and source_id):
        return source_id
    kind = ValueError if isinstance(source_id, str) else TypeError
    raise kind(
        f"source_id={source_id!r} must be text that names the source, such as its URL, or None."
    )


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_store(name: str, store: object) -> None:
    if not isinstance(store, Store):
        raise TypeError(
            f"{name}={store!r} is no store. Give a zarr.abc.store.Store, such as "
            "zarr.storage.LocalStore(path) or zarr.storage.FsspecStore.from_url(url)."
        )


def check_cache_store(source: Store, cache: Store) -> None:
    check_store("cache_store", cache)
    if cache.read_only or not cache.supports_writes:
        raise ValueError(
            f"cache_store={cache!r} does not support writes. Open it with read_only=False, or "
            "give another store to keep the cache in."
        )
    if not cache.supports_deletes:
        raise ValueError(
            f"cache_store={cache!r} does not support deletes, so it cannot make room. Give a "
            "store that can delete, such as MemoryStore or LocalStore."
        )
    if overlap(source, cache):
        raise ValueError(
            f"cache_store={cache!r} is the source itself, or one of them is inside the other: evicting "
            "from it would delete your data. Give another store to keep the cache in."
        )
    if _caches_in(source, cache):
        raise ValueError(
            f"cache_store={cache!r} holds the cache of the source {source!r} already. Use that as it "
            "is, or give another store to keep a second cache in."
        )


def _caches_in(source: object, cache: Store) -> bool:
    """Whether a source, or a store inside it, is a cache that keeps its values here."""
    while isinstance(source, Store):
        held = getattr(source, "_cache", None)
        if isinstance(held, Store) and overlap(held, cache):
            # Those who share a directory know of each other.
            return not isinstance(innermost(cache), LocalStore)
        source = getattr(source, "_store", None)
    return False
