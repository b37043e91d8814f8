"""Every method of the installed zarr's `Store` is classified, so that none gets past the cache.

A wrapper forwards what it does not know straight to its source; that is how deleted data is served.
`CacheStore` inherits from `Store` itself, and the defaults there are built on the primitives. When zarr
adds or changes something, a test here fails, and we decide.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from abc import ABC
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import pytest
import zarr.abc.store
from zarr.abc.store import Store, SupportsSyncStore
from zarr.storage import MemoryStore, WrapperStore

from support import buf, listed, read
from zcache import CacheStore
from zcache._runtime.io import is_sync
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class Handled(NamedTuple):
    """Overridden, because the cache has a part in it."""

    why: str


class Delegated(NamedTuple):
    """Overridden to ask the source, each time, and nothing else."""

    why: str


class Inherited(NamedTuple):
    """Left as it is: it does its work through methods that are handled or delegated."""

    why: str
    through: tuple[str, ...] = ()
    """The methods of the store that its code uses; all of them, or the test fails."""


SURFACE: dict[str, Handled | Delegated | Inherited] = {
    # ---------------------------------------------------------------- reads
    "get": Handled("serves what is cached, keeps what it reads"),
    "get_partial_values": Handled("serves the cached ones, asks the source for the rest at once"),
    "get_ranges": Handled("as get_partial_values; the base's would read range by range"),
    "get_ranges_sync": Handled("as get_ranges"),
    "get_sync": Handled("as get"),
    "exists": Handled("must agree with what get would return"),
    "getsize": Handled("must agree with what get would return"),
    "getsize_prefix": Handled("of what is listed, so that nothing is missing that was before"),
    "_get_many": Handled("reads at once; the base reads one after the other"),
    "_get_bytes": Inherited("zarr 3.1", ("get",)),
    "_get_bytes_sync": Inherited("zarr 3.1", ("_get_bytes",)),
    "_get_json": Inherited("zarr 3.1", ("_get_bytes",)),
    "_get_json_sync": Inherited("zarr 3.1", ("_get_json",)),
    # --------------------------------------------------------------- writes
    "set": Handled("replaces what is cached"),
    "set_sync": Handled("as set"),
    "set_if_not_exists": Handled("only the source can decide it without a race"),
    "_set_many": Inherited("many writes at once", ("set",)),
    "delete": Handled("drops what is cached"),
    "delete_sync": Handled("as delete"),
    "delete_dir": Handled("drops what is cached below the prefix; the source knows a quicker way"),
    "clear": Handled("drops all that is cached"),
    # ------------------------------------------------------------- listings
    "list": Delegated("the source alone knows its keys"),
    "list_prefix": Delegated("the source alone knows its keys"),
    "list_dir": Delegated("the source alone knows its keys"),
    "is_empty": Delegated("the source may answer it without a listing"),
    # ------------------------------------------------------- what it can do
    "supports_writes": Delegated("the cache store always can"),
    "supports_deletes": Delegated("the cache store always can"),
    "supports_listing": Delegated("listings are the source's"),
    "supports_consolidated_metadata": Delegated("it is about the format, not about the place"),
    "supports_partial_writes": Inherited("always false"),
    "_supports_sync_io": Handled("needs both stores"),
    # ------------------------------------------------------ open and closed
    "open": Inherited("makes and opens", ("_open",)),
    "_open": Handled("opens the source as well"),
    "_ensure_open": Handled("opens the source as well, for any number at once"),
    "_is_open": Inherited("a field of each store"),
    "close": Handled("closes the source as well"),
    "__enter__": Inherited("returns the store"),
    "__exit__": Inherited("closes", ("close",)),
    "read_only": Inherited("what _read_only says", ("_read_only",)),
    "_read_only": Inherited("a field of each store"),
    "_check_writable": Inherited("zarr's own error", ("read_only",)),
    "with_read_only": Handled("the copy shares cache, index and counters"),
    "__eq__": Handled("compares sources"),
}

T = TypeVar("T")


class Plain(ABC, Generic[T]):
    """What Python itself gives to an abstract class, or a generic one."""

    field: int


# `__type_params__` is of classes that are generic by the newer syntax, which 3.11 has not.
# The last one comes to a class when one of it is copied for the first time.
BASICS = {*dir(Plain), "__type_params__", "__slotnames__"} - {"__eq__"}


def names_of(cls: type) -> set[str]:
    """Attributes and declared fields of a class and its bases, but not of object."""
    names = set(dir(cls))
    for base in cls.__mro__[:-1]:
        names.update(inspect.get_annotations(base))
    return names - BASICS


def installed() -> list[str]:
    """What the installed zarr expects of a store."""
    sync_methods = [name for name in dir(SupportsSyncStore) if name.endswith("_sync")]
    return sorted(names_of(Store) | {*sync_methods, "_supports_sync_io"})


def of_kind(kind: type) -> list[str]:
    return [name for name in installed() if isinstance(SURFACE.get(name), kind)]


@pytest.mark.parametrize("name", installed())
def test_classified(name: str) -> None:
    assert name in SURFACE, (
        f"zarr {zarr.__version__}: Store.{name} is new. Decide what CacheStore does about it: does "
        "it read or change values, and does the base class do that through get, set and delete?"
    )
    assert SURFACE[name].why


def test_sync_protocol_is_complete() -> None:
    """The protocols beside `Store` name no method that the table does not know."""
    protocols = [
        value
        for name, value in vars(zarr.abc.store).items()
        if name.startswith("Supports") and inspect.isclass(value)
    ]
    assert SupportsSyncStore in protocols
    methods = {name for protocol in protocols for name in vars(protocol) if name[0] != "_"}
    assert methods <= set(SURFACE)
    assert isinstance(CacheStore(MemoryStore()), SupportsSyncStore)


def test_wrappers_have_nothing_more() -> None:
    """What zarr's own wrapper passes on is known, but for what wrappers alone need."""
    assert names_of(WrapperStore) - set(SURFACE) == {"_store", "_with_store"}


@pytest.mark.parametrize("name", of_kind(Handled) + of_kind(Delegated))
def test_overridden(name: str) -> None:
    assert name in vars(CacheStore)


@pytest.mark.parametrize("name", of_kind(Inherited))
def test_inherited(name: str) -> None:
    assert name not in vars(CacheStore)
    assert CacheStore.__mro__[1] is Store
    assert inspect.getattr_static(CacheStore, name, None) is inspect.getattr_static(
        Store, name, None
    )


def own_names(function: Any) -> set[str]:
    """The attributes of `self` or `store` that the code of a function uses."""
    if isinstance(function, property):
        function = function.fget
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "store")
    }


@pytest.mark.parametrize("name", of_kind(Inherited))
def test_inherited_through_known_methods(name: str) -> None:
    """The base's code does what the table says. When it changes, look at it again."""
    kind = SURFACE[name]
    assert isinstance(kind, Inherited)
    if hasattr(Store, name):
        assert own_names(getattr(Store, name)) == set(kind.through)
    else:
        assert name in inspect.get_annotations(Store)
    assert set(kind.through) <= set(SURFACE)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in of_kind(Handled)
        if inspect.isfunction(getattr(Store, name, None)) and name != "__eq__"
    ],
)
def test_signature(name: str) -> None:
    """Each call that fits the base class fits here."""
    mine = inspect.signature(getattr(CacheStore, name)).parameters
    base = inspect.signature(getattr(Store, name)).parameters
    assert [name for name in mine if name in base] == list(base)
    for parameter in base.values():
        own = mine[parameter.name]
        assert own.kind is parameter.kind
        if parameter.default is not parameter.empty:
            assert own.default is not parameter.empty
    for added in set(mine) - set(base):
        assert mine[added].default is not inspect.Parameter.empty


CALLS: dict[str, Callable[[Store], Coroutine[Any, Any, Any]]] = {
    "list": lambda store: listed(store.list()),
    "list_prefix": lambda store: listed(store.list_prefix("a/")),
    "list_dir": lambda store: listed(store.list_dir("a")),
    "is_empty": lambda store: store.is_empty("a"),
}


@pytest.mark.parametrize("name", [name for name in of_kind(Delegated) if name in CALLS])
async def test_delegated_call(name: str) -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source)
    await store.set("a/b", buf(b"1"))
    await source.inner.set("a/c", buf(b"2"))  # behind the back of the cache
    source.take()
    for _ in range(2):
        assert await CALLS[name](store) == await CALLS[name](source.inner)
        assert source.take() == {name: 1}


@pytest.mark.parametrize("name", [name for name in of_kind(Delegated) if name not in CALLS])
@pytest.mark.parametrize("answer", [True, False])
def test_delegated_property(name: str, answer: bool) -> None:
    source = type("Source", (MemoryStore,), {name: answer})()
    assert getattr(CacheStore(source), name) is answer


async def test_what_is_unknown_goes_through_the_cache() -> None:
    """A method that a later zarr adds to `Store` is built on the primitives, hence on the cache."""

    async def get_twice(self: Store, key: str) -> list[bytes | None]:
        return [await read(self, key), await read(self, key)]

    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_set_data=False)
    await store.set("key", buf(b"value"))
    source.take()
    later = type("Later", (Store,), {"get_twice": get_twice})
    assert await later.get_twice(store, "key") == [b"value", b"value"]
    assert source.take() == {"get": 1}


def test_methods_that_a_wrapper_passes_on_are_not_its_own() -> None:
    """Python 3.11 takes such an instance for one of the protocol."""

    class Forwarding(Store):
        def __init__(self) -> None:
            super().__init__()
            self._inner = MemoryStore()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name == "_inner":
                raise AttributeError(name)
            return getattr(self._inner, name)

    store = _concrete(Forwarding)()
    assert callable(store.get_sync)
    assert not is_sync(store)


def _concrete(kind: Any) -> Any:
    """The same class with no method left abstract."""
    return type(kind.__name__, (kind,), dict.fromkeys(kind.__abstractmethods__))
