"""An S3-protocol server (moto) on loopback, in a process of its own.

The process cannot outlive its use: it ends when its standard input closes, which the kernel sees
to even if the parent is killed, and it ends by itself after `LIFETIME_SECONDS`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["BUCKET", "S3Server", "storage_options", "upload"]

BUCKET = "demo"
START_SECONDS = 60
LIFETIME_SECONDS = 1800
STOP_SECONDS = 5


class S3Server:
    """A context manager that starts the server process and stops it on every way out.

    Attributes
    ----------
    url
        The endpoint, as `http://127.0.0.1:port`; the port is one that was free.
    pid
        Its process id.
    """

    def __init__(self) -> None:
        self.url = ""
        self.pid = 0
        self._process: subprocess.Popen[str] | None = None
        # A file and not a pipe: nobody reads a pipe while the server runs, and a full one blocks.
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop

    def __enter__(self) -> Self:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._process = process
        self.pid = process.pid
        try:
            self.url = f"http://127.0.0.1:{self._read_port(process)}"
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _read_port(self, process: subprocess.Popen[str]) -> int:
        """Wait for the port; the child bounds the wait, for it ends if it does not come up."""
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            self._errors.seek(0)
            last_lines = "".join(self._errors.readlines()[-5:])
            raise RuntimeError(f"the S3 server (moto) did not start:\n{last_lines}")
        return int(port)

    def stop(self) -> None:
        """Stop the process: ask, then terminate, then kill; return when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        for last_resort in (process.terminate, process.kill):
            try:
                process.wait(STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                last_resort()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()


def storage_options(endpoint: str) -> dict[str, Any]:
    """Return the options for s3fs to reach the server at `endpoint`.

    Everything is passed explicitly, so neither the user's AWS settings nor an HTTP proxy from the
    environment takes part, and nothing is written to the environment.
    """
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    nowhere = {
        "profile": (None, None, None, None),
        "config_file": (None, None, os.devnull, None),
        "credentials_file": (None, None, os.devnull, None),
    }
    return {
        "key": "demo",
        "secret": "demo",
        "session": AioSession(session_vars=nowhere),
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "eu-central-1"},
        "config_kwargs": {"proxies": {}, "s3": {"addressing_style": "path"}},
        # Each value here fits one request. With more than 1, s3fs asks for the size of a value
        # before it reads it, and the source looks twice as slow without a cache as it need be.
        "max_concurrency": 1,
        # A listing kept by the client would hide requests that a cache did not save.
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }


def upload(endpoint: str, prefix: str, objects: Mapping[str, bytes]) -> None:
    """Put `objects` under `prefix` of the bucket, which is made first."""
    import s3fs  # type: ignore[import-untyped]

    filesystem = s3fs.S3FileSystem(**storage_options(endpoint))
    filesystem.mkdir(BUCKET)
    filesystem.pipe({f"{BUCKET}/{prefix}/{key}": value for key, value in objects.items()})


def _end_process() -> None:
    """End this process from a timer thread, where an exception would end only the thread."""
    os._exit(1)


def _main() -> None:
    """Serve until standard input closes; print the port when ready."""
    # Ctrl-C goes to the whole process group. The parent still has to stop what uses the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_limit = threading.Timer(START_SECONDS, _end_process)
    start_limit.daemon = True
    start_limit.start()

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    start_limit.cancel()
    life_limit = threading.Timer(LIFETIME_SECONDS, _end_process)
    life_limit.daemon = True
    life_limit.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    # The server's threads are daemons and hold nothing that must be saved.
    os._exit(0)


if __name__ == "__main__":
    _main()
