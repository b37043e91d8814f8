"""An S3-protocol server (moto) on loopback that delays and counts each request.

    python examples/_s3_server.py [MILLISECONDS]

prints its URL and serves until standard input closes. The kernel closes it when the parent process
ends, however it ends, so the server cannot outlive its use. Requests are counted in front of moto:
behind every client, retry and coalescing step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["BUCKET", "S3Server", "storage_options"]

BUCKET = "demo"
LIFETIME_SECONDS = 1800
STOP_SECONDS = 5
COUNT_PATH = "/count-of-requests"


def storage_options(url: str) -> dict[str, Any]:
    """Return the options for s3fs to reach the server at `url`.

    Everything is passed explicitly: the user's AWS settings and the proxy of the environment take
    no part.
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
        "client_kwargs": {"endpoint_url": url, "region_name": "eu-central-1"},
        "config_kwargs": {"proxies": {}, "s3": {"addressing_style": "path"}},
        # Each value here fits one request. With more than 1, s3fs asks for the size of a value
        # before it reads it, and the source looks twice as slow as it is.
        "max_concurrency": 1,
        # A listing kept by the client would hide requests that a cache did not save.
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }


class S3Server:
    """A context manager that runs the server in a process of its own.

    Parameters
    ----------
    latency_ms
        Milliseconds to hold each request, 0 or more. Requests wait side by side, as on a network.

    Attributes
    ----------
    url
        The endpoint, as `http://127.0.0.1:port`; the port is one that was free.
    pid
        The process id of the server.
    """

    def __init__(self, latency_ms: float = 0) -> None:
        self._command = [sys.executable, str(Path(__file__).resolve()), str(latency_ms)]
        self.url = ""
        self.pid = 0

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        # The server bounds this wait: it ends if it does not come up.
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self.__exit__()
            raise RuntimeError("the S3 server (moto) did not start; its error is above")
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def upload(self, prefix: str, objects: Mapping[str, bytes]) -> None:
        """Put `objects` under `prefix` of the bucket."""
        import s3fs  # type: ignore[import-untyped]

        filesystem = s3fs.S3FileSystem(**storage_options(self.url))
        filesystem.mkdirs(BUCKET, exist_ok=True)
        filesystem.pipe({f"{BUCKET}/{prefix}/{key}": value for key, value in objects.items()})

    def requests(self) -> int:
        """Return the number of requests so far; this one does not count."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.url + COUNT_PATH, timeout=10) as answer:
            return int(json.load(answer))


def end_process_after(seconds: float) -> threading.Timer:
    """Start a timer that ends this process."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    return timer


def delayed_and_counted(app: Callable[..., Iterable[bytes]], seconds: float) -> Any:
    """Wrap a WSGI application."""
    lock = threading.Lock()
    count = 0

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        nonlocal count
        if environ["PATH_INFO"] == COUNT_PATH:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [str(count).encode()]
        with lock:
            count += 1
        time.sleep(seconds)
        return app(environ, start_response)

    return answer


def serve(latency_ms: float) -> None:
    """Print the URL, then serve until standard input closes."""
    # Ctrl-C goes to the whole process group. The parent stops this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_limit = end_process_after(60)

    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = delayed_and_counted(DomainDispatcherApplication(create_backend_app), latency_ms / 1000)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start_limit.cancel()
    end_process_after(LIFETIME_SECONDS)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    # The server's threads are daemons and hold nothing that must be saved.
    os._exit(0)


if __name__ == "__main__":
    serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0)
