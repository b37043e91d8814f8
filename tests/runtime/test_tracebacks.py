"""What errors keep alive."""

from __future__ import annotations

import gc
import weakref

from zcache._runtime.tracebacks import clear_frames


class Held:
    """Something that a frame may hold."""


def raised(error: BaseException, seen: list[weakref.ref[Held]]) -> BaseException:
    """The error, with a frame that holds something."""

    def fail() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise error

    try:
        fail()
    except BaseException as caught:  # noqa: BLE001 - it is looked at
        return caught
    raise AssertionError


def test_error_keeps_nothing_by_its_cause_its_context_and_its_group() -> None:
    seen: list[weakref.ref[Held]] = []
    cause, context, member = (raised(OSError(str(n)), seen) for n in range(3))
    error = raised(BaseExceptionGroup("several", [member]), seen)
    error.__cause__, error.__context__ = cause, context
    # By hand: Python makes no circles.
    context.__context__ = error
    clear_frames(error, None)
    gc.collect()
    assert len(seen) == 4
    assert not [one for one in seen if one() is not None]


def test_error_that_was_handled_before_keeps_what_it_has() -> None:
    seen: list[weakref.ref[Held]] = []
    handled = raised(OSError("the caller's"), seen)
    error = raised(OSError("ours"), seen)
    error.__context__ = handled
    clear_frames(error, handled)
    gc.collect()
    assert [one() is not None for one in seen] == [True, False]
