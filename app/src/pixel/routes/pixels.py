"""Writing and reading of pixels."""

from http import HTTPStatus
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Request, Response
from pydantic import WithJsonSchema
from starlette.types import Receive, Scope

from pixel.canvas import CHANNELS
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.requests import State, read_json, state_of
from pixel.settings import MAX_SIDE

router = APIRouter(tags=["pixels"])

BATCH_LIMIT = 1024 * 1024
"""Bytes of a ``POST /pixels``: 10,000 pixels, with spaces, in canvases of any size."""


async def write_pixel(scope: Scope, receive: Receive) -> bytes:
    """Do what ``POST /pixel`` asks for; returns the body of the answer.

    Raises a ``Problem``, or ClientDisconnect.
    """
    state: State = scope["state"]
    body = await read_json(scope, receive, state["settings"].body_limit)
    pixel = state["reader"].pixel(body)
    await state["store"].write((pixel.change(),))
    return b'{"status":"ok","received":%b}' % msgspec.json.encode(pixel)


@router.post("/pixel")
async def post_pixel(request: Request) -> Response:
    """Set one channel of a pixel. The answer comes when Redis has acknowledged the write."""
    body = await write_pixel(request.scope, request.receive)
    return Response(body, media_type="application/json")


Coordinate = Annotated[
    str,
    Path(pattern="^[0-9]{1,5}$"),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": MAX_SIDE - 1}),
]


@router.get("/pixel/{x}/{y}")
async def get_pixel(request: Request, x: Coordinate, y: Coordinate) -> Response:
    """A pixel's three channels; black, if nobody has written to it yet."""
    state = state_of(request)
    cell = _cell(state, x, y)
    return _pixel_response(cell, await state["store"].colour(*cell))


@router.put("/pixel/{x}/{y}")
async def put_pixel(request: Request, x: Coordinate, y: Coordinate) -> Response:
    """Set a pixel's three channels at once."""
    state = state_of(request)
    cell = _cell(state, x, y)
    body = await read_json(request.scope, request.receive, state["settings"].body_limit)
    colour = msgspec.structs.astuple(state["reader"].colour(body))
    await state["store"].write([Change(*cell, *channel) for channel in enumerate(colour)])
    return _pixel_response(cell, colour)


@router.post("/pixels")
async def post_pixels(request: Request) -> Response:
    """Set up to 10,000 channels, in their order: all of them, or none."""
    state = state_of(request)
    body = await read_json(request.scope, request.receive, BATCH_LIMIT)
    pixels = state["reader"].pixels(body)
    await state["store"].write([pixel.change() for pixel in pixels])
    answer = b'{"status":"ok","written":%d}' % len(pixels)
    return Response(answer, media_type="application/json")


def _cell(state: State, x: str, y: str) -> tuple[int, int]:
    cell = int(x), int(y)
    if not state["store"].canvas.contains(*cell):
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such pixel.")
    return cell


def _pixel_response(cell: tuple[int, int], colour: tuple[int, int, int]) -> Response:
    body = msgspec.json.encode(dict(zip(("x", "y", *CHANNELS), (*cell, *colour), strict=True)))
    return Response(body, media_type="application/json")
