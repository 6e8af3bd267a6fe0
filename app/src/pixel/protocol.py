"""Uvicorn's HTTP protocol, with a short way through it for ``POST /pixel``.

A write costs less than the scope, the task and the messages by which an ASGI application is
served. So one that has come whole is made where the parser is done with it, and answered where
Redis' acknowledgement arrives. Everything else takes Uvicorn's way to FastAPI: other requests,
writes that come in pieces or behind a request that is still being served, and those that can't
be accepted, which FastAPI's route explains.
"""

import asyncio
import logging
from functools import partial
from time import perf_counter
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pixel import logs, metrics
from pixel.pixel import Pixel, Received
from pixel.problems import Headers, Problem
from pixel.requests import State, check_headers, check_size

log = logging.getLogger(__name__)


class Write:
    """A write that is under way, in the place of Uvicorn's cycle: what the protocol asks of it."""

    __slots__ = ("disconnected", "headers", "keep_alive", "pixel", "response_complete", "started")

    message_event = asyncio.Event()  # which nobody waits for

    def __init__(self, pixel: Pixel, headers: Headers, started: float) -> None:
        self.pixel = pixel
        self.headers = headers
        self.started = started
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False


class PixelProtocol(HttpToolsProtocol):
    """One connection.

    Against Uvicorn's it also saves the scope, where there is the short way, and has one timer a
    connection instead of one a request.
    """

    app_state: State  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: bytes | None = None
        self._active = 0.0
        # Where every answer is logged, the front does it.
        self._short = not log.isEnabledFor(logging.DEBUG)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()

    def data_received(self, data: bytes) -> None:
        self._active = perf_counter()
        super().data_received(data)
        if self._held is not None and not self.transport.is_closing():
            self._hand_on()

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        if (
            self._short
            and self.url == b"/pixel"
            and parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
        ):
            self._held = b""
        else:
            self._hand_on()

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        if self._held is None or not self._write(self._held):
            super().on_message_complete()

    def _hand_on(self) -> None:
        """Let Uvicorn serve the request, as far as it has come."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)  # which looks for an expectation, too
        super().on_headers_complete()
        if self._held:
            super().on_body(self._held)
        self._held = None

    def _write(self, body: bytes) -> bool:
        """Begin a write; one that can't be begun is handed on."""
        state = self.app_state
        try:
            stamp = check_headers(self.headers)
            check_size(body, state["settings"].body_limit)
            pixel = state["reader"].pixel(body)
            store = state["store"]
            written = store.write((pixel.change(),), store.start_limit.begin_by(stamp))
        except Exception:
            self._hand_on()
            return False
        self._held = None
        write = Write(pixel, self.headers, self._active)
        self.cycle = write  # type: ignore[assignment]
        written.add_done_callback(partial(self._answer, write))
        return True

    def _answer(self, write: Write, written: asyncio.Future[None]) -> None:
        common = self.server_state.default_headers
        problem = written.exception()
        if problem is None:
            status = 200
            body = msgspec.json.encode(Received("ok", write.pixel))
            head = b"%bcontent-length: %d\r\n" % (_accepted.head(common), len(body))
        else:
            assert isinstance(problem, Problem)
            response = problem.response(write.headers)
            status, body = response.status_code, bytes(response.body)
            head = _head(status, [*common, *response.raw_headers])
        if not write.disconnected:
            end = b"\r\n" if write.keep_alive else b"connection: close\r\n\r\n"
            self.transport.write(head + end + body)
            if not write.keep_alive:
                self.transport.close()
        write.response_complete = True
        self.on_response_complete()
        seconds = self._active - write.started
        metrics.observe("POST", "/pixel", status, seconds)
        if problem is not None:
            logs.answered(logging.WARNING, "POST", "/pixel", status, seconds, write.headers)

    def on_response_complete(self) -> None:
        self._active = perf_counter()
        if self.pipeline or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.flow.resume_reading()

    def _unset_keepalive_if_required(self) -> None:
        """Leave the timer as it is; it sees for itself whether the connection was idle."""

    def timeout_keep_alive_handler(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        rest = self.timeout_keep_alive - (0 if busy else perf_counter() - self._active)
        if rest > 0:
            again = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(rest, again)
        else:
            super().timeout_keep_alive_handler()


def _head(status: int, headers: Headers) -> bytes:
    return STATUS_LINE[status] + b"".join(b"%b: %b\r\n" % header for header in headers)


class _Accepted:
    """The head of an answer to a write that was made, which changes with the date only."""

    def __init__(self) -> None:
        self._common: Headers | None = None
        self._head = b""

    def head(self, common: Headers) -> bytes:
        """It, with the headers that every answer has: a list that Uvicorn replaces each second."""
        if common is not self._common:
            self._common = common
            self._head = _head(200, [*common, (b"content-type", b"application/json")])
        return self._head


_accepted = _Accepted()
