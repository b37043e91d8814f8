"""The circuit breaker: what it does under its lock."""

from __future__ import annotations

import errno
import logging
import threading

import pytest

from zcache._runtime.circuit_breaker import CircuitBreaker


@pytest.mark.parametrize(
    "error", [OSError(errno.ENAMETOOLONG, "File name too long"), OSError(errno.ENOSPC, "full")]
)
def test_breaker_that_logs_a_failure_holds_up_no_other_thread(error: OSError) -> None:
    breaker = CircuitBreaker("cache", show=lambda _: "")
    counted: list[bool] = []

    class Handler(logging.Handler):
        """Has another thread count while something is logged."""

        def emit(self, _: logging.LogRecord) -> None:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()

    def look() -> None:
        is_free = breaker._lock.acquire(blocking=False)
        counted.append(is_free)
        if is_free:
            breaker._lock.release()

    log, handler = logging.getLogger("zcache"), Handler()
    before = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        breaker.failed(error, "write")
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    # What else is logged meanwhile is looked at as well.
    assert counted
    assert all(counted)
    assert breaker.failures == 1
