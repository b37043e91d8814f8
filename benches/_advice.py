"""Advice: what sampling costs a hit, and how far curves from a sample are from those of all requests."""

from __future__ import annotations

import asyncio
import time
from statistics import median

import numpy as np
from _measure import Row, Times, interleave
from _setup import PROTOTYPE, Scale
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from zcache import CacheStore
from zcache._advice.advise import advise
from zcache._advice.trace import complete
