"""What tells one way of decoding from another: the codecs themselves, for what they write into metadata may lack something.

A key of encryption, say.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.codecs import ShardingCodec, _v2
from zarr.core import codec_pipeline
from zarr.core.dtype import ZDType

if TYPE_CHECKING:
    from zarr.abc.codec import CodecPipeline

_STOCK: Final = frozenset({"zarr", "numcodecs"})
"""Packages of which each codec writes all that it is into metadata."""
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


def identity_of(*parts: Any) -> bytes:
    """A digest of codecs, or data types; the same for those that are alike.

    That are zarr's own and numcodecs' with the same metadata, and others of one class with the same attributes, as pickle
    writes them. What pickle cannot write is like nothing else. It raises TypeError where that cannot even be said.
    """
    return hashlib.blake2b(repr([_said(part) for part in parts]).encode(), digest_size=16).digest()


def _said(part: Any) -> object:
    kind = type(part)
    number = _number_of(kind)
    if kind is ShardingCodec:
        inner = identity_of(*part.codecs), identity_of(*part.index_codecs)
        return number, part.chunk_shape, str(part.index_location), inner
    if kind is _v2.V2Codec:
        return number, identity_of(*(part.filters or ())), identity_of(part.compressor)
    if part is None:
        return number
    if kind.__module__.partition(".")[0] not in _STOCK:
        return number, _attributes(part, kind)
    if isinstance(part, ZDType):
        # The data type of numpy tells the rest.
        return number
    about = part.to_dict() if hasattr(part, "to_dict") else part.get_config()
    return number, json.dumps(about, default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    """What describes a part of a codec in JSON."""
    if isinstance(value, np.dtype):
        return value.descr if value.names else value.str
    if isinstance(value, bytes):
        return value.hex()
    # A codec inside another one. Anything else that is not JSON raises.
    return value.get_config()


def _attributes(part: Any, kind: type) -> object:
    """All attributes, by a digest; a number of the object where they cannot be written, or are not all that it is."""
    slots = 0
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        slots += len(({names} if isinstance(names, str) else {*names}) - _NO_SLOTS)
    # As `object.__reduce_ex__` finds it out.
    size = slots + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    if kind.__itemsize__ or kind.__basicsize__ > object.__basicsize__ + size * _POINTER:
        return _number_of(part)
    try:
        # Not its own state, which may leave out what must not be pickled.
        written = pickle.dumps(object.__getstate__(part), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - whatever it is that cannot be pickled
        return _number_of(part)
    return hashlib.blake2b(written, digest_size=16).digest()


def _number_of(thing: object) -> int:
    """A number for an object. No other one has it, nor has it once this one is gone."""
    at, known = id(thing), _known
    reference = weakref.ref(thing, lambda _: known.pop(at, None))
    return known.setdefault(at, (reference, next(_numbers)))[1]
