"""The names of the sources of a pool."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from typing import Any

from zcache._backends.directory.files import open_to_group
from zcache._backends.pool.layout import label_of


class Register:
    """The names of the sources of a pool, for people: nothing else depends on them.

    Parameters
    ----------
    reserved : str
        The folder ``.zcache`` of the pool.
    """

    def __init__(self, reserved: str) -> None:
        self._path = os.path.join(reserved, "sources")

    def names(self) -> dict[str, dict[str, Any]]:
        """What is known of each source, by label."""
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {
            label: note
            for label, note in found.items()
            if isinstance(note, dict) and label_of(str(note.get("name"))) == label
        }

    def add(self, name: str, *, forget: bool = False) -> None:
        """Note that a source is used now, or forget it. What two processes note at once, one of them notes again later."""
        notes = self.names()
        if forget:
            notes.pop(label_of(name), None)
        else:
            notes[label_of(name)] = {"name": name, "used": time.time()}
        unfinished = f"{self._path}.{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            try:
                with open(unfinished, "x", encoding="utf-8") as file:
                    json.dump(notes, file)
                open_to_group(unfinished, os.path.dirname(self._path))
                os.replace(unfinished, self._path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished)
