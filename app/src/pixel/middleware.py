"""What the applications do with every request, around FastAPI."""

import logging
from http import HTTPStatus
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixel import logs, metrics

DISCONNECTED = 499
"""In metrics, the status of a request whose client disconnected before the answer."""

log = logging.getLogger(__name__)


class MetricsMiddleware:
    """Counts and logs FastAPI's answers, answers HEAD, and limits caching.

    HEAD is answered as GET without the body. An answer to GET without a ``Cache-Control`` must not be
    stored by a cache; one with an ETag must be validated each time.
    """

    def __init__(self, api: ASGIApp) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        started = perf_counter()
        status = DISCONNECTED
        level = logging.DEBUG
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if method in ("GET", "HEAD"):
                    _limit_caching(message["headers"])
                await send(message)
                if method == "HEAD":
                    await send({"type": "http.response.body"})
            elif method != "HEAD":
                await send(message)

        try:
            await self._api(scope, receive, watch)
            # /readyz is asked every other second; the store logs an outage of Redis once, and the gate,
            # which the history service doesn't have, the beginning of maintenance.
            gate = scope["state"].get("gate") if status == HTTPStatus.SERVICE_UNAVAILABLE else None
            refused = gate is not None and gate.maintenance.refuses(method)
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR and scope["path"] != "/readyz" and not refused:
                level = logging.WARNING
        except ClientDisconnect:
            pass
        except Exception:
            # FastAPI has answered it with a 500 by then.
            log_fault(scope)
        route = getattr(scope.get("route"), "path", "")
        seconds = perf_counter() - started
        metrics.observe(method, route, status, seconds)
        logs.answered(level, method, scope["path"], status, seconds, scope["headers"])


def log_fault(scope: Scope) -> None:
    """Log the exception that is being handled."""
    what = (scope["method"], scope["path"])
    log.exception("%s %s failed", *what, extra={"request_id": logs.request_id(scope["headers"])})


def _limit_caching(headers: list[tuple[bytes, bytes]]) -> None:
    names = {name.lower() for name, _ in headers}
    if b"cache-control" not in names:
        headers.append((b"cache-control", b"no-cache" if b"etag" in names else b"no-store"))
