"""Buffers of zarr over immutable bytes, and bytes out of what a store returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.core.buffer import Buffer, cpu

if TYPE_CHECKING:
    from zarr.core.buffer import BufferPrototype

_BYTE: Final = np.dtype("B")
_ONE_BY_ONE: Final = (1,)
_new: Final[Any] = object.__new__
# Every read and fill looks these up; in a module of another package that takes twice as long.
_Cpu: Final = cpu.Buffer
Array: Final = np.ndarray


def to_cpu_buffer(data: bytes) -> Buffer:
    """A buffer over immutable bytes."""
    return _over(np.frombuffer(data, _BYTE))


def _over(array: Any) -> Buffer:
    # As the constructor does, which would look first whether the array is one of bytes.
    buffer: cpu.Buffer = _new(_Cpu)
    buffer._data = array
    return buffer


def to_buffer(array: Any, prototype: BufferPrototype) -> Buffer:
    """A buffer of a reader's over an array of bytes, or over a copy where it has to be elsewhere."""
    wanted = prototype.buffer
    if wanted is _Cpu:
        return _over(array)
    if issubclass(wanted, _Cpu):
        return wanted.from_array_like(array)
    return wanted.from_bytes(array.tobytes())


def array_of(value: Buffer) -> Any:
    """The bytes of a buffer as an array, without a copy where they are in memory."""
    if value.__class__ is _Cpu:
        # Most often it is one already, and needs no conversion; it may be of another library.
        array: Any = value._data
        if type(array) is Array:
            return array
    return value.as_numpy_array()


def to_own(value: object, prototype: BufferPrototype) -> Buffer | None:
    """What a store gave, if it is a value at all, in memory that its reader may write to.

    A store in memory may hand out what it holds: a caller who writes to that would write to the cache.
    """
    if value is None:
        return None
    if not isinstance(value, Buffer):
        raise TypeError(f"the cache store gave {type(value).__name__} for a value")
    flags = getattr(value.as_array_like(), "flags", None)
    if isinstance(value, prototype.buffer) and flags is not None and not flags.writeable:
        return value
    return prototype.buffer.from_bytes(value.to_bytes())


def own(value: Buffer) -> None:
    """Let a buffer show bytes that cannot be changed: its reader could else write to them."""
    data, frozen = freeze(value)
    if frozen is None:
        value._data = to_cpu_buffer(data)._data


def snapshot(value: Buffer) -> bytes:
    """The bytes of a buffer, out of reach of its holders."""
    return freeze(value)[0]


def freeze(value: Buffer) -> tuple[bytes, Buffer | None]:
    """The same, and a buffer over them like this one, if what this one shows cannot be changed."""
    array = array_of(value)
    base: object = array.base
    if type(base) is Array:  # What a store in memory gives out is a view of what it holds.
        base = base.base
    if type(base) is bytes and len(base) == array.nbytes and array.strides == _ONE_BY_ONE:
        # It shows all of them, in their order.
        return base, _over(array.view()) if type(value) is _Cpu else None
    return array.tobytes(), None
