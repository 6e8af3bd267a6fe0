"""Common parts of all routes: the application's state, request bodies, JSON answers."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import TypedDict, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from pixel import metrics
from pixel.access import Access
from pixel.budgets import Writer
from pixel.events import Hub
from pixel.keys import KeyScope
from pixel.lifetime import MustWaitError, UnknownClockError, UnknownPausesError
from pixel.maintenance import Gate
from pixel.pictures import PictureCache
from pixel.pixel import Reader
from pixel.problems import STAMP, Headers, Problem, Refusal
from pixel.settings import Settings
from pixel.store import Store

T = TypeVar("T")

BODY_SECONDS = 10.0
"""Seconds in which the rest of a body must arrive after the first part."""

_LONGEST_PAUSE = 0.1  # seconds: Redis may have been slow

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
"""Headers of an event stream."""


class Turns:
    """Processes large requests one at a time, and refuses them when too many wait.

    After each, there is a pause as long as it took, in which small requests have the worker.

    Args:
        waiting: largest number of waiting requests.
    """

    def __init__(self, waiting: int) -> None:
        self._most = waiting + 1
        self._present = 0
        self._lock = asyncio.Lock()
        self._since = 0.0

    async def __aenter__(self) -> None:
        """Wait for the turn. Raises a 503 ``Problem`` if too many wait."""
        if self._present == self._most:
            raise Problem.unavailable("Too many large requests are waiting", "no")
        self._present += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self._present -= 1
            raise
        self._since = asyncio.get_running_loop().time()

    async def __aexit__(self, *_: object) -> None:
        self._present -= 1
        loop = asyncio.get_running_loop()
        loop.call_later(min(loop.time() - self._since, _LONGEST_PAUSE), self._lock.release)


class State(TypedDict):
    """The state that the application's lifespan creates for all requests."""

    settings: Settings
    store: Store
    access: Access
    reader: Reader
    pictures: PictureCache
    hub: Hub
    large_batches: Turns
    gate: Gate


def state_of(request: Request) -> State:
    """The application's state."""
    state: State = request.scope["state"]
    return state


async def admit(request: Request) -> None:
    """Raise a ``Problem`` (503) if maintenance forbids a request for the canvas."""
    state_of(request)["gate"].check(request.method)


def json_response(content: object, headers: Mapping[str, str] | None = None) -> Response:
    """A 200 with JSON."""
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")


def find_writer(request: Request, scope: KeyScope) -> Writer | None:
    """Who sends this request (``Access.writer``). Raises a ``Problem`` (401, 403, 503)."""
    headers, peer = dict(request.scope["headers"]), request.scope["client"]
    try:
        return state_of(request)["access"].writer(headers, peer, scope)
    except Refusal as refusal:
        refusal.written = "no"
        raise


def find_moderator(request: Request) -> str:
    """The author name of the moderator who sends this request. Raises a ``Problem`` (401, 403, 503)."""
    writer = state_of(request)["access"].writer(dict(request.scope["headers"]), None, "moderate")
    assert writer is not None
    return writer.author


async def check_reader(request: Request) -> None:
    """Raise a ``Problem`` (401, 503) unless the client may read; a dependency of routes."""
    state_of(request)["access"].check_reader(dict(request.scope["headers"]))


def is_known(tag: str, known: str) -> bool:
    """Whether an ``If-None-Match`` header names an ETag."""
    return matches_any(known) or any(text.strip().removeprefix("W/") == tag for text in known.split(","))


def matches_any(known: str) -> bool:
    """Whether an ``If-None-Match`` header is ``*``, which every ETag matches."""
    return known.strip() == "*"


async def read_json(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body of a JSON request, of ``limit`` bytes at most.

    Raises a ``Problem`` (408, 413, 415), or ClientDisconnect.
    """
    check_headers(scope["headers"])
    body, more = _part(await receive())
    if more:
        body = await _read_rest(receive, body, limit)
    check_size(body, limit)
    return body


def decode_body(body: bytes, kind: type[T]) -> T:
    """A JSON body as a msgspec type. Raises a ``Problem`` (400, 422).

    For the requests of moderators. Pixels have ``pixel.Reader``, which is stricter and explains more.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `$.")
        raise Problem.invalid(field.rstrip("`") or "the body", f"is invalid: {reason}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"The body is not JSON: {error}.") from None


async def begin_by(request: Request) -> float:
    """The time until which a write may begin (``StartLimit.begin_by``); delays a retry that must wait.

    Raises a ``Problem`` (503) if the request is too late.
    """
    start_limit = state_of(request)["store"].start_limit
    stamp = dict(request.scope["headers"]).get(STAMP)
    waited = 0.0
    while True:
        try:
            return start_limit.begin_by(stamp, waited)
        except UnknownClockError as error:
            await start_limit.measure(error.balancer)
        except UnknownPausesError as error:
            await start_limit.read_pauses(error.balancer)
        except MustWaitError:
            waited = start_limit.wait
            await asyncio.sleep(waited)
        except Problem:
            metrics.LATE_WRITES.inc()
            raise


def check_headers(headers: Headers) -> Mapping[bytes, bytes]:
    """Raise a ``Problem`` (415) unless the body is JSON, and not encoded; returns the headers by name."""
    given = dict(headers)
    # The header may be repeated.
    if b"content-encoding" in given and any(
        value.strip().lower() != b"identity" for name, value in headers if name == b"content-encoding"
    ):
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "The body must be sent without a Content-Encoding.",
            headers={"Accept-Encoding": "identity"},
        )
    content_type = given.get(b"content-type", b"")
    if (
        content_type != b"application/json"
        and content_type.partition(b";")[0].strip().lower() != b"application/json"
    ):
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be sent as application/json.")
    return given


def check_size(body: bytes, limit: int) -> None:
    """Raise a ``Problem`` (413) if a body is larger than ``limit`` bytes."""
    if len(body) > limit:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {limit} bytes.")


async def _read_rest(receive: Receive, body: bytes, limit: int) -> bytes:
    more = True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and len(body) <= limit:
                part, more = _part(await receive())
                body += part
    except TimeoutError:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "The body took too long to arrive.") from None
    return body


def _part(message: Message) -> tuple[bytes, bool]:
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)
