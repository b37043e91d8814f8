"""The codec pipeline that keeps decoded chunks, and how arrays come by it."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.abc.codec import CodecPipeline
from zarr.codecs import ShardingCodec, _v2
from zarr.core import array as zarr_array
from zarr.core.buffer import cpu
from zarr.core.config import config
from zarr.registry import get_pipeline_class, register_pipeline
from zarr.storage import StorePath

from zcache._decoded.cache import decoded_of
from zcache._decoded.identity import identity_of, kind_of
from zcache._decoded.layout import Layout, layout_of
from zcache._decoded.one import copy_one
from zcache._decoded.parts import PRESENT
from zcache._decoded.reading import Reading
from zcache._runtime.fork import at_fork
from zcache.exceptions import OptionValueError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from zarr.abc.codec import Codec
    from zarr.abc.store import Store
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.metadata import ArrayMetadata

    from zcache._decoded.cache import DecodedCache

logger = logging.getLogger("zcache")

WRAPPED: Final = "zcache.codec_pipeline"
"""Key of zarr's config: the pipeline to wrap, where `codec_pipeline.path` names `DecodedCodecPipeline`."""
_DEFAULT: Final = "zarr.core.codec_pipeline.BatchedCodecPipeline"


# Its field is what dask names an array by: one that was made and the same one opened have pickles that differ.
@dataclass(init=False, repr=False, eq=False)
class DecodedCodecPipeline(CodecPipeline):
    """A codec pipeline that keeps decoded chunks of arrays on a `CacheStore` with `decoded_size`.

    All else is done by the pipeline that it wraps. Arrays on such a store get it by themselves, over the
    pipeline that is configured when they are opened. It may also be named in zarr's config, as
    ``codec_pipeline.path``; then it wraps the pipeline that ``zcache.codec_pipeline`` names there, by default
    zarr's own, and leaves arrays on other stores to it.

    Parameters
    ----------
    wrapped : CodecPipeline
        What decodes and encodes.
    codecs : iterable of Codec
        Of the array.
    """

    wrapped: CodecPipeline

    def __init__(self, wrapped: CodecPipeline, codecs: Iterable[Codec]) -> None:
        self.wrapped = wrapped
        # Those that run, where that is known: an array may have been given another pipeline than its metadata describes.
        runs: Any = wrapped if kind_of(type(wrapped)) == 0 else codecs
        self._codecs = tuple(runs)
        self._layouts: tuple[DecodedCache | None, dict[Any, tuple[Any, Layout | None]]] = None, {}
        self._latest: tuple[DecodedCache, Any, tuple[Any, ...], Layout | None] | None = None
        self._is_settled = False
        self._has_shards = any(isinstance(codec, ShardingCodec) for codec in self._codecs)

    @classmethod
    def from_codecs(cls, codecs: Iterable[Codec], **options: Any) -> DecodedCodecPipeline:
        """Wrap the pipeline that is named in zarr's config; see the class."""
        codecs = tuple(codecs)
        return cls(_wrapped_class().from_codecs(codecs, **options), codecs)

    @classmethod
    def from_array_metadata_and_store(
        cls, array_metadata: ArrayMetadata, store: Store
    ) -> DecodedCodecPipeline:
        """Wrap the pipeline that is named in zarr's config, if it takes part in that; see the class."""
        wrapped = _wrapped_class().from_array_metadata_and_store(
            array_metadata=array_metadata, store=store
        )
        return cls(wrapped, _codecs_of(array_metadata))

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> DecodedCodecPipeline:
        # docstring inherited
        return type(self)(self.wrapped.evolve_from_array_spec(array_spec), self._codecs)

    def __reduce__(self) -> Any:
        return type(self), (self.wrapped, self._codecs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DecodedCodecPipeline):
            return NotImplemented
        return self.wrapped == other.wrapped

    def __hash__(self) -> int:
        return hash(self.wrapped)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.wrapped!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __iter__(self) -> Iterator[Codec]:
        return iter(self.wrapped)  # type: ignore[call-overload,no-any-return]

    # --------------------------------------------------- what it leaves to the wrapped pipeline

    @property
    def supports_partial_decode(self) -> bool:
        # docstring inherited
        return self.wrapped.supports_partial_decode

    @property
    def supports_partial_encode(self) -> bool:
        # docstring inherited
        return self.wrapped.supports_partial_encode

    def validate(self, **what: Any) -> None:
        # docstring inherited
        self.wrapped.validate(**what)

    def compute_encoded_size(self, byte_length: int, array_spec: ArraySpec) -> int:
        # docstring inherited
        return self.wrapped.compute_encoded_size(byte_length, array_spec)

    async def decode(
        self, chunk_bytes_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]
    ) -> Iterable[NDBuffer | None]:
        # docstring inherited
        return await self.wrapped.decode(chunk_bytes_and_specs)

    async def encode(
        self, chunk_arrays_and_specs: Iterable[tuple[NDBuffer | None, ArraySpec]]
    ) -> Iterable[Buffer | None]:
        # docstring inherited
        return await self.wrapped.encode(chunk_arrays_and_specs)

    async def write(
        self, batch_info: Iterable[Any], value: NDBuffer, drop_axes: tuple[int, ...] = ()
    ) -> None:
        # docstring inherited
        await self.wrapped.write(batch_info, value, drop_axes)

    # ---------------------------------------------------------------------------- reads

    async def read(
        self, batch_info: Iterable[Any], out: NDBuffer, drop_axes: tuple[int, ...] = ()
    ) -> Any:
        # docstring inherited
        batch = list(batch_info)
        if batch:
            getter = batch[0][0]
            cache = decoded_of(getter.store) if type(getter) is StorePath else None
            if cache is not None and cache.origins.is_usable:
                array: Any = out._data if type(out) is cpu.NDBuffer else None
                is_plain = type(array) is np.ndarray
                # For what looks whether another reference to it exists.
                del array
                spec = batch[0][1]
                layout = self._layout(cache, spec)
                layouts: Any = [layout] * len(batch)
                if len(batch) > 1 and any([item[1] is not spec for item in batch]):  # noqa: C419 - a generator is slower
                    layouts = [self._layout(cache, item[1]) for item in batch]
                    is_plain = is_plain and None not in layouts
                if is_plain and layout is not None:
                    target = cache.outputs.renew(out, batch)
                    copied = None
                    if len(batch) == 1 and self._is_settled:
                        copied = copy_one(cache, batch[0], layout, target, drop_axes)
                        if copied:
                            return (PRESENT,)
                    reading = Reading(self.wrapped, cache, target, drop_axes, len(batch))
                    try:
                        found = await reading.run(batch, layouts, out, is_missed=copied is False)
                        self._is_settled |= reading.output.has_values
                        return found
                    finally:
                        # A codec may get what it lacked, such as a key, and be another one then.
                        if not self._is_settled:
                            self._forget_codecs()
        return await self.wrapped.read(batch, out, drop_axes)

    def _forget_codecs(self) -> None:
        """Look anew at what the codecs are, with the next read."""
        self._layouts, self._latest = (None, {}), None
        vars(self).pop("_identity", None)

    @functools.cached_property
    def _identity(self) -> bytes | None:
        """Of the codecs at the first read with values that are kept; None where they cannot be told from others."""
        try:
            return identity_of(*self._codecs)
        except Exception:  # noqa: BLE001 - a codec of which it is not known what it is
            return None

    def _layout(self, cache: DecodedCache, spec: ArraySpec) -> Layout | None:
        # What is in a shard, zarr decodes by the pipeline that is configured when it is read.
        inner = get_pipeline_class() if self._has_shards else None
        if inner is DecodedCodecPipeline:
            inner = _wrapped_class()
        dtype = spec.dtype
        prototype = spec.prototype
        what = (spec.shape, spec.config.order, prototype.nd_buffer, prototype.buffer, inner)
        # Threads come here at once; each looks at one tuple, so none gets the layouts of another cache.
        latest = self._latest
        if latest is not None and latest[0] is cache and latest[1] is dtype and latest[2] == what:
            # Of a regular grid all chunks have the same one. zarr makes a specification for each read.
            return latest[3]
        owner, layouts = self._layouts
        if owner is not cache:
            layouts = {}
            self._layouts = cache, layouts
        kinds = [kind_of(kind) for kind in (type(self.wrapped), inner) if kind is not None]
        key = (id(dtype), *what[:-1], *kinds)
        found = layouts.get(key)
        if found is None:
            identity = self._identity
            layout = None if identity is None else layout_of(self._codecs, spec, (identity, *kinds))
            if layout is not None:
                layout.number = cache.number_of(layout.identity)
            # The data type is kept, so that no other has its address.
            found = layouts[key] = dtype, layout
        self._latest = cache, dtype, what, found[1]
        return found[1]


def _wrapped_class() -> type[CodecPipeline]:
    path = config.get(WRAPPED, _DEFAULT)
    if path == _NAME:
        path = _DEFAULT
    module, _, name = str(path).rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    if not isinstance(found, type) or not issubclass(found, CodecPipeline):
        raise OptionValueError(
            f"zarr.config has {WRAPPED}={path!r}, which is no codec pipeline. Give the full name of a codec "
            f"pipeline, such as {_DEFAULT!r}."
        )
    return found


def _codecs_of(metadata: Any) -> tuple[Codec, ...]:
    if metadata.zarr_format == 2:
        return (_v2.V2Codec(filters=metadata.filters, compressor=metadata.compressor),)
    return tuple(metadata.codecs)


def rewrapped(pipeline: CodecPipeline, metadata: Any) -> DecodedCodecPipeline | None:
    """The pipeline of an array, for the same array on a store with decoded chunks; None if it is bound to its store."""
    if isinstance(pipeline, DecodedCodecPipeline):
        pipeline = pipeline.wrapped
    bind = "from_array_metadata_and_store"
    made, usual = (getattr(kind, bind, None) for kind in (type(pipeline), CodecPipeline))
    if getattr(made, "__func__", None) is not getattr(usual, "__func__", None):
        return None
    return DecodedCodecPipeline(pipeline, _codecs_of(metadata))


_lock = threading.RLock()


def _after_fork() -> None:
    # A thread of the parent may have held it.
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)


def install() -> None:
    """Have arrays that are opened from now on on a store with decoded chunks use them.

    zarr makes the pipeline of each array in `create_codec_pipeline`, from the class that is configured then.
    What it makes for such a store is wrapped; all else stays as it is, and so does the config.
    """
    if not hasattr(zarr_array, "create_codec_pipeline"):
        logger.warning(
            "this zarr makes codec pipelines in another way, so decoded_size has no effect by itself. Set "
            'zarr.config.set({"codec_pipeline.path": "%s"}).',
            _NAME,
        )
        return
    with _lock:
        make: Any = zarr_array.create_codec_pipeline
        if hasattr(make, "_zcache"):
            return

        @functools.wraps(make)
        def create_codec_pipeline(metadata: Any, **more: Any) -> CodecPipeline:
            pipeline: CodecPipeline = make(metadata, **more)
            is_wrapped = isinstance(pipeline, DecodedCodecPipeline)
            if decoded_of(more.get("store")) is not None and not is_wrapped:
                return DecodedCodecPipeline(pipeline, _codecs_of(metadata))
            return pipeline

        create_codec_pipeline._zcache = True  # type: ignore[attr-defined]
        zarr_array.create_codec_pipeline = create_codec_pipeline


# By the name under which users know it.
DecodedCodecPipeline.__module__ = "zcache"
_NAME: Final = "zcache.DecodedCodecPipeline"
register_pipeline(DecodedCodecPipeline)
