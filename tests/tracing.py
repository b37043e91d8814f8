"""Runs a process up to one of the system calls by which it changes files or takes locks.

At the beginning of such a call nothing of it has happened, and all before it has. So a process that is
killed at each of them in turn has died in every state that a cache directory can be left in by Python,
by the core, and by any of their threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_NUMBERS: Final = {
    "x86_64": {
        "open": 2,
        "openat": 257,
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "pwritev": 296,
        "ftruncate": 77,
        "truncate": 76,
        "fallocate": 285,
        "utimensat": 280,
        "flock": 73,
        "fstat": 5,
        "link": 86,
        "linkat": 265,
        "unlink": 87,
        "unlinkat": 263,
        "rename": 82,
        "rmdir": 84,
        "renameat": 264,
        "renameat2": 316,
        "mkdir": 83,
        "mkdirat": 258,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "fsync": 74,
        "fdatasync": 75,
    },
    "aarch64": {
        "openat": 56,
        "write": 64,
        "pwrite64": 68,
        "writev": 66,
        "pwritev": 70,
        "ftruncate": 46,
        "truncate": 45,
        "fallocate": 47,
        "utimensat": 88,
        "flock": 32,
        "fstat": 80,
        "linkat": 37,
        "unlinkat": 35,
        "renameat": 38,
        "renameat2": 276,
        "mkdirat": 34,
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
        "fsync": 82,
        "fdatasync": 83,
    },
}
_NAMES: Final = {number: name for name, number in _NUMBERS.get(platform.machine(), {}).items()}
_TRACEME, _CONTINUE, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_OPTIONS: Final = (
    0x00000080 | 0x00000008 | 0x00100000
)  # Stop where the filter says, follow threads, die with us.
_WALL: Final = 0x40000000
_FILTERED: Final = signal.SIGTRAP | 7 << 8
"""How a stop at the filter shows: the call has not begun."""
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_TRACE, _ALLOW = 0x7FF00000, 0x7FFF0000
OWNER: Final = 8
"""Where the file `owner` of an index names the participant that is in a step."""


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        # The number of the call, and its arguments.
        ("words", ctypes.c_uint64 * 8),
    )


class _Instruction(ctypes.Structure):
    """Of a filter of system calls."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, thread: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, thread, address, data) == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _stop_at_calls() -> None:
    """Have the kernel stop this process at the calls that have a name above, and at no other: there are ten times as many."""
    numbers = sorted(_NAMES)
    program = [(_LOAD, 0, 0, 0)]
    # The last instruction but one allows, the last one traces.
    program += [(_EQUALS, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _TRACE)]
    instructions = (_Instruction * len(program))(*program)
    filtered = _Program(len(program), instructions)
    if (
        _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == -1
        or _libc.prctl(_SECCOMP, _FILTER, ctypes.byref(filtered), 0, 0) == -1
    ):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def why_not() -> str | None:
    """Why processes cannot be traced here; None if they can."""
    if not sys.platform.startswith("linux") or not _NAMES:
        return "the numbers of the system calls of this machine are not known here"
    try:
        with Traced(Path("/dev/null/none").mkdir, 1) as traced:
            traced.go()
    except OSError as error:
        return f"this machine does not let processes be traced: {error}"
    return None if traced.at else "this machine does not let system calls be filtered"


class Traced:
    """A child that is stopped at one of its steps, and killed at the end of the `with` block.

    Parameters
    ----------
    work : callable
        What the child does.
    step : int
        The step at which it is to be stopped, from 1 on.

    Attributes
    ----------
    at : str
        The system call at which it has stopped; "" if it has ended by itself.
    holds_lock : bool
        Whether it holds the lock of an index there.
    """

    def __init__(self, work: Callable[[], object], step: int) -> None:
        self._left = step
        self.at = ""
        self.holds_lock = False
        self._ended = False
        self.child = os.fork()
        if not self.child:
            self._be_child(work)
        self._threads = {self.child}
        os.waitpid(self.child, _WALL)

    def _be_child(self, work: Callable[[], object]) -> None:
        code = 1
        try:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            _stop_at_calls()
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001 - the parent sees the exit code
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def go(self) -> int | None:
        """Let it run up to the step; returns its exit code if it ends before."""
        _ptrace(_SETOPTIONS, self.child, 0, _OPTIONS)
        thread, forward = self.child, 0
        while True:
            # It may have been killed meanwhile, by the end of the process say.
            with contextlib.suppress(ProcessLookupError):
                _ptrace(_CONTINUE, thread, 0, forward)
            thread, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                if thread == self.child:
                    self._ended = True
                    return os.waitstatus_to_exitcode(status)
                continue
            forward = 0
            reason = os.WSTOPSIG(status)
            if status >> 8 == _FILTERED:
                if self._is_the_one(thread):
                    self._settle()
                    self.holds_lock = self._owns_index()
                    return None
            elif reason == signal.SIGSTOP and thread not in self._threads:
                self._threads.add(thread)  # So does each thread begin.
            elif reason != signal.SIGTRAP:
                forward = reason

    def _is_the_one(self, thread: int) -> bool:
        info = _Info()
        try:
            _ptrace(_GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.byref(info))
        except ProcessLookupError:
            return False  # The end of the process has taken it.
        name = _NAMES.get(info.words[0], "")
        first, second, third = info.words[1], info.words[2], info.words[3]
        if name.startswith("open") and not (second if name == "open" else third) & os.O_CREAT:
            return False
        if name == "fstat" and not self._path(first).endswith("/index/lock"):
            return False  # Each step of an index does that while it holds the lock.
        if "write" in name and not self._path(first).startswith("/"):
            return False  # A pipe.
        self._left -= 1
        if self._left == 0:
            self.at = name
        return self._left == 0

    def _settle(self) -> None:
        """Wait until each other thread stands still: one of them may be in a step just now."""
        while True:
            if os.waitpid(-1, _WALL | os.WNOHANG)[0]:
                continue
            if not any(map(_is_running, Path(f"/proc/{self.child}/task").glob("*/stat"))):
                return
            time.sleep(0.001)

    def _owns_index(self) -> bool:
        """Whether any thread of it is in a step of an index."""
        files = Path(f"/proc/{self.child}/fd").glob("*")
        owners = [file for file in files if self._path(int(file.name)).endswith("/index/owner")]
        return any(file.read_bytes()[OWNER : OWNER + 8].strip(b"\0") for file in owners)

    def _path(self, file: int) -> str:
        try:
            return str(Path(f"/proc/{self.child}/fd/{file}").readlink())
        except OSError:
            return ""

    def kill(self) -> None:
        """Kill it, wherever it is."""
        if self._ended:
            return
        os.kill(self.child, signal.SIGKILL)
        while not self._ended:
            thread, status = os.waitpid(-1, _WALL)
            # A thread that was about to stop does so first.
            if thread == self.child and not os.WIFSTOPPED(status):
                self._ended = True


def _is_running(stat: Path) -> bool:
    """Whether a thread neither stands still nor waits in the kernel."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] == "R"
    return False
