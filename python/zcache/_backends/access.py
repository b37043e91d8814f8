"""What may be done with the values of a cache store."""

from __future__ import annotations

from enum import Enum


class Access(Enum):
    """What may be done with the values of a cache store; each may do what the next one may."""

    FILLS = "fills"
    """Values are added."""
    REMOVES = "removes"
    """None is added, for want of room, but they are removed."""
    READS = "reads"
    """They are only read: it was given as read-only, or cannot be written to now."""
