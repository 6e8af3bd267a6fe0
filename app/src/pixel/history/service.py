"""The history over HTTP, beside the follower, in one process.

The answers show names of keys and operators. Addresses of anonymous painters are personal data: the
answers say ``anonymous``; ``python -m pixel.history show`` on the host shows them.
"""

import asyncio
import csv
import io
import logging
import os
import signal
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from time import monotonic
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Query, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from pixel import metrics, openapi
from pixel.access import Access
from pixel.canvas import Canvas, Region
from pixel.cluster import Redis
from pixel.history import queries
from pixel.history.archive import Archive
from pixel.history.follower import Follower
from pixel.history.moderation import create_router
from pixel.history.parameters import Area, Period, Slots, show_time, wanted_area
from pixel.history.settings import HistorySettings
from pixel.link import Link
from pixel.middleware import MetricsMiddleware
from pixel.openapi import DescribedAPI
from pixel.problems import Problem
from pixel.requests import check_reader, json_response
from pixel.routes.health import Health
from pixel.routes.pixels import Coordinate
from pixel.settings import Settings
from pixel.store import Store

MOST = 1000
"""Most changes in one answer."""

QUESTIONS = 4
"""Questions that are answered at the same time: each takes a thread, and up to 0.1 s."""

QUESTIONS_WAITING = 32
"""Questions that wait; the last one waits for about a second."""

EXPORTS = 2
"""Exports at the same time."""

EXPORT_SECONDS = 300.0
"""Longest time of an export, which then ends without gzip's end mark: clients report that."""

ANONYMOUS = "anonymous"

log = logging.getLogger(__name__)


class HistoricChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change. ``author`` is a key, an operator or ``anonymous``, and null if it is unknown."""

    event: str
    time: str
    x: int
    y: int
    channel: str
    value: int
    author: str | None


class Gap(msgspec.Struct, frozen=True):
    """Events after ``after`` that are missing; ``events`` is their number, null if it is unknown."""

    after: str
    events: int | None
    reason: str
    time: str


class HistoryPage(msgspec.Struct, frozen=True):
    """Changes, the newest first. ``next`` is the ``after`` of the next page, null on the last one."""

    changes: list[HistoricChange]
    next: str | None


class HistoryState(msgspec.Struct, frozen=True):
    """What the history contains: number of changes, time of the oldest, gaps, seconds behind the canvas."""

    changes: int
    oldest: str | None
    lag: float
    gaps: list[Gap]


CHANGE = {
    "event": "1795225898442-0",
    "time": "2026-11-21T02:31:38.442Z",
    "x": 10,
    "y": 20,
    "channel": "R",
    "value": 255,
    "author": "key:alice",
}
PAGE = {"changes": [CHANGE], "next": None}

_BINARY = {"type": "string", "format": "binary"}


class _Metrics(Collector):
    """The state of the history, for Prometheus."""

    def __init__(self, settings: HistorySettings, follower: Follower) -> None:
        self._settings, self._follower = settings, follower

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Read the state of the file."""
        state = queries.state(self._settings.path)
        for name, text, value in (
            ("lag_seconds", "Seconds since the history was last up to date.", self._follower.lag),
            ("changes", "Changes in the history.", state.changes),
            ("oldest_timestamp_seconds", "Time of the oldest change.", (state.oldest or 0) / 1000),
            ("bytes", "Size of the content of the history.", state.size),
        ):
            yield GaugeMetricFamily(f"pixel_history_{name}", text, value)
        yield CounterMetricFamily("pixel_history_archived", "Changes archived.", self._follower.changes)
        # The file counts them, so that a restart of the service resets nothing.
        yield CounterMetricFamily("pixel_history_gaps", "Gaps in the history.", state.gaps)


def public(author: str | None) -> str | None:
    """An author as everybody may see it."""
    return ANONYMOUS if author and author.startswith("addr:") else author


def _change(record: queries.Record) -> HistoricChange:
    event, _, x, y, channel, value, author = record
    return HistoricChange(
        event.text().decode(), show_time(event.milliseconds), x, y, channel, value, public(author)
    )


def _page(page: queries.Page) -> Response:
    return json_response(HistoryPage([_change(record) for record in page.records], page.next))


def _csv(export: Iterator[list[queries.Record]]) -> Iterator[bytes]:
    """An export as gzip: a header, then a line for each change."""
    packer = zlib.compressobj(level=4, wbits=zlib.MAX_WBITS | 16)
    end = monotonic() + EXPORT_SECONDS
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("event", "time", "x", "y", "channel", "value", "author"))
    for records in export:
        if monotonic() > end:
            raise TimeoutError("the export took too long")
        writer.writerows(msgspec.structs.astuple(_change(record)) for record in records)
        yield packer.compress(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    yield packer.compress(text.getvalue().encode()) + packer.flush()


Cursor = Annotated[str | None, Query(pattern=queries.CURSOR, description="``next`` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MOST)]


def create_app(settings: Settings, history: HistorySettings) -> ASGIApp:
    """The whole application."""
    return MetricsMiddleware(create_api(settings, history))


def create_api(settings: Settings, history: HistorySettings) -> FastAPI:
    """FastAPI's part of the application. It follows the event stream while it runs."""
    canvas = Canvas(settings.canvas_width, settings.canvas_height)
    questions, exports = Slots(QUESTIONS, QUESTIONS_WAITING), Slots(EXPORTS, 0)
    registry = CollectorRegistry()
    registry.register(metrics.REFUSALS)
    followers: list[Follower] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        store = Store(settings)
        access = Access(store, settings)
        await access.start()
        archive = Archive(history.path)
        link = Link(Redis(settings), settings.redis_timeout)
        follower = Follower(archive, link, Region(0, 0, canvas.width, canvas.height))
        followers.append(follower)
        registry.register(_Metrics(history, follower))
        tasks = [
            asyncio.create_task(follower.run()),
            asyncio.create_task(follower.keep_size(history.days, history.max_mb * 1_000_000)),
        ]
        for task in tasks:
            task.add_done_callback(_end_with)
        yield {"access": access, "store": store, "settings": settings}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        access.close()
        store.close()
        link.close()
        archive.close()

    api = DescribedAPI(
        canvas,
        settings.anonymous,
        title="Pixel Endpoint: history",
        version=settings.release,
        lifespan=lifespan,
    )
    moderation = create_router(history.path, questions)
    api.state.routers = (moderation,)
    api.include_router(moderation)
    reader = [Depends(check_reader)]

    async def ask(question: Callable[[], queries.Page]) -> Response:
        async with questions.slot():
            return _page(await run_in_threadpool(question))

    @api.get(
        "/pixel/{x}/{y}/history",
        tags=["history"],
        dependencies=reader,
        responses=openapi.answer(HistoryPage, PAGE) | openapi.problems(401, 404, 422, 503),
    )
    async def pixel_history(
        x: Coordinate, y: Coordinate, after: Cursor = None, limit: Limit = 100
    ) -> Response:
        """The changes of a pixel, the newest first."""
        if not canvas.contains(int(x), int(y)):
            raise Problem(HTTPStatus.NOT_FOUND, "There is no such pixel.")
        return await ask(lambda: queries.pixel_page(history.path, int(x), int(y), after, limit))

    @api.get(
        "/history",
        tags=["history"],
        dependencies=reader,
        responses=openapi.answer(HistoryPage, PAGE) | openapi.problems(401, 422, 503),
    )
    async def area_history(
        period: Period,
        area: Area = None,
        author: Annotated[str | None, Query(max_length=100, description="As in key:alice.")] = None,
        after: Cursor = None,
        limit: Limit = 100,
    ) -> Response:
        """The changes in an area, by an author and in a time, the newest first.

        A page may have fewer changes than ``limit``, or none, and yet a ``next``: it examines a bounded
        number of changes.
        """
        region = wanted_area(area, canvas)
        if author is not None and public(author) != author:
            raise Problem.invalid("author", "must not be an address; those are known to operators only")
        selection = queries.Selection(region, None if author is None else [author], *period)
        return await ask(lambda: queries.page(history.path, selection, after, limit))

    @api.get(
        "/history/state",
        tags=["history"],
        dependencies=reader,
        responses=openapi.answer(
            HistoryState, {"changes": 1, "oldest": CHANGE["time"], "lag": 0.1, "gaps": []}
        )
        | openapi.problems(401, 503),
    )
    async def history_state() -> Response:
        """What the history contains."""
        async with questions.slot():
            state, gaps = await run_in_threadpool(
                lambda: (queries.state(history.path), queries.gaps(history.path))
            )
        return json_response(
            HistoryState(
                state.changes,
                None if state.oldest is None else show_time(state.oldest),
                round(followers[-1].lag, 3),
                [Gap(gap.after, gap.events, gap.reason, show_time(gap.time)) for gap in gaps],
            )
        )

    @api.get(
        "/history.csv.gz",
        tags=["history"],
        response_class=Response,
        dependencies=reader,
        responses=openapi.problems(401, 422, 503)
        | {200: {"description": "OK", "content": {"application/gzip": {"schema": _BINARY}}}},
    )
    async def history_csv(period: Period) -> StreamingResponse:
        """All changes in a time as compressed CSV, the oldest first."""

        async def content() -> AsyncIterator[bytes]:
            async with exports.slot():
                yield b""
                lines = _csv(queries.export(history.path, *period))
                while (part := await run_in_threadpool(next, lines, None)) is not None:
                    yield part

        parts = content()
        await anext(parts)  # takes the slot
        return StreamingResponse(parts, media_type="application/gzip")

    @api.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return json_response(Health())

    @api.get("/metrics", include_in_schema=False)
    def get_metrics() -> Response:  # not async: it reads the file
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return api


def _end_with(task: asyncio.Task[None]) -> None:
    """End the process with a task that has failed; systemd starts it again."""
    if not task.cancelled() and task.exception():
        log.critical("the history service ends", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)
