"""Reads the canvas, so that a ledger can be checked against it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace

from bench.load.http1 import BadAnswerError, Client, Target
from bench.load.ledger import CHANNELS

READERS = 16
UNREACHABLE = (OSError, TimeoutError, BadAnswerError)


class UnreadableError(Exception):
    """The canvas cannot be read."""


async def read_canvas(target: Target, width: int, height: int, cells: Iterable[tuple[int, int]]) -> bytes:
    """Returns the canvas as raw RGB bytes; without a /canvas.rgb, only `cells` are read."""
    # Bypass caches, whose pictures may be some seconds old.
    with closing(Client(replace(target, headers=[*target.headers, "Cache-Control: no-cache"]))) as client:
        answer = await client.get("/canvas.rgb")
    if answer.status == 404:
        return await _read_cells(target, width, height, cells)
    if answer.status != 200:
        raise UnreadableError(f"/canvas.rgb answered {answer.status}: {answer.body[:200]!r}")
    wanted = width * height * len(CHANNELS)
    if len(answer.body) != wanted:
        raise UnreadableError(
            f"/canvas.rgb has {len(answer.body)} bytes; {width}x{height} pixels are {wanted}:"
            " name the canvas with --canvas WIDTHxHEIGHT"
        )
    return answer.body


async def _read_cells(target: Target, width: int, height: int, cells: Iterable[tuple[int, int]]) -> bytes:
    """Returns a canvas with these cells, read with several connections; other cells are black."""
    canvas = bytearray(width * height * len(CHANNELS))
    queue = iter(cells)

    async def reader() -> None:
        with closing(Client(target)) as client:
            for x, y in queue:
                at = (y * width + x) * len(CHANNELS)
                canvas[at : at + len(CHANNELS)] = await _read_pixel(client, x, y)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(reader())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return bytes(canvas)


async def _read_pixel(client: Client, x: int, y: int) -> bytes:
    path = f"/pixel/{x}/{y}"
    answer = await client.get(path)
    try:
        pixel = json.loads(answer.body)
        return bytes(pixel[channel] for channel in CHANNELS)
    except (ValueError, KeyError, TypeError):
        raise UnreadableError(
            f"{path} answered {answer.status}: {answer.body[:200]!r};"
            " a service without reads needs --no-verify"
        ) from None
