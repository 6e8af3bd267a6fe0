"""Geometry of the canvas: where a pixel is stored.

The canvas is stored in tiles of 256x256 pixels, rows from the top, three bytes (R, G, B) a pixel.
A tile at the edge of the canvas is as large as any other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

from PIL import Image

from pixel.names import tile_key

TILE = 256
"""Width and height of a tile, in pixels."""

TILE_BYTES = TILE * TILE * 3

Channel = Literal["R", "G", "B"]
CHANNELS: tuple[Channel, ...] = ("R", "G", "B")

_AREA = re.compile(r"[0-9]{1,5}(,[0-9]{1,5}){3}")


def locate(x: int, y: int) -> tuple[str, int]:
    """The key of the tile that contains a pixel, and the offset of the pixel's R byte in it."""
    return tile_key(x // TILE, y // TILE), (y % TILE * TILE + x % TILE) * 3


class Region(NamedTuple):
    """A rectangle of ``w`` x ``h`` pixels with the upper left one at ``x``, ``y``."""

    x: int
    y: int
    w: int
    h: int

    def tile_keys(self) -> list[str]:
        """The keys of the tiles that the region overlaps, row by row."""
        return [tile_key(column, row) for column, row in self._tiles()]

    def assemble(self, tiles: Sequence[bytes | None]) -> bytes:
        """The region's pixels, row by row, from its tiles; black where a tile doesn't exist."""
        raw = bytearray(self.w * self.h * 3)
        for (column, row), tile in zip(self._tiles(), tiles, strict=True):
            if tile is None:
                continue
            source = memoryview(tile.ljust(TILE_BYTES, b"\0"))
            left, right = max(self.x, column * TILE), min(self.x + self.w, (column + 1) * TILE)
            top, bottom = max(self.y, row * TILE), min(self.y + self.h, (row + 1) * TILE)
            length = (right - left) * 3
            for y in range(top, bottom):
                start = ((y - self.y) * self.w + left - self.x) * 3
                place = (y % TILE * TILE + left % TILE) * 3
                raw[start : start + length] = source[place : place + length]
        return bytes(raw)

    def _tiles(self) -> list[tuple[int, int]]:
        columns = range(self.x // TILE, (self.x + self.w - 1) // TILE + 1)
        rows = range(self.y // TILE, (self.y + self.h - 1) // TILE + 1)
        return [(column, row) for row in rows for column in columns]


@dataclass(frozen=True, slots=True)
class Canvas:
    """A canvas of ``width`` x ``height`` pixels; x runs to the right, y runs down, from 0."""

    width: int
    height: int

    def contains(self, x: int, y: int) -> bool:
        """Whether a pixel is on the canvas."""
        return 0 <= x < self.width and 0 <= y < self.height

    def has(self, region: Region) -> bool:
        """Whether a region has pixels, and all of them are on the canvas."""
        x, y, w, h = region
        return w > 0 and h > 0 and 0 <= x <= self.width - w and 0 <= y <= self.height - h

    def parse_area(self, text: str) -> Region:
        """A region as in 0,0,16,16: x, y, width, height. Raises ValueError."""
        if not _AREA.fullmatch(text):
            raise ValueError("must be x,y,width,height, as in 0,0,16,16")
        region = Region(*map(int, text.split(",")))
        if not self.has(region):
            raise ValueError(f"must be a part of the canvas, which has {self.width}x{self.height} pixels")
        return region


def encode_png(raw: bytes, width: int, height: int, scale: int) -> bytes:
    """A PNG of raw pixels, each drawn as a square of ``scale`` x ``scale``."""
    image = Image.frombytes("RGB", (width, height), raw)
    if scale > 1:
        image = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    file = BytesIO()
    # Level 4 takes 20 ms and 280 kB for a busy megapixel; level 6 takes twice as long and saves a twentieth.
    # An enlarged picture is the most that one request can cost: level 1 takes two thirds of its time.
    image.save(file, "PNG", compress_level=1 if scale > 1 else 4)
    return file.getvalue()
