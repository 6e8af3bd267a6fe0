"""Writing and reading pixels."""

from contextlib import nullcontext
from http import HTTPStatus
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import WithJsonSchema

from pixel import openapi
from pixel.budgets import Writer
from pixel.pixel import Batch, Change, Colour, Pixel, PixelColour, Received, Written
from pixel.problems import Problem
from pixel.requests import (
    State,
    admit,
    begin_by,
    check_reader,
    find_writer,
    json_response,
    read_json,
    state_of,
)
from pixel.stream import EventId

router = APIRouter(tags=["pixels"], dependencies=[Depends(admit)])

BATCH_LIMIT = 1024 * 1024
"""Most bytes in a ``POST /pixels``: 10,000 pixels with spaces, in a canvas of any size."""

LARGE = 64 * 1024
"""Bytes from which a batch waits for its turn: other writes then wait for one such batch at most."""

LARGE_WAITING = 4
"""Most large batches that wait; the last one's turn comes before it is too late for it to begin."""

PIXEL = {"x": 10, "y": 20, "channel": "R", "value": 255}
COLOUR = {"R": 255, "G": 128, "B": 0}
WRITE_PROBLEMS = openapi.problems(400, 401, 403, 408, 413, 415, 422, 429, 503)

Coordinate = Annotated[str, Path(pattern="^[0-9]{1,5}$"), WithJsonSchema({"type": "integer", "minimum": 0})]


@router.post(
    "/pixel",
    openapi_extra=openapi.body(Pixel, PIXEL),
    responses=openapi.answer(Received, {"status": "ok", "received": PIXEL}, budget=True) | WRITE_PROBLEMS,
)
async def post_pixel(request: Request) -> Response:
    """Set one channel of a pixel; answered when Redis has acknowledged the write."""
    # ``protocol`` answers most of these requests in the same way.
    state = state_of(request)
    writer = find_writer(request, "paint")
    body = await read_json(request.scope, request.receive, state["settings"].body_limit)
    pixel = state["reader"].pixel(body)
    await state["store"].write((pixel.change(),), await begin_by(request), writer)
    return json_response(Received("ok", pixel), state["store"].budgets.fields(writer))


@router.get(
    "/pixel/{x}/{y}",
    dependencies=[Depends(check_reader)],
    responses=openapi.answer(PixelColour, {"x": 10, "y": 20} | COLOUR) | openapi.problems(401, 404, 503),
)
async def get_pixel(request: Request, x: Coordinate, y: Coordinate) -> Response:
    """The three channels of a pixel; black if it was never written."""
    state = state_of(request)
    cell = _cell(state, x, y)
    return json_response(PixelColour(*cell, *await state["store"].colour(*cell)))


@router.put(
    "/pixel/{x}/{y}",
    openapi_extra=openapi.body(Colour, COLOUR),
    responses=openapi.answer(PixelColour, {"x": 10, "y": 20} | COLOUR, event=True, budget=True)
    | openapi.problems(404)
    | WRITE_PROBLEMS,
)
async def put_pixel(request: Request, x: Coordinate, y: Coordinate) -> Response:
    """Set the three channels of a pixel at once."""
    state = state_of(request)
    writer = find_writer(request, "paint")
    cell = _cell(state, x, y)
    body = await read_json(request.scope, request.receive, state["settings"].body_limit)
    colour = msgspec.structs.astuple(state["reader"].colour(body))
    changes = [Change(*cell, *channel) for channel in enumerate(colour)]
    event = await state["store"].write(changes, await begin_by(request), writer)
    return json_response(PixelColour(*cell, *colour), _headers(state, event, writer))


@router.post(
    "/pixels",
    openapi_extra=openapi.body(Batch, [PIXEL, PIXEL | {"channel": "G", "value": 128}]),
    responses=openapi.answer(Written, {"status": "ok", "written": 2}, event=True, budget=True)
    | WRITE_PROBLEMS,
)
async def post_pixels(request: Request) -> Response:
    """Set up to 10,000 channels, in their order: all of them or none."""
    state = state_of(request)
    writer = find_writer(request, "batch")
    body = await read_json(request.scope, request.receive, BATCH_LIMIT)
    deadline = await begin_by(request)
    async with state["large_batches"] if len(body) >= LARGE else nullcontext():
        pixels = state["reader"].pixels(body)
        event = await state["store"].write([pixel.change() for pixel in pixels], deadline, writer)
    return json_response(Written("ok", len(pixels)), _headers(state, event, writer))


def _headers(state: State, event: EventId, writer: Writer | None) -> dict[str, str]:
    return {"X-Pixel-Event": event.text().decode()} | state["store"].budgets.fields(writer)


def _cell(state: State, x: str, y: str) -> tuple[int, int]:
    cell = int(x), int(y)
    if not state["store"].canvas.contains(*cell):
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such pixel.")
    return cell
