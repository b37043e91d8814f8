"""An HTTP proxy on loopback that delays and counts each request on its way to a server.

It counts where the requests are real: behind every client, retry and coalescing step, in front of
the server. The stores under test run unchanged.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self

import aiohttp
from aiohttp import web
from yarl import URL

from _metering import Meter

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["LatencyProxy"]

# These describe one connection and not the message: a proxy must not forward them (RFC 9110,
# section 7.6.1). `Expect` was answered by this proxy's own server.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
)
_MAX_BODY_BYTES = 1 << 30
_START_SECONDS = 10


class LatencyProxy:
    """A context manager that runs the proxy in a thread of its own.

    Parameters
    ----------
    upstream
        Where requests go, as `http://host:port`.
    latency
        Seconds to hold each request before it is forwarded, 0 or more. Requests wait side by
        side, as they do on a network.

    Attributes
    ----------
    meter
        Counts each request, and the body bytes of each answer to a GET.
    url
        Where clients connect, as `http://127.0.0.1:port`. Set once the proxy has started.
    """

    def __init__(self, upstream: str, latency: float) -> None:
        self.meter = Meter()
        self.url = ""
        self._upstream = upstream.rstrip("/")
        self._latency = latency
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="latency-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(_START_SECONDS):
            raise RuntimeError(f"the latency proxy did not start in {_START_SECONDS} s")
        if self._error is not None:
            raise RuntimeError(f"the latency proxy did not start: {self._error}") from self._error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        # `auto_decompress=False`: bodies pass as they are. `limit=0`: the clients set the limit.
        async with aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
        ) as session:

            async def handle(request: web.Request) -> web.Response:
                return await self._forward(request, session)

            app = web.Application(client_max_size=_MAX_BODY_BYTES)
            app.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                self._started.set()
                await self._stop.wait()
            finally:
                await runner.cleanup()

    async def _forward(self, request: web.Request, session: aiohttp.ClientSession) -> web.Response:
        """Count a request, hold it, pass it on, and pass the answer back."""
        self.meter.add(requests=1)
        body = await request.read()
        if self._latency > 0:
            await asyncio.sleep(self._latency)
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _HOP_BY_HOP
        ]
        # `encoded=True`: a key must arrive quoted exactly as the client quoted it.
        url = URL(self._upstream + request.raw_path, encoded=True)
        try:
            async with session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as answer:
                payload = await answer.read()
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"the server behind the proxy failed: {error}")
        if request.method == "GET":
            self.meter.add(bytes_read=len(payload))
        response = web.Response(status=answer.status, body=payload or None)
        response.headers.clear()
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                response.headers.add(name, value)
        return response
