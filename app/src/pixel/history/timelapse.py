"""The history as a film: the canvas at regular times, as an animated WebP or an MP4."""

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from PIL import Image

from pixel.canvas import Region
from pixel.history.archive import first_from, read_position, read_tile
from pixel.history.queries import Selection, conditions, reading

FRAME_RATE = 25


class Film(NamedTuple):
    """A film of a region, from a time to another one (milliseconds), that lasts some seconds.

    Each pixel is drawn as a square of ``scale`` x ``scale``.
    """

    region: Region
    since: int | None
    until: int | None
    seconds: float
    scale: int

    def frames(self, path: Path) -> Iterator[bytes]:
        """The pixels of each frame (R, G, B, row by row); the last frame is the canvas at the end.

        Raises ValueError if the history has no changes in the time, or doesn't reach back to it.
        """
        with reading(path) as database:
            first = first_from(database, (self.since or 0,))
            end = read_position(database).next if self.until is None else first_from(database, (self.until,))
            snapshots = [row[0] for row in database.execute("SELECT first FROM snapshots ORDER BY first")]
            known = [snapshot for snapshot in snapshots if snapshot <= first]
            if first >= end:
                raise ValueError("the history has no changes in this time")
            if not known:
                raise ValueError("the history doesn't reach back to this time")
            later = [known[-1], *(snapshot for snapshot in snapshots if first < snapshot <= end)]
            (begin,), (last,) = (
                database.execute("SELECT time FROM changes WHERE id = ?", (number,)).fetchone()
                for number in (first, end - 1)
            )
            count = max(round(self.seconds * FRAME_RATE), 1)
            times = [begin + (last - begin) * number / count for number in range(1, count)]
            condition, values = conditions(database, Selection(self.region))
            pixels = bytearray()
            x0, y0, width, _ = self.region
            for number, time, x, y, channel, value in database.execute(
                "SELECT id, time, x, y, channel, value FROM changes"
                f" WHERE id >= ? AND id < ? AND {condition} ORDER BY id",
                (known[-1], end, *values),
            ):
                while later and later[0] <= number:
                    pixels = self._snapshot(database, later.pop(0))
                while times and number >= first and times[0] < time:
                    times.pop(0)
                    yield bytes(pixels)
                pixels[((y - y0) * width + x - x0) * 3 + channel] = value
            for snapshot in later:
                pixels = self._snapshot(database, snapshot)
            for _ in range(len(times) + 1):
                yield bytes(pixels)

    def _snapshot(self, database: sqlite3.Connection, snapshot: int) -> bytearray:
        tiles = [read_tile(database, snapshot, key) for key in self.region.tile_keys()]
        return bytearray(self.region.assemble(tiles))

    def write_webp(self, path: Path, file: BinaryIO) -> None:
        """Write the film as an animated WebP, without loss."""
        images = self._images(path)
        next(images).save(
            file,
            "WEBP",
            save_all=True,
            append_images=images,
            duration=1000 // FRAME_RATE,
            loop=0,
            lossless=True,
            method=0,
        )

    def write_mp4(self, path: Path, file: IO[bytes]) -> None:
        """Write the film as an MP4 that browsers and phones play, so not without loss, with ffmpeg.

        H.264 without loss (``libx264rgb``) is played by few programs; the WebP has no loss. The file may be a
        pipe. Raises ValueError as ``frames`` does, or if ffmpeg is missing or fails.
        """
        frames = self.frames(path)
        first = next(frames)
        scaling = f"scale=iw*{self.scale}:ih*{self.scale}:flags=neighbor:out_color_matrix=bt709"
        command = [
            *("ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pixel_format", "rgb24"),
            *("-video_size", f"{self.region.w}x{self.region.h}", "-framerate", str(FRAME_RATE), "-i", "-"),
            # Sides are even, because four pixels share a colour.
            *("-vf", f"{scaling},pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"),
            *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "14"),
            # A pipe can't be rewound to write the index.
            *("-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "-"),
        ]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
        except FileNotFoundError:
            raise ValueError("an MP4 needs ffmpeg: apt install ffmpeg, or use --format webp") from None
        with process:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # ffmpeg has failed, and has said why
                for frame in chain([first], frames):
                    process.stdin.write(frame)
            with suppress(BrokenPipeError):
                process.stdin.close()
        if process.returncode:
            raise ValueError(f"ffmpeg has failed with status {process.returncode}")

    def _images(self, path: Path) -> Iterator[Image.Image]:
        size = self.region.w, self.region.h
        for frame in self.frames(path):
            image = Image.frombytes("RGB", size, frame)
            if self.scale > 1:
                image = image.resize((size[0] * self.scale, size[1] * self.scale), Image.Resampling.NEAREST)
            yield image
