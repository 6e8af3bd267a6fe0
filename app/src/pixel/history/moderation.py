"""What moderators ask of the history: who painted, with addresses, and undo.

An undo may take minutes. A request does a part of it, strip by strip, and its answer says where the next
one goes on. So it needs no state between requests, and another host can continue it.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from pixel import moderation, openapi
from pixel.canvas import CHANNELS, Canvas
from pixel.cluster import Redis
from pixel.history import queries
from pixel.history.parameters import Area, Period, Slots, moment, show_time, wanted_area
from pixel.history.undo import Outcome, Undo
from pixel.maintenance import Maintenance
from pixel.names import MAINTENANCE
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.requests import decode_body, find_moderator, json_response, read_json, state_of
from pixel.resp import Connection, ReplyError
from pixel.settings import Settings

UNDO_SECONDS = 2.0
"""Seconds after which a request begins no further strip."""

UNDO_CELLS = 20_000
"""Cells after which a request that lists them begins no further strip; a strip has 12,288 at most."""

UNDOS, UNDOS_WAITING = 1, 2
"""Undos at the same time, and those that wait."""

BODY_LIMIT = 8192
"""Most bytes of a request to undo."""


class Painter(msgspec.Struct, frozen=True):
    """An author, null if unknown, and the number, the first and the last of their changes."""

    author: str | None
    changes: int
    first: str
    last: str


class Painters(msgspec.Struct, frozen=True):
    """Authors, the busiest first. Changes before ``examined``, if it isn't null, were not examined."""

    authors: list[Painter]
    examined: str | None


Moment = Annotated[str, msgspec.Meta(max_length=40, extra_json_schema={"format": "date-time"})]
Cell = Annotated[list[int | str], msgspec.Meta(min_length=4, max_length=4)]
"""x, y, channel and value."""


class WantedUndo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Changes to undo: by authors, in an area and in a time. ``after`` is ``next`` of the part before."""

    authors: (
        Annotated[list[Annotated[str, msgspec.Meta(max_length=100)]], msgspec.Meta(max_length=20)] | None
    ) = None
    area: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,5}(,[0-9]{1,5}){3}$")] | None = None
    since: Moment | None = None
    until: Moment | None = None
    apply: bool = False
    cells: bool = False
    after: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class Undone(msgspec.Struct, frozen=True):
    """What a part of an undo changed, or would change without ``apply``.

    ``since``, ``until`` and ``author`` select these changes, to undo them. ``next`` is the ``after`` of the
    next part, null if this was the last one.
    """

    applied: bool
    changed: int
    equal: int
    painted_over: int
    unknown: int
    busy: int
    author: str
    since: str
    until: str
    cells: list[Cell] | None
    next: int | None


PAINTERS = {
    "authors": [
        {
            "author": "addr:192.0.2.7",
            "changes": 1200,
            "first": "2026-11-21T02:31:38.442Z",
            "last": "2026-11-21T02:40:02.107Z",
        }
    ],
    "examined": None,
}
WANTED_UNDO = {
    "authors": ["addr:192.0.2.7"],
    "area": "0,0,64,64",
    "since": "2026-11-21T02:00:00Z",
    "apply": True,
}
UNDONE = {
    "applied": True,
    "changed": 1100,
    "equal": 20,
    "painted_over": 80,
    "unknown": 0,
    "busy": 0,
    "author": "key:mod",
    "since": "2026-11-21T02:45:00.000Z",
    "until": "2026-11-21T02:45:01.210Z",
    "cells": None,
    "next": None,
}


def create_router(path: Path, questions: Slots) -> APIRouter:
    """The routes, for the history in this file; ``questions`` bounds those that only read."""
    router = APIRouter(tags=[openapi.MODERATION])
    undos = Slots(UNDOS, UNDOS_WAITING)

    @router.get(
        "/history/authors",
        responses=openapi.answer(Painters, PAINTERS) | openapi.problems(401, 403, 422, 503),
    )
    async def history_authors(request: Request, period: Period, area: Area = None) -> Response:
        """The authors of the newest 100,000 changes in a time that are in an area, with their addresses."""
        find_moderator(request)
        selection = queries.Selection(wanted_area(area, state_of(request)["store"].canvas), None, *period)
        async with questions.slot():
            painters, examined = await run_in_threadpool(lambda: queries.painters(path, selection))
        authors = [
            Painter(one.author, one.changes, show_time(one.first), show_time(one.last)) for one in painters
        ]
        return json_response(Painters(authors, None if examined is None else show_time(examined)))

    @router.post(
        "/history/undo",
        openapi_extra=openapi.body(WantedUndo, WANTED_UNDO),
        responses=openapi.answer(Undone, UNDONE) | openapi.problems(400, 401, 403, 408, 413, 415, 422, 503),
    )
    async def undo(request: Request) -> Response:
        """Undo changes, or count them; a request takes about two seconds, and ``next`` goes on.

        Only cells that still show what is being undone change. The changes are recorded with the moderator
        as their author, so an undo can be undone.
        """
        author = find_moderator(request)
        state = state_of(request)
        wanted = decode_body(await read_json(request.scope, request.receive, BODY_LIMIT), WantedUndo)
        selection = _selection(wanted, state["store"].canvas)
        async with undos.slot():
            try:
                done = await _undo(path, state["settings"], selection, author, wanted)
            except (OSError, ReplyError) as error:
                raise Problem.unavailable("Redis doesn't answer, or refuses", "maybe") from error
        return json_response(done)

    return router


def _selection(wanted: WantedUndo, canvas: Canvas) -> queries.Selection:
    """The changes to undo. Raises a 422 ``Problem``."""
    times = []
    for name, text in (("since", wanted.since), ("until", wanted.until)):
        try:
            times.append(moment(text))
        except (ValueError, OverflowError):
            raise Problem.invalid(name, "must be a time, as in 2026-11-21T02:31:38Z") from None
    selection = queries.Selection(wanted_area(wanted.area, canvas), wanted.authors, *times)
    if selection == queries.Selection():
        raise Problem.invalid("the body", "must select changes by authors, area, since or until")
    return selection


async def _undo(
    path: Path, settings: Settings, selection: queries.Selection, author: str, wanted: WantedUndo
) -> Undone:
    """Undo a part of the selected changes. Raises a 503 ``Problem`` during maintenance."""
    redis = Redis(settings)
    async with asyncio.timeout(moderation.TIMEOUT):
        connection = await redis.open(Connection)
    try:
        async with asyncio.timeout(moderation.TIMEOUT):
            maintenance, since = await connection.ask(("GET", MAINTENANCE), ("TIME",))
            if wanted.apply:
                state = Maintenance.decode(maintenance)
                if state.refuses("POST"):
                    raise state.problem("POST")
                if wanted.after == 0:
                    selected = {name: getattr(wanted, name) for name in ("authors", "area", "since", "until")}
                    await connection.ask(moderation.record(author, "undo", selected))
        canvas = Canvas(settings.canvas_width, settings.canvas_height)
        undo = Undo(path, connection, canvas, selection, author, settings.events_maxlen)
        outcome, values = Outcome(), list[Change]()
        end = monotonic() + UNDO_SECONDS
        strips, following = wanted.after, None
        async with aclosing(undo.parts(apply=wanted.apply, start=wanted.after)) as parts:
            async for part in parts:
                outcome += part.outcome
                strips += 1
                if wanted.cells:
                    values += part.values
                if monotonic() > end or len(values) > UNDO_CELLS:
                    following = strips
                    break
        async with asyncio.timeout(moderation.TIMEOUT):
            [until] = await connection.ask(("TIME",))
        if wanted.apply:
            await redis.confirm(connection)
        return Undone(
            applied=wanted.apply,
            **msgspec.structs.asdict(outcome),
            author=author,
            since=show_time(_milliseconds(since)),
            until=show_time(_milliseconds(until) + 1),
            cells=[[x, y, CHANNELS[channel], value] for x, y, channel, value in values]
            if wanted.cells
            else None,
            next=following,
        )
    finally:
        connection.close()


def _milliseconds(time: Sequence[bytes]) -> int:
    """The reply to TIME."""
    return int(time[0]) * 1000 + int(time[1]) // 1000
