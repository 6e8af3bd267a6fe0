"""Reads of single pixels: waiting reads are sent to Redis in one pipeline."""

import asyncio
import logging

from pixel.canvas import locate
from pixel.link import Link
from pixel.problems import Answer, Problem
from pixel.resp import Command

Colour = tuple[int, int, int]
"""Red, green and blue, 0-255 each."""

log = logging.getLogger(__name__)


class PixelReads:
    """Reads pixels in pipelines. One is in flight at a time; reads that arrive meanwhile form the next."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Command, Answer[Colour]]] = []
        self._task: asyncio.Task[None] | None = None

    def submit(self, answer: Answer[Colour], x: int, y: int) -> None:
        """Read the colour of a pixel, black if it was never written; the answer may get a 503 ``Problem``."""
        key, place = locate(x, y)
        self._waiting.append((("GETRANGE", key, place, place + 2), answer))
        if self._task is None:
            # The task starts in the loop's next iteration, and takes all reads of this one.
            self._task = self._loop.create_task(self._run(), name="reads")

    async def _run(self) -> None:
        try:
            while self._waiting:
                reads, self._waiting = self._waiting, []
                await self._ask(reads)
        finally:
            self._task = None

    async def _ask(self, reads: list[tuple[Command, Answer[Colour]]]) -> None:
        try:
            replies = await self._link.ask_each(*(command for command, _ in reads))
        except Problem as problem:
            replies = [problem] * len(reads)
        except Exception:
            # An internal error: answer these reads, and continue with the next ones.
            log.exception("%d reads failed", len(reads))
            replies = [Problem.unavailable("This is our fault, and it is logged.")] * len(reads)
        # The next reads are on their way before.
        self._loop.call_soon(self._answer, reads, replies)

    @staticmethod
    def _answer(reads: list[tuple[Command, Answer[Colour]]], replies: list[object]) -> None:
        for (_, answer), reply in zip(reads, replies, strict=True):
            if answer.done():
                continue
            try:
                if isinstance(reply, bytes):
                    red, green, blue = reply.ljust(3, b"\0")
                    answer.set_result((red, green, blue))
                elif isinstance(reply, Problem):
                    answer.set_exception(reply)
                else:
                    # A single tile fails if its key holds another type.
                    answer.set_exception(Problem.unavailable("Redis refuses to be read."))
            except Exception:
                log.exception("a read was not answered")
