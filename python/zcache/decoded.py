"""Decoded chunks of one array, over any store."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from zarr import Array
from zarr.core.array import AsyncArray
from zarr.storage import StorePath

from zcache._backends.source_place import place_of
from zcache._decoded.identity import attributes_of
from zcache._decoded.pipeline import rewrapped
from zcache._options import parse_size
from zcache._runtime.apart import OneForEach
from zcache._runtime.capacity import memory
from zcache._source.settled import settled
from zcache.exceptions import OptionTypeError
from zcache.store import CacheStore

if TYPE_CHECKING:
    from zarr.abc.store import Store

    from zcache._types import Size

AnyArray = TypeVar("AnyArray", bound="Array[Any] | AsyncArray[Any]")


def with_decoded_cache(array: AnyArray, size: Size) -> AnyArray:
    """The same array, with its decoded chunks kept in the memory of this process.

    Parameters
    ----------
    array : Array or AsyncArray
        An array on any store. On a `CacheStore`, chunks are as coherent as its bytes. On another store, reads see
        changes made through the returned array, and through arrays and groups that are opened on its `store`. They also
        see changes through other arrays that this function has made in this process over the same place, or one inside
        or around it. They do not see other changes of the store below, not even through `array`. Arrays over a
        `CacheStore` and arrays over its source do not see each other's writes: make all over the one, or all over the
        other.
    size : int or str
        Bytes of decoded chunks, from 0 on, or text such as ``"256MB"`` (10**6), ``"2 GiB"`` (2**30) or ``"25%"`` (of
        memory).

    Returns
    -------
    Array or AsyncArray
        An array of the same class, with the same codec pipeline and attributes. Its copies in one process share their
        chunks; in another process they start empty.

    Raises
    ------
    OptionTypeError
        A `TypeError`: `array` is no array, or `size` no size.
    OptionValueError
        A `ValueError`: `size` has no meaning.
    """
    inner: Any = array
    if isinstance(array, Array):
        inner = array._async_array
    if not isinstance(inner, AsyncArray):
        raise OptionTypeError(
            f"invalid array: {type(array).__name__}. Give a zarr.Array or a zarr.AsyncArray."
        )
    parsed = parse_size(size, "size", memory, none="")
    if parsed is None:
        raise OptionTypeError('invalid size: None. Give bytes, or text such as "2 GiB".')
    path = inner.store_path
    store = path.store
    if isinstance(store, CacheStore):
        store = store._with_decoded_size(parsed)
    else:
        source = settled(store)
        shared = _over(source)
        store = shared._with_decoded_size(parsed)
        # It is found again as long as there are chunks that depend on it.
        assert store._decoded is not None
        store._decoded.keeps = shared, source
    make: Any = AsyncArray
    made = make(inner.metadata, StorePath(store, path.path), inner.config)
    pipeline = rewrapped(inner.codec_pipeline, inner.metadata)
    changed = vars(made) if pipeline is None else {**vars(made), "codec_pipeline": pipeline}
    found: Any = _with(inner, changed)
    return found if inner is array else _with(array, {"_async_array": found})


def _with(array: AnyArray, changed: dict[str, Any]) -> AnyArray:
    """A copy of an array, of its class and with all attributes, some of which are changed."""
    kind, made = type(array), functools.cached_property
    found = object.__new__(kind)
    for name, value in {**attributes_of(array), **changed}.items():
        # What is made of the others is made anew.
        if type(getattr(kind, name, None)) is not made:
            # As zarr does: the classes are frozen.
            object.__setattr__(found, name, value)
    return found


# By the address of the source, which lives as long as what is decoded.
_stores: OneForEach[CacheStore] = OneForEach()


def _over(source: Store) -> CacheStore:
    """The store over this one that keeps no bytes. All that goes through it voids what is decoded."""

    def make() -> CacheStore:
        return CacheStore(source, cache_store=place_of(source), max_size=0)

    found = _stores.find_or_make(id(source), make)
    found._is_open = source._is_open
    return found
