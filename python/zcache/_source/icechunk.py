"""Read-only sessions of icechunk, named by where their repository is and by their snapshot.

A snapshot never changes, but all repositories begin with the same one, so its id alone is no name. A
session tells where its repository is only in its serialized form, as it goes to workers. That form is icechunk's
own: whatever is not as expected in it, the session has no name.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Final

from zcache._source.answers import UnnamedError
from zcache._source.endpoints import amazon, amazon_of
from zcache._source.location import Location
from zcache._source.settled import real_path
from zcache._source.urls import server

REPOSITORY: Final = "icechunk:"
"""Beginning of the name of a snapshot; the place of its repository follows after an ``@``."""
_NUMBERS: Final = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
_LENGTHS: Final = dict(zip((*range(0xC4, 0xC7), *range(0xD9, 0xE0)), "BHIBHIHIHI", strict=True))
_CONSTANTS: Final = {0xC0: None, 0xC2: False, 0xC3: True}


def snapshot_of(store: Any) -> str | None:
    """Name the snapshot that a store of icechunk shows; None of a session that can be written.

    Parameters
    ----------
    store : icechunk.IcechunkStore
        A store; it may be read-only itself, whatever its session is.

    Raises
    ------
    UnnamedError
        If it is not certain where the repository is.
    """
    session = store.session
    # With these the same manifests may mean other values.
    if not session.read_only or session.config.virtual_chunk_containers:
        return None
    parts = unpack(store._store.session.as_bytes())
    found = [part for part in parts if isinstance(part, dict) and "type" in part]
    if len(found) != 1:
        raise UnnamedError
    return f"{REPOSITORY}{session.snapshot_id}@{place_of(found[0])}"


def place_of(told: dict[str, Any]) -> str:
    """Name the place of a repository, of which the serialized form tells this.

    Raises
    ------
    UnnamedError
        If it is not one of those that have a name.
    """
    if told["type"] == "S3Storage":
        if told.get("extra_read_headers") or told.get("key_layout", "Standard") != "Standard":
            raise UnnamedError
        bucket = told
    elif told["type"] == "ObjectStorage":
        bucket = told["backend"]
        kind = bucket["object_store_provider_type"]
        if kind == "local_file_system_object_store_provider":
            return str(Location("file://", real_path(bucket["path"])))
        if kind != "s3_object_store_provider":
            raise UnnamedError
    else:
        raise UnnamedError
    region, url = bucket["config"][:2]
    endpoint = amazon(server(url)) if url else _default(region)
    path = f"{bucket['bucket']}/{bucket['prefix'] or ''}".strip("/")
    return str(Location("s3://", path, endpoint))


def _default(region: object) -> str | None:
    """The server of S3 where none is given, and neither environment nor profiles can name one."""
    home = Path.home() / ".aws"
    files = (
        os.environ.get("AWS_CONFIG_FILE") or home / "config",
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials",
    )
    told = [Path(file).read_bytes() for file in files if Path(file).exists()]
    if (
        not region
        or any(name.upper().startswith("AWS_ENDPOINT") for name in os.environ)
        or any(b"endpoint_url" in text for text in told)
    ):
        raise UnnamedError
    return amazon_of(region)


def unpack(data: bytes) -> Any:
    """The value that MessagePack has here."""
    return _Reader(data).read()


class _Reader:
    """Reads MessagePack, of which only what a session is made of."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self) -> Any:
        """The next value."""
        (kind,) = self._take(1)
        if kind < 0x80:
            return kind
        if kind < 0x90:
            return self._map(kind & 0x0F)
        if kind < 0xA0:
            return [self.read() for _ in range(kind & 0x0F)]
        if kind < 0xC0:
            return self._take(kind & 0x1F).decode()
        if kind >= 0xE0:
            return kind - 0x100
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        return self._sized(kind)

    def _sized(self, kind: int) -> Any:
        if kind not in _LENGTHS:
            raise UnnamedError
        length = self._number(_LENGTHS[kind])
        if kind >= 0xDE:
            return self._map(length)
        if kind >= 0xDC:
            return [self.read() for _ in range(length)]
        data = self._take(length)
        return data.decode() if kind >= 0xD9 else data

    def _map(self, length: int) -> dict[Any, Any]:
        return {self.read(): self.read() for _ in range(length)}

    def _number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self._take(struct.calcsize(f">{form}")))[0]

    def _take(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise UnnamedError
        return self._data[start : self._at]
