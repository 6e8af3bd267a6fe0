"""Uvicorn's HTTP protocol, with a fast path for pixels and event streams.

For ``POST /pixel``, ``GET /pixel/{x}/{y}`` and messages to viewers, the scope, the task and the
messages of ASGI would cost more than the request itself. On the fast path, a request is handled when
the parser has completed it and answered when Redis's reply arrives; the hub writes to streams
directly. All other requests go through Uvicorn to FastAPI: other routes, requests that arrive in
pieces or while another is in progress, and invalid ones, whose errors FastAPI's routes describe.
"""

import asyncio
import logging
import re
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any, ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pixel import logs, metrics
from pixel.budgets import Writer
from pixel.canvas import Region
from pixel.events import QUEUE_BYTES, Viewer
from pixel.pixel import PixelColour, Received
from pixel.problems import STAMP, Headers, Problem
from pixel.reads import Colour
from pixel.requests import STREAM_HEADERS, State, check_headers, check_size
from pixel.stream import EVENT_PATTERN, EventId, known_event

log = logging.getLogger(__name__)


_encode = msgspec.json.Encoder().encode

_CLOSE = b"connection: close\r\n\r\n"

_READING = (b"GET", b"HEAD")
_READABLE = (b"/pixel/", b"/events")
_PIXEL = re.compile(rb"/pixel/([0-9]{1,5})/([0-9]{1,5})")
_EVENTS = re.compile(
    rb"/events(?:\?(?:x=([0-9]{1,5})&y=([0-9]{1,5})&w=([0-9]{1,5})&h=([0-9]{1,5})(?:&|$))?"
    rb"(?:after=(%b))?)?" % EVENT_PATTERN.encode()
)


class _Accepted:
    """The common part of the answers to accepted requests of one kind."""

    def __init__(self, method: str, route: str, *headers: tuple[bytes, bytes]) -> None:
        self.observe = metrics.answers(method, route, 200).add
        self.headers = headers
        self._common: Headers | None = None
        self._head = b""

    def head(self, common: Headers) -> bytes:
        """The head of an answer. Uvicorn makes a new list of common headers when the date changes."""
        if common is not self._common:
            self._common = common
            self._head = _head(200, [*common, *self.headers])
        return self._head


class Exchange:
    """A request in progress, in place of Uvicorn's cycle, with the attributes that the protocol uses.

    It answers the request when it gets the outcome (``problems.Answer``).
    """

    __slots__ = (
        "disconnected",
        "headers",
        "keep_alive",
        "protocol",
        "response_complete",
        "started",
        "subject",
    )

    message_event = asyncio.Event()  # never awaited

    method: ClassVar[str]
    route: ClassVar[str]
    accepted: ClassVar[_Accepted]
    writer: Writer | None = None  # of a write that counts against a budget

    def __init__(self, subject: Any, protocol: "PixelProtocol") -> None:
        self.subject = subject
        self.protocol = protocol
        self.headers: Headers = protocol.headers
        self.started = protocol.active
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False

    @property
    def path(self) -> str:
        """The requested path."""
        return self.route

    def content(self, result: Any) -> bytes:
        """The body of the answer."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether the request has been answered."""
        return self.response_complete

    def set_result(self, result: Any) -> None:
        """Answer 200."""
        accepted, protocol = self.accepted, self.protocol
        content = self.content(result)
        start = accepted.head(protocol.server_state.default_headers)
        if self.writer is not None:
            start += _lines(protocol.app_state["store"].budgets.fields(self.writer))
        end = b"\r\n" if self.keep_alive else _CLOSE
        body = b"" if self.method == "HEAD" else content
        protocol.answer(self, b"%bcontent-length: %d\r\n%b%b" % (start, len(content), end, body))
        accepted.observe(protocol.active - self.started)

    def set_exception(self, problem: Problem) -> None:
        """Answer with an error."""
        protocol, method = self.protocol, self.method
        response = problem.response(self.headers)
        status = response.status_code
        head = _head(status, [*protocol.server_state.default_headers, *response.raw_headers])
        end = b"\r\n" if self.keep_alive else _CLOSE
        body = b"" if method == "HEAD" else bytes(response.body)
        protocol.answer(self, head + end + body)
        seconds = protocol.active - self.started
        metrics.observe(method, self.route, status, seconds)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logs.answered(logging.WARNING, method, self.path, status, seconds, self.headers)


class Write(Exchange):
    """``POST /pixel``; its subject is the pixel."""

    __slots__ = ()

    method, route = "POST", "/pixel"
    accepted = _Accepted(method, route, (b"content-type", b"application/json"))

    def content(self, _: EventId) -> bytes:
        """The acknowledgement, which repeats the pixel."""
        return _encode(Received("ok", self.subject))


class CountedWrite(Write):
    """``POST /pixel`` of a writer that has a budget."""

    __slots__ = ("writer",)


class Read(Exchange):
    """``GET /pixel/{x}/{y}``; its subject is x and y."""

    __slots__ = ()

    method, route = "GET", "/pixel/{x}/{y}"
    accepted = _Accepted(
        method, route, (b"content-type", b"application/json"), (b"cache-control", b"no-store")
    )

    @property
    def path(self) -> str:
        """The requested path."""
        return self.route.format(x=self.subject[0], y=self.subject[1])

    def content(self, colour: Colour) -> bytes:
        """The pixel and its colour."""
        x, y = self.subject
        return _encode(PixelColour(x, y, *colour))


class Head(Read):
    """``HEAD /pixel/{x}/{y}``."""

    __slots__ = ()

    method = "HEAD"
    accepted = _Accepted(method, Read.route, *Read.accepted.headers)


class Stream(Exchange):
    """``GET /events``; its subject is the event to resume from and the region, either may be None."""

    __slots__ = ("viewer",)

    viewer: Viewer

    method, route = "GET", "/events"
    # The connection ends the body: without chunks, all streams can be sent the same bytes.
    accepted = _Accepted(
        method,
        route,
        *((name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()),
        (b"connection", b"close"),
    )


class PixelProtocol(HttpToolsProtocol):
    """One connection.

    Compared with Uvicorn's class it creates no scope on the fast path, and has one timer per
    connection instead of one per request.
    """

    app_state: State  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: bytes | None = None
        self._stream: Stream | None = None
        self.active = 0.0
        """When the last data came, or the last answer was sent."""
        # At level debug, MetricsMiddleware logs every answer, so there is no fast path.
        self._short = not log.isEnabledFor(logging.DEBUG)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()
        if self._stream:
            self.app_state["hub"].remove(self._stream.viewer)
            Stream.accepted.observe(perf_counter() - self._stream.started)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stream:
            self.app_state["hub"].pause(self._stream.viewer)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stream:
            self.app_state["hub"].resume(self._stream.viewer)

    def data_received(self, data: bytes) -> None:
        self.active = perf_counter()
        HttpToolsProtocol.data_received(self, data)  # super() would cost as much as a callback of the parser
        if self._held is not None and not self.transport.is_closing():
            self._hand_on()

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        method = parser.get_method()
        if (
            self._short
            and (
                self.url == b"/pixel"
                if method == b"POST"
                else method in _READING and self.url.startswith(_READABLE)
            )
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
        held = self._held
        if held is None or not (self._write(held) if self.url == b"/pixel" else self._serve()):
            super().on_message_complete()

    def _hand_on(self) -> None:
        """Pass the request on to Uvicorn, with the parts that have arrived."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)  # also handles the header Expect
        super().on_headers_complete()
        if self._held:
            super().on_body(self._held)
        self._held = None

    def _write(self, body: bytes) -> bool:
        """Start a write; pass the request on to Uvicorn if this fails."""
        state = self.app_state
        try:
            headers = check_headers(self.headers)
            writer = state["access"].writer(headers, self.client, "paint")
            check_size(body, state["settings"].body_limit)
            pixel = state["reader"].pixel(body)
            store = state["store"]
            begin_by = store.start_limit.begin_by(headers.get(STAMP))
            if writer is None or writer.budget is None:
                exchange = Write(pixel, self)
            else:
                exchange = CountedWrite(pixel, self)
                exchange.writer = writer
            store.submit(exchange, (pixel.change(),), begin_by, writer)
        except Exception:
            self._hand_on()
            return False
        return self._keep(exchange)

    def _serve(self) -> bool:
        """Start to read a pixel or a stream; pass other requests on to Uvicorn."""
        state = self.app_state
        store, hub, access = state["store"], state["hub"], state["access"]
        if state["gate"].refuses_reads:
            self._hand_on()
            return False
        if access.is_private:
            try:
                access.check_reader(dict(self.headers))
            except Problem:
                self._hand_on()
                return False
        get = self.parser.get_method() == b"GET"
        if (pixel := _PIXEL.fullmatch(self.url)) and store.canvas.contains(
            x := int(pixel[1]), y := int(pixel[2])
        ):
            read = (Read if get else Head)((x, y), self)
            store.read(read, x, y)
            return self._keep(read)
        if get and (events := _EVENTS.fullmatch(self.url)):
            *place, after = events.groups()
            region = Region(*map(int, place)) if events[1] else None
            if region is None or store.canvas.has(region):
                known = known_event(dict(self.headers).get(b"last-event-id") or after or b"")
                stream = Stream((known, region), self)
                hub.prepare().add_done_callback(partial(self._open, stream))
                return self._keep(stream)
        self._hand_on()
        return False

    def _keep(self, exchange: Exchange) -> bool:
        """Keep an exchange in place of a cycle; returns True."""
        self._held = None
        self.cycle = exchange  # type: ignore[assignment]
        return True

    def _open(self, stream: Stream, prepared: asyncio.Future[None]) -> None:
        problem = prepared.exception()
        if problem is not None:
            assert isinstance(problem, Problem)
            stream.set_exception(problem)
        elif not stream.disconnected:
            self.transport.set_write_buffer_limits(QUEUE_BYTES, 0)
            self.transport.write(stream.accepted.head(self.server_state.default_headers) + b"\r\n")
            known, region = stream.subject
            stream.viewer = Viewer(self.transport.write, self._end, region)
            self._stream = stream
            self.app_state["hub"].open(stream.viewer, known)

    def _end(self) -> None:
        """End a stream. A client that has not received everything reconnects and resumes."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def answer(self, exchange: Exchange, answer: bytes) -> None:
        """Send the answer of an exchange."""
        exchange.response_complete = True
        if not exchange.disconnected:
            self.transport.write(answer)
            if not exchange.keep_alive:
                self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self.active = perf_counter()
        if self.pipeline or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1
            if self.flow.read_paused:
                self.flow.resume_reading()

    def _unset_keepalive_if_required(self) -> None:
        """Keep the timer: when it fires, it checks whether the connection was idle."""

    def timeout_keep_alive_handler(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        rest = self.timeout_keep_alive - (0 if busy else perf_counter() - self.active)
        if rest > 0:
            again = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(rest, again)
        else:
            super().timeout_keep_alive_handler()


def _head(status: int, headers: Headers) -> bytes:
    return STATUS_LINE[status] + b"".join(b"%b: %b\r\n" % header for header in headers)


def _lines(fields: dict[str, str]) -> bytes:
    return "".join([f"{name.lower()}: {value}\r\n" for name, value in fields.items()]).encode()
