"""What tells one way of decoding from another: the codecs themselves, not what they write into metadata.

A key of encryption, say, is left out there.
"""

from __future__ import annotations

import weakref
from functools import cached_property
from itertools import count
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.codecs import ShardingCodec, _v2
from zarr.core import codec_pipeline

if TYPE_CHECKING:
    from collections.abc import Hashable

    from zarr.abc.codec import CodecPipeline

_PLAIN: Final = frozenset({NoneType, bool, int, str, bytes, np.dtype})
_NO_SLOTS: Final = frozenset({"__dict__", "__weakref__"})
_POINTER: Final = np.dtype("P").itemsize

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


def identity_of(value: Any) -> Hashable:
    """The same for codecs, and parts of them, that are alike: in their classes, and in all their attributes.

    What may be more than its attributes, as a function, is alike only if it is the same object; so is what has such a part
    that cannot be told from others. Nothing that has attributes is kept alive. Raises TypeError for what is no such object.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, np.dtype):
        return kind.__name__, value
    if kind is float:
        return kind.__name__, value.hex()
    if kind is tuple or kind is list:
        # JSON makes lists of tuples.
        return tuple(map(identity_of, value))
    if kind is dict:
        return frozenset((identity_of(name), identity_of(one)) for name, one in value.items())
    if kind is set or kind is frozenset:
        return frozenset(map(identity_of, value))
    if kind is np.ndarray or isinstance(value, np.generic):
        if value.dtype.hasobject:
            raise TypeError("an array of objects")
        return value.dtype, value.shape, value.tobytes()
    try:
        return _number_of(kind), _parts(value, kind)
    except TypeError:
        return _number_of(kind), _number_of(value)


def _parts(value: Any, kind: type) -> Hashable:
    if kind is ShardingCodec:
        found: Any = (value.chunk_shape, value.codecs, value.index_codecs, value.index_location)
    elif kind is _v2.V2Codec:
        found = (value.filters, value.compressor)
    elif kind.__module__.partition(".")[0] == "zarr" and hasattr(value, "to_dict"):
        # zarr's own say all.
        found = value.to_dict()
    else:
        found = _state(value, kind)
    return identity_of(found)


def _state(value: Any, kind: type) -> dict[str, Any] | int:
    """All attributes but those that are computed from others; a number where there may be more than attributes."""
    slots = 0
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        slots += len(({names} if isinstance(names, str) else {*names}) - _NO_SLOTS)
    # As `object.__reduce_ex__` finds it out.
    size = slots + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    is_more = kind.__itemsize__ or kind.__basicsize__ > object.__basicsize__ + size * _POINTER
    if is_more or kind is object:  # Which says something by being that object.
        return _number_of(value)
    # Not its own, which may leave out what must not be pickled.
    state: Any = object.__getstate__(value)
    parts = state if isinstance(state, tuple) else (state,)
    return {
        name: one
        for part in parts
        for name, one in (part or {}).items()
        if not isinstance(getattr(kind, name, None), cached_property)
    }


def _number_of(thing: object) -> int:
    """A number for an object. No other one has it, nor has it once this one is gone."""
    at, known = id(thing), _known
    reference = weakref.ref(thing, lambda _: known.pop(at, None))
    return known.setdefault(at, (reference, next(_numbers)))[1]
