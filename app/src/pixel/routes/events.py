"""Changes of the canvas as server-sent events."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse

from pixel import openapi
from pixel.requests import STREAM_HEADERS, admit, check_reader, state_of
from pixel.routes.canvas import WantedRegion
from pixel.stream import EVENT_PATTERN, known_event

router = APIRouter(tags=["canvas"], dependencies=[Depends(admit), Depends(check_reader)])

_STREAM = {
    "description": "OK",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": 'id: 1795225898442-0\ndata: [[10,20,"R",255]]\n\n',
        }
    },
}


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses=openapi.problems(401, 422, 503) | {200: _STREAM},
)
async def events(
    request: Request,
    region: WantedRegion,
    after: Annotated[
        str | None,
        Query(
            pattern=f"^{EVENT_PATTERN}$",
            description="X-Pixel-Event of the viewer's canvas.",
        ),
    ] = None,
    last_event_id: Annotated[
        str | None,
        Header(description="Sent by browsers to resume; takes precedence over ``after``."),
    ] = None,
) -> StreamingResponse:
    """Changes after an event, or from now on: arrays of ``[x, y, channel, value]``.

    With ``x``, ``y``, ``w`` or ``h`` those of a part of the canvas only. A worker at which over 128
    different parts are watched sends the others all changes.

    The ``id`` of a message is the last event that it contains. Changes of 50 ms (up to 500 ms with
    thousands of viewers) are sent together, at most 4,096 in a message. The event ``resync`` means that
    changes were left out, because ``after`` is too old or there were too many: fetch the canvas with
    its ``id`` as ``after``, and continue after its ``X-Pixel-Event``. The event ``status`` is sent
    every two seconds, for all of the canvas without an id: ``{"viewers": 12, "writes": 480.5,
    "instance": "c5", "release": "2026-11-21", "maintenance": null}``: viewers and channel writes per
    second of the fleet, null while Redis can't be asked, the instance and release that send the stream,
    and the message of a maintenance in progress.
    """
    # Most requests are answered in ``protocol``, which does the same.
    hub = state_of(request)["hub"]
    await asyncio.shield(hub.prepare())
    known = known_event((last_event_id or after or "").encode())
    return StreamingResponse(hub.stream(known, region), headers=STREAM_HEADERS)
