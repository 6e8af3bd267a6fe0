"""FastAPI validates the pixel and returns it; nothing is stored."""

from __future__ import annotations

from fastapi import FastAPI

from model import Pixel, Stored

app = FastAPI()


@app.post("/pixel")
async def write_pixel(pixel: Pixel) -> Stored:
    return Stored(received=pixel)
