"""What a source makes of byte requests that reach beyond the value: stores disagree about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from zcache._runtime.buffers import to_cpu_buffer

if TYPE_CHECKING:
    from zarr.abc.store import Store


def slices_like_python(source: Store) -> bool:
    """Whether a source slices a value as Python does, whatever the request."""
    if isinstance(source, LocalStore):
        return True
    # Of a suffix longer than the value some releases of zarr (3.1.6 is one) return its end.
    values = MemoryStore({"k": to_cpu_buffer(b"12")})
    end = values.get_sync("k", byte_range=SuffixByteRequest(3))
    return isinstance(source, MemoryStore) and end is not None and len(end) == 2
