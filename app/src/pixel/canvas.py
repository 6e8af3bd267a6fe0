"""The canvas' geometry: the one place that knows where a pixel is kept.

The canvas is kept in tiles of 256x256 pixels, rows from the top, three bytes (R, G, B) a pixel.
A tile that reaches beyond the canvas' edge is as large as any other.
"""

from dataclasses import dataclass
from functools import cache

TILE = 256
"""Width and height of a tile, in pixels."""

TILE_BYTES = TILE * TILE * 3

CHANNELS = ("R", "G", "B")


@cache
def tile_key(column: int, row: int) -> str:
    """The Redis key of a tile. The braces put each tile into a hash slot of its own."""
    return f"pixel:{{{column}:{row}}}"


def locate(x: int, y: int) -> tuple[str, int]:
    """The key of the tile that holds a pixel, and where in it the pixel's R byte is."""
    return tile_key(x // TILE, y // TILE), (y % TILE * TILE + x % TILE) * 3


@dataclass(frozen=True, slots=True)
class Canvas:
    """A canvas of ``width`` x ``height`` pixels; x runs to the right, y runs down, from 0."""

    width: int
    height: int

    def contains(self, x: int, y: int) -> bool:
        """Whether there is such a pixel."""
        return 0 <= x < self.width and 0 <= y < self.height
