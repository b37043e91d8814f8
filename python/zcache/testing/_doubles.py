"""A store in front of another one; a test counts its operations, and makes them fail, slow or blocked."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from zarr.abc.store import Store, SupportsSyncStore
from zarr.storage import WrapperStore

from zcache._runtime.coroutines import run_without_loop
from zcache._runtime.io import IO, SyncIO
from zcache._source.validators import validators_of
from zcache.testing._plan import Gate, Plan, Request, Rule

if TYPE_CHECKING:
    import builtins
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

    from zarr.core.buffer import Buffer


class StoreDouble(WrapperStore[Store]):
    """A store in front of another one, controlled by a test.

    Has every operation of the store behind it, the synchronous ones among them, and may be used by any
    number of threads and event loops at once. Operations are named "get", "get_partial_values",
    "get_ranges", "set", "set_if_not_exists", "delete", "delete_dir", "clear", "exists", "getsize",
    "getsize_prefix", "is_empty", "list", "list_prefix", "list_dir" and "validator"; "*" is each of them.

    Parameters
    ----------
    inner : Store
        The store behind it.

    Examples
    --------
    >>> from zarr.core.sync import sync
    >>> from zarr.storage import MemoryStore
    >>> double = StoreDouble(MemoryStore())
    >>> double.fail("exists", TimeoutError("too slow"), times=1)
    >>> sync(double.exists("a"))
    Traceback (most recent call last):
        ...
    TimeoutError: too slow
    >>> sync(double.exists("a"))
    False
    >>> double.calls["exists"]
    2
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._plan = Plan()

    def _with_store(self, store: Store) -> Self:
        copy = type(self).__new__(type(self))
        vars(copy).update(vars(self), _store=store)
        return copy

    # ---------------------------------------------------------- what it is told

    @property
    def inner(self) -> Store:
        """The store behind it. Direct calls of that are neither counted nor blocked."""
        return self._store

    def fail(
        self,
        operation: str,
        error: BaseException | type[BaseException] | Callable[[], BaseException],
        *,
        times: float = math.inf,
        key: str | None = None,
        after: bool = False,
    ) -> None:
        """Let an operation raise.

        Parameters
        ----------
        operation : str
            Its name.
        error : exception, or callable that makes one
            What it raises.
        times : int, optional
            How many of the next calls. Default is all.
        key : str, optional
            The key that this is about. Default is None, every key.
        after : bool, optional
            Raise after the operation has had its effect. Default is False: instead of it.
        """
        self._plan.add(Rule(operation, key, times, after, error=error))

    def delay(
        self,
        operation: str,
        seconds: float,
        *,
        times: float = math.inf,
        key: str | None = None,
    ) -> None:
        """Let an operation take more time.

        Parameters
        ----------
        operation : str
            Its name.
        seconds : float
            How much.
        times : int, optional
            How many of the next calls. Default is all.
        key : str, optional
            The key that this is about. Default is None, every key.
        """
        self._plan.add(Rule(operation, key, times, after=False, seconds=seconds))

    def block(
        self,
        operation: str,
        *,
        times: float = math.inf,
        key: str | None = None,
        after: bool = False,
    ) -> Gate:
        """Block an operation until the gate is released.

        Parameters
        ----------
        operation : str
            Its name.
        times : int, optional
            How many of the next calls. Default is all.
        key : str, optional
            The key that this is about. Default is None, every key.
        after : bool, optional
            Hold it up after it has had its effect, before its caller hears of it. Default is False.

        Returns
        -------
        Gate
            Tells how many have come, and lets them go on.
        """
        gate = Gate()
        self._plan.add(Rule(operation, key, times, after, gate=gate))
        return gate

    def hang(self, operation: str, *, times: float = math.inf, key: str | None = None) -> Gate:
        """Let an operation never answer.

        Parameters
        ----------
        operation : str
            Its name.
        times : int, optional
            How many of the next calls. Default is all.
        key : str, optional
            The key that this is about. Default is None, every key.

        Returns
        -------
        Gate
            Tells how many have come. It is released by `heal`, at the end of a test, so that no thread
            is left behind.
        """
        return self.block(operation, times=times, key=key)

    def heal(self) -> None:
        """Remove all rules, and release all blocked operations."""
        plan = self._plan
        with plan.lock:
            plan.rules = []
            gates, plan.gates = plan.gates, []
        for gate in gates:
            gate.release()

    # --------------------------------------------------------- what it has counted

    @property
    def calls(self) -> Counter[str]:
        """How often each operation was called."""
        with self._plan.lock:
            return Counter(self._plan.calls)

    @property
    def requests(self) -> builtins.list[Request]:
        """All calls, in their order."""
        with self._plan.lock:
            return list(self._plan.requests)

    @property
    def failures(self) -> int:
        """How many calls were made to raise."""
        return self._plan.failures

    def take(self) -> Counter[str]:
        """How often each operation was called since the last call of this, or of `take_requests`.

        Returns
        -------
        Counter
            Calls by operation.
        """
        return Counter(request.operation for request in self.take_requests())

    def take_requests(self) -> builtins.list[Request]:
        """All calls since the last call of this, or of `take`.

        Returns
        -------
        list of Request
            Calls in their order.
        """
        plan = self._plan
        with plan.lock:
            new, plan.seen = plan.requests[plan.seen :], len(plan.requests)
        return new

    # ---------------------------------------------------------------- operations

    async def _call(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, after = self._plan.begin(_request(operation, args))
        for rule in before:
            await rule.act_async()
        result = await getattr(self._store, operation)(*args, **kwargs)
        for rule in after:
            await rule.act_async()
        return result

    async def validator(self, key: str) -> str | None:
        """The validator of a key in the store behind it; operation "validator"."""
        before, after = self._plan.begin(Request("validator", key))
        for rule in before:
            await rule.act_async()
        of_inner = validators_of(self._store)
        found = None if of_inner is None else await of_inner.current(IO(self._store), key)
        for rule in after:
            await rule.act_async()
        return found

    def validator_sync(self, key: str) -> str | None:
        """The same without an event loop."""
        before, after = self._plan.begin(Request("validator", key))
        for rule in before:
            rule.act()
        of_inner = validators_of(self._store)
        io = SyncIO(self._store)
        found = None if of_inner is None else run_without_loop(of_inner.current(io, key))
        for rule in after:
            rule.act()
        return found

    def _call_sync(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, after = self._plan.begin(_request(operation, args))
        for rule in before:
            rule.act()
        result = getattr(self._store, f"{operation}_sync")(*args, **kwargs)
        for rule in after:
            rule.act()
        return result

    async def _iterate(
        self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncIterator[Any]:
        before, after = self._plan.begin(_request(operation, args))
        for rule in before:
            await rule.act_async()
        async for item in getattr(self._store, operation)(*args, **kwargs):
            yield item
        for rule in after:
            await rule.act_async()

    async def _get_many(self, requests: Iterable[Any]) -> AsyncGenerator[tuple[str, Any], None]:
        # Each is a "get".
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        # Each is a "set".
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    @property
    def _supports_sync_io(self) -> bool:
        inner = self._store
        return isinstance(inner, SupportsSyncStore) and bool(
            getattr(inner, "_supports_sync_io", True)
        )

    @property
    def supports_consolidated_metadata(self) -> bool:
        # docstring inherited
        return self._store.supports_consolidated_metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"


def _request(operation: str, args: tuple[Any, ...]) -> Request:
    return Request(operation, args[0] if args and isinstance(args[0], str) else "")


def _forwarded(operation: str, way: str) -> Callable[..., Any]:
    """A method of `StoreDouble` that calls the one of the store behind it."""

    async def call(self: StoreDouble, *args: Any, **kwargs: Any) -> Any:
        return await self._call(operation, args, kwargs)

    def call_sync(self: StoreDouble, *args: Any, **kwargs: Any) -> Any:
        return self._call_sync(operation, args, kwargs)

    def iterate(self: StoreDouble, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        return self._iterate(operation, args, kwargs)

    method: Callable[..., Any] = {"": call, "_sync": call_sync, "iterate": iterate}[way]
    method.__name__ = operation + (way if way == "_sync" else "")
    method.__qualname__ = f"StoreDouble.{method.__name__}"
    return method


_COROUTINES = (
    *("get", "get_partial_values", "exists", "getsize", "getsize_prefix", "is_empty"),
    *("set", "set_if_not_exists", "delete", "delete_dir", "clear"),
)
for _name in _COROUTINES:
    setattr(StoreDouble, _name, _forwarded(_name, ""))
for _name in ("list", "list_prefix", "list_dir", "get_ranges"):
    # zarr before 3.3 has no `get_ranges`.
    if hasattr(Store, _name):
        setattr(StoreDouble, _name, _forwarded(_name, "iterate"))
for _name in ("get", "set", "delete", "get_ranges"):
    if _name != "get_ranges" or hasattr(Store, "get_ranges_sync"):
        setattr(StoreDouble, f"{_name}_sync", _forwarded(_name, "_sync"))
