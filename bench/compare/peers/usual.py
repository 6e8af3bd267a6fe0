"""A typical service: FastAPI and one awaited redis-py command for each request."""

from __future__ import annotations

import os
from typing import Annotated, cast

from fastapi import Body, FastAPI, Path
from redis.asyncio import Redis

from model import Pixel, Stored

CANVAS = "canvas"
WIDTH = 1024

app = FastAPI()
redis = Redis.from_url(os.environ["BENCH_REDIS_URL"], max_connections=512)

Coordinate = Annotated[int, Path(ge=0, lt=WIDTH)]


def offset(x: int, y: int, channel: str = "R") -> int:
    return (y * WIDTH + x) * 3 + "RGB".index(channel)


@app.post("/pixel")
async def write_pixel(pixel: Pixel) -> Stored:
    await redis.setrange(CANVAS, offset(pixel.x, pixel.y, pixel.channel), bytes([pixel.value]))
    return Stored(received=pixel)


@app.post("/pixels")
async def write_pixels(
    pixels: Annotated[list[Pixel], Body(max_length=10_000)],
) -> dict[str, str | int]:
    async with redis.pipeline(transaction=False) as pipeline:
        for pixel in pixels:
            pipeline.setrange(CANVAS, offset(pixel.x, pixel.y, pixel.channel), bytes([pixel.value]))
        await pipeline.execute()
    return {"status": "ok", "written": len(pixels)}


@app.get("/pixel/{x}/{y}")
async def read_pixel(x: Coordinate, y: Coordinate) -> dict[str, int]:
    at = offset(x, y)
    stored = cast(bytes, await redis.getrange(CANVAS, at, at + 2))
    red, green, blue = stored.ljust(3, b"\0")
    return {"x": x, "y": y, "R": red, "G": green, "B": blue}
