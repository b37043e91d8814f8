"""What tells one way of decoding from another: the codecs themselves, for what they write into metadata may lack something.

A key of encryption, say.
"""

from __future__ import annotations

import enum
import hashlib
import json
import weakref
from dataclasses import is_dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numcodecs.abc  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from zarr.abc.codec import BaseCodec
from zarr.codecs import ShardingCodec, _v2
from zarr.core import codec_pipeline
from zarr.core.dtype import ZDType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.codec import CodecPipeline

_STOCK: Final = frozenset({"zarr", "numcodecs"})
"""Packages of which each codec writes all that it is into metadata."""
_NO_SLOTS: Final = frozenset({"__dict__", "__weakref__"})
_POINTER: Final = np.dtype("P").itemsize
_SCALARS: Final = frozenset({type(None), bool, int, float, complex, str, bytes})
_CONTAINERS: Final = frozenset({list, tuple, dict, set, frozenset})
_MOST_VALUES: Final = 1000
"""In one codec; of one that holds more, it counts which object it is."""
_MOST_BYTES: Final = 2**17
"""Of a text, bytes or an array; of larger ones, it counts which object they are."""

# By their addresses.
_known: Final[dict[int, tuple[weakref.ref[Any], int]]] = {}
_numbers: Final = count(1)


def kind_of(pipeline: type[CodecPipeline]) -> int:
    """A number for a class of pipelines: any of a user may decode the same bytes to something else.

    zarr's own decode alike, and have the same one. No two others have, whatever their names are, nor one that is gone.
    """
    for name in ("BatchedCodecPipeline", "FusedCodecPipeline"):
        if pipeline is getattr(codec_pipeline, name, None):
            return 0
    return _number_of(pipeline)


def identity_of(*parts: Any) -> bytes:
    """A digest of codecs, or data types, as they are now; the same for those that are alike.

    That are zarr's own and numcodecs' with the same metadata, and others of one class with attributes that have the same
    values, if these are plain, and else are the same objects. It raises TypeError where that cannot be said.
    """
    said = [_said(part, count()) for part in parts]
    return hashlib.blake2b(repr(said).encode(), digest_size=16).digest()


def attributes_of(thing: object) -> dict[str, Any]:
    """All attributes of an object, those in slots too."""
    # Not its own state: what it does to be pickled may leave something out, or refuse.
    state: Any = object.__getstate__(thing)
    found: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):
        found |= part or {}
    return found


def _said(part: Any, steps: Iterator[int]) -> object:
    kind = type(part)
    number = _number_of(kind)
    if kind is ShardingCodec:
        inner = identity_of(*part.codecs), identity_of(*part.index_codecs)
        return number, part.chunk_shape, str(part.index_location), inner
    if kind is _v2.V2Codec:
        return number, identity_of(*(part.filters or ())), identity_of(part.compressor)
    if part is None:
        return number
    is_codec = isinstance(part, (BaseCodec, numcodecs.abc.Codec))
    if not is_codec or kind.__module__.partition(".")[0] not in _STOCK:
        return number, _attributes(part, kind, steps)
    about = part.to_dict() if hasattr(part, "to_dict") else part.get_config()
    return number, json.dumps(about, default=_jsonable, sort_keys=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"no part of metadata: {value!r}")


def _attributes(part: Any, kind: type, steps: Iterator[int]) -> object:
    """All attributes; a number of the object where they are too many, or not all that it is."""
    slots = 0
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        slots += len(({names} if isinstance(names, str) else {*names}) - _NO_SLOTS)
    # As `object.__reduce_ex__` finds it out.
    size = slots + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    if kind.__itemsize__ or kind.__basicsize__ > object.__basicsize__ + size * _POINTER:
        return _number_of(part)
    try:
        return [(name, _value(value, steps)) for name, value in attributes_of(part).items()]
    except Exception:  # noqa: BLE001 - whatever attributes may raise
        # Too many, too deep, changing meanwhile, or of a kind to which no reference can be held.
        return _number_of(part)


def _value(value: Any, steps: Iterator[int]) -> object:
    try:
        return _plain(value, steps)
    except _NotPlainError:
        return "object", _number_of(value)


class _NotPlainError(Exception):
    pass


def _plain(value: Any, steps: Iterator[int]) -> object:
    """A plain value, for `repr`, with its type."""
    kind = type(value)
    if next(steps) >= _MOST_VALUES:
        raise TypeError("too many values")
    if kind in (str, bytes) and len(value) > _MOST_BYTES:
        raise _NotPlainError
    if kind in _SCALARS:
        return kind.__name__, repr(value)
    if kind in _CONTAINERS or _is_named_tuple(kind):
        return _contained(value, kind, steps)
    if isinstance(value, np.dtype):
        return "dtype", _dtype(value)
    if kind is np.ndarray or (isinstance(value, np.generic) and kind is value.dtype.type):
        if value.dtype.hasobject or value.nbytes > _MOST_BYTES:
            raise _NotPlainError
        digest = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
        return kind.__name__, _dtype(value.dtype), value.shape, digest
    if isinstance(value, enum.Enum):
        return "enum", _number_of(kind), value.name, _plain(value._value_, steps)
    if is_dataclass(kind) or isinstance(value, (BaseCodec, numcodecs.abc.Codec, ZDType)):
        return _said(value, steps)
    raise _NotPlainError


def _contained(value: Any, kind: type, steps: Iterator[int]) -> object:
    if kind is dict:
        return "dict", [(_plain(key, steps), _value(one, steps)) for key, one in value.items()]
    if kind in (set, frozenset):
        return kind.__name__, sorted(repr(_plain(one, steps)) for one in value)
    if kind is list:
        return "list", [_value(one, steps) for one in value]
    # By its number, for there may be named tuples of one name.
    return _number_of(kind), [_value(one, steps) for one in tuple.__iter__(value)]


def _is_named_tuple(kind: type) -> bool:
    """Whether its fields are all that it is: one of a class without ``__slots__`` may have other attributes."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and not kind.__dictoffset__


def _dtype(dtype: np.dtype[Any]) -> str:
    if _has_metadata(dtype):
        # It is not in the text.
        raise _NotPlainError
    return repr(dtype)


def _has_metadata(dtype: np.dtype[Any]) -> bool:
    parts = [field[0] for field in (dtype.fields or {}).values()]
    if dtype.subdtype is not None:
        parts.append(dtype.subdtype[0])
    return dtype.metadata is not None or any(map(_has_metadata, parts))


def _number_of(thing: object) -> int:
    """A number for an object. No other one has it, nor has it once this one is gone."""
    at, known = id(thing), _known
    reference = weakref.ref(thing, lambda _: known.pop(at, None))
    return known.setdefault(at, (reference, next(_numbers)))[1]
