"""Simulations against libcachesim, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from zcache._core import simulate

libcachesim = pytest.importorskip("libcachesim")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))
traces = pytest.importorskip("traces")


def misses_by_oracle(policy: str, keys: np.ndarray, capacity: int) -> float:
    """The miss ratio that libcachesim says."""
    cache = getattr(libcachesim, policy)(capacity)
    request = libcachesim.Request()
    request.obj_size = 1
    misses = 0
    for key in keys.tolist():
        request.obj_id = key + 1
        misses += not cache.get(request)
    return misses / len(keys)


def misses(policy: str, keys: np.ndarray, capacity: int) -> float:
    """The miss ratio that we say."""
    sizes = np.ones(len(keys), np.uint64).tobytes()
    served = simulate(policy, capacity, keys.astype(np.int64).tobytes(), sizes)
    return float(1 - np.frombuffer(served, np.uint8).mean())


TRACES = {
    "zipf": lambda: traces.zipf(2000, 20_000),
    "shuffled": lambda: traces.shuffled(1000, 10),
    "pan": lambda: traces.pan_and_zoom(20_000, 64),
    "points": lambda: traces.points(20_000, 300),
    "hot": lambda: traces.hot_set_and_scans(20_000, 500, 300),
}


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_lru_agrees_with_libcachesim(name: str, share: float) -> None:
    keys = TRACES[name]()
    capacity = int(len(np.unique(keys)) * share)
    difference = misses("lru", keys, capacity) - misses_by_oracle("LRU", keys, capacity)
    assert abs(difference) < 0.005


@pytest.mark.parametrize("name", TRACES)
def test_adaptive_is_close_to_lru_or_better(name: str) -> None:
    keys = TRACES[name]()
    for share in (0.05, 0.3, 0.8):
        capacity = int(len(np.unique(keys)) * share)
        assert misses("adaptive", keys, capacity) <= misses("lru", keys, capacity) + 0.01


def test_simulate_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"eviction=.*no policy"):
        simulate("no policy", 1, b"", b"")
    with pytest.raises(ValueError, match="one size for each key"):
        simulate("lru", 1, bytes(16), bytes(8))
