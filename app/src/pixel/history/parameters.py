"""Common parts of the history's routes and commands: times, parameters, bounds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Query
from pydantic import WithJsonSchema

from pixel.canvas import Canvas, Region
from pixel.problems import Problem


class Slots:
    """Lets a number of questions run at the same time, and refuses them when too many wait."""

    def __init__(self, most: int, waiting: int) -> None:
        self._slots = asyncio.Semaphore(most)
        self._free = most + waiting

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot. Raises a 503 ``Problem`` if too many wait."""
        if self._free == 0:
            raise Problem.unavailable("Too many questions about the history are waiting.")
        self._free -= 1
        try:
            async with self._slots:
                yield
        finally:
            self._free += 1


def moment(text: str | None) -> int | None:
    """Milliseconds of a time as in 2026-11-21T02:31:38Z (UTC without an offset). Raises ValueError."""
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def show_time(milliseconds: int) -> str:
    """The time in milliseconds since the epoch as text, as in 2026-11-21T02:31:38.442Z."""
    time = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[
    str | None,
    Query(max_length=40, description="As in 2026-11-21T02:31:38Z; UTC if it has no offset."),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Area = Annotated[
    str | None,
    Query(max_length=30, description="x,y,width,height"),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]{1,5}(,[0-9]{1,5}){3}$"}),
]


def wanted_area(text: str | None, canvas: Canvas) -> Region | None:
    """The wanted region. Raises a 422 ``Problem``."""
    try:
        return None if text is None else canvas.parse_area(text)
    except ValueError as error:
        raise Problem.invalid("area", str(error)) from None


def wanted_period(since: Time = None, until: Time = None) -> tuple[int | None, int | None]:
    """The wanted time. Raises a 422 ``Problem``."""
    times = []
    for name, text in (("since", since), ("until", until)):
        try:
            times.append(moment(text))
        except (ValueError, OverflowError):
            raise Problem.invalid(name, "must be a time, as in 2026-11-21T02:31:38Z") from None
    return times[0], times[1]


Period = Annotated[tuple[int | None, int | None], Depends(wanted_period)]
