"""Sequential writers: a write that comes back late is seen, though newer ones followed it.

Each writer has some pixels of its own. It writes rising values to one of them, one after another,
then goes on to the next pixel, and comes back to the first one after the last. No two writers
share a pixel, so only an older write of the same writer can change what it has written. A pixel
that the writer has left keeps an undone value until it is looked at.

Half of the writers set a pixel's three channels at once (`PUT /pixel/{x}/{y}`, 24-bit values), the
others set one channel after another (`POST /pixel`, 8-bit values that wrap).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.load.http1 import Answer, BadAnswerError, Client, ConnectError, Target
from bench.load.ledger import CHANNELS, EXAMPLES, Fate, Write, fate_of_failure
from bench.load.openloop import Sample, acknowledges, body_of

PIXELS_EACH = 64
PAUSE = 0.05  # seconds between a writer's answer and its next request, on average
WRITES_A_VISIT = 8  # to a pixel before the writer goes on to the next, on average
READS = 0.2  # share of the writes before which the pixel is read
SETTLE = 12.0  # seconds from the end of a fault, or of the writes, until the canvas is judged


def pixels_of(width: int, height: int, writers: int) -> list[tuple[int, int]]:
    """The pixels that so many writers share among themselves: the last ones of the canvas."""
    total = width * height
    numbers = range(total - writers * PIXELS_EACH, total)
    return [(number % width, number // width) for number in numbers]


class Register:
    """Some channels of one pixel, to which one writer gives rising values.

    Attributes:
        acknowledged: number of the last acknowledged write; 0 if there is none.
        last: number of the last write that was begun.
        doubtful: numbers of later writes that may have been stored.
    """

    def __init__(self, x: int, y: int, channels: str, before: bytes) -> None:
        """Takes over a pixel whose channels hold `before`, one byte a channel."""
        self.x, self.y, self.channels = x, y, channels
        self.acknowledged = 0
        self.last = 0
        self.doubtful: list[int] = []
        self._before = int.from_bytes(before)
        self._values = 1 << 8 * len(channels)

    def value(self, number: int) -> bytes:
        """What the channels hold after this write, one byte a channel."""
        return ((self._before + number) % self._values).to_bytes(len(self.channels))

    def begin(self) -> int:
        """The number of a new write; it is in doubt until `close` says more of it."""
        self.last += 1
        self.doubtful.append(self.last)
        return self.last

    def close(self, number: int, fate: Fate) -> None:
        if fate is Fate.ACKNOWLEDGED:
            self.acknowledged = number
            self.doubtful.clear()  # the writer waits for each: all of them are older
        elif fate is not Fate.UNKNOWN:
            self.doubtful.remove(number)

    def fault(self, found: bytes) -> Fault | None:
        """What is wrong if the channels hold `found`; None if nothing is."""
        if any(found == self.value(n) for n in (self.acknowledged, *self.doubtful)):
            return None
        behind = (int.from_bytes(self.value(self.last)) - int.from_bytes(found)) % self._values
        number = self.last - behind
        undone = bool(self.acknowledged) and 0 <= number < self.acknowledged
        return Fault(self, self.acknowledged, number if number >= 0 else None, found, undone)


class Fault(NamedTuple):
    """A register that held what it must not hold.

    `acknowledged` and `held` are numbers of writes; `held` is None if the value is of none of them.
    """

    register: Register
    acknowledged: int
    held: int | None
    found: bytes
    undone: bool

    def __str__(self) -> str:
        register = self.register
        held = f"write {self.held}" if self.held is not None else "a value that was never written"
        return (
            f"({register.x}, {register.y}) {register.channels}:"
            f" write {self.acknowledged} ({register.value(self.acknowledged).hex()}) was the last"
            f" acknowledged of {register.last}; holds {self.found.hex()}, {held}"
        )


@dataclass
class WritersVerdict:
    """What the writers did and found.

    Attributes:
        sent, acknowledged: numbers of writes.
        reads: number of reads that were answered.
        undone: registers that went back behind an acknowledged write, each write once.
        wrong: registers with a value that was refused, or that nobody wrote.
        failed: requests without a 2xx answer, reads included, by their error.
    """

    writers: int = 0
    sent: int = 0
    acknowledged: int = 0
    reads: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    undone: list[Fault] = field(default_factory=list)
    wrong: list[Fault] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.undone and not self.wrong

    def as_json(self) -> dict[str, Any]:
        return {
            "writers": self.writers,
            "sent": self.sent,
            "acknowledged": self.acknowledged,
            "reads": self.reads,
            "failed": dict(self.failed),
            "undone": len(self.undone),
            "wrong": len(self.wrong),
            "examples": [str(fault) for fault in (self.undone + self.wrong)[:EXAMPLES]],
        }


class _Pixel:
    """A pixel and its registers: one of three channels, or three of one channel each."""

    def __init__(self, x: int, y: int, before: bytes, at_once: bool) -> None:
        self.x, self.y, self.at_once = x, y, at_once
        self.registers = (
            [Register(x, y, CHANNELS, before)]
            if at_once
            else [Register(x, y, c, before[i : i + 1]) for i, c in enumerate(CHANNELS)]
        )

    def faults(self, found: bytes) -> list[Fault]:
        parts = [found] if self.at_once else [found[i : i + 1] for i in range(len(CHANNELS))]
        faults = [r.fault(part) for r, part in zip(self.registers, parts, strict=True)]
        return [fault for fault in faults if fault is not None]


class Writers:
    """Writes in sequence until it is stopped, and judges what is there afterwards."""

    def __init__(
        self,
        target: Target,
        size: tuple[int, int],
        before: bytes,
        count: int,
        timeout: float = 10.0,
        watch: Callable[[Sample], None] | None = None,
    ) -> None:
        """Prepares the writers.

        Args:
            target: the service.
            size: width and height of the canvas in pixels.
            before: the canvas as raw RGB bytes; only the pixels of `pixels_of` must be true.
            count: number of writers.
            timeout: seconds until a request is given up.
            watch: called with every request that is done.
        """
        self._target = target
        self._width = size[0]
        self._timeout = timeout
        self._watch = watch
        self._seen: set[tuple[int, Register]] = set()
        self._verdict = WritersVerdict(count)
        places = pixels_of(*size, count)
        self._pixels = [
            [
                _Pixel(x, y, self._held(before, x, y), at_once=writer % 2 == 0)
                for x, y in places[writer * PIXELS_EACH : (writer + 1) * PIXELS_EACH]
            ]
            for writer in range(count)
        ]

    def _held(self, canvas: bytes, x: int, y: int) -> bytes:
        at = (y * self._width + x) * len(CHANNELS)
        return canvas[at : at + len(CHANNELS)]

    async def run(self, stop: asyncio.Event) -> None:
        """Writes until `stop` is set and every request is answered or given up."""
        async with asyncio.TaskGroup() as group:
            for pixels in self._pixels:
                group.create_task(self._write(pixels, stop))

    def check(self, after: bytes) -> WritersVerdict:
        """Judges all pixels by the canvas, as raw RGB bytes; adds to what the writers saw."""
        for pixels in self._pixels:
            for pixel in pixels:
                self._judge(pixel, self._held(after, pixel.x, pixel.y))
        return self._verdict

    def _judge(self, pixel: _Pixel, found: bytes) -> None:
        for fault in pixel.faults(found):
            once = (fault.acknowledged, fault.register)
            if once not in self._seen:
                self._seen.add(once)
                (self._verdict.undone if fault.undone else self._verdict.wrong).append(fault)

    async def _write(self, pixels: Sequence[_Pixel], stop: asyncio.Event) -> None:
        """One writer: visits its pixels in turn; looks at each as it comes, and now and then."""
        with closing(Client(self._target, self._timeout)) as client:
            await _pause(stop)
            while True:
                for pixel in pixels:
                    await self._read(client, pixel)
                    for turn in range(random.randint(1, 2 * WRITES_A_VISIT)):  # noqa: S311
                        if stop.is_set():
                            return
                        register = pixel.registers[turn % len(pixel.registers)]
                        await self._write_once(client, register)
                        await _pause(stop)
                        if random.random() < READS:  # noqa: S311
                            await self._read(client, pixel)

    async def _write_once(self, client: Client, register: Register) -> None:
        number = register.begin()
        self._verdict.sent += 1
        x, y, value = register.x, register.y, register.value(number)
        if register.channels == CHANNELS:
            channels = dict(zip(CHANNELS, value, strict=True))
            body, wanted = json.dumps(channels).encode(), {"x": x, "y": y, **channels}
            request = Request("PUT", f"/pixel/{x}/{y}", body, lambda a: _parsed(a) == wanted)
        else:
            body = body_of(Write(x, y, register.channels, value[0]))
            request = Request("POST", "/pixel", body, lambda a: acknowledges(a, body))
        answer = await self._ask(client, request)
        if isinstance(answer, Failure):
            register.close(number, answer.fate)
        else:
            register.close(number, Fate.ACKNOWLEDGED)
            self._verdict.acknowledged += 1

    async def _read(self, client: Client, pixel: _Pixel) -> None:
        path = f"/pixel/{pixel.x}/{pixel.y}"
        answer = await self._ask(client, Request("GET", path, None, lambda a: bool(_colour(a))))
        if not isinstance(answer, Failure):
            self._verdict.reads += 1
            self._judge(pixel, _colour(answer.body))

    async def _ask(self, client: Client, request: Request) -> Answer | Failure:
        due = time.monotonic()
        answer = await _answer(client, request)
        error = answer.error if isinstance(answer, Failure) else None
        if error is not None:
            self._verdict.failed[error] += 1
        if self._watch is not None:
            self._watch(Sample(due, time.monotonic() - due, error, answer.instance))
        return answer


class Request(NamedTuple):
    """What a writer asks, and whether a 2xx answer with this body is the right one."""

    method: str
    path: str
    body: bytes | None
    right: Callable[[bytes], bool]


class Failure(NamedTuple):
    """A request without the right answer, and what that says of a write."""

    error: str
    fate: Fate
    instance: str = ""


async def _answer(client: Client, request: Request) -> Answer | Failure:
    try:
        answer = await client.request(request.method, request.path, request.body)
    except ConnectError:
        return Failure("cannot connect", Fate.UNSENT)
    except TimeoutError:
        return Failure("no answer in time", Fate.UNKNOWN)
    except OSError:
        return Failure("connection lost", Fate.UNKNOWN)
    except (BadAnswerError, ValueError) as error:
        return Failure(f"not HTTP: {error}", Fate.UNKNOWN)
    if not 200 <= answer.status < 300:
        fate = fate_of_failure(answer.status, answer.body)
        return Failure(f"status {answer.status}", fate, answer.instance)
    if not request.right(answer.body):
        return Failure("answer is not an acknowledgement", Fate.UNKNOWN, answer.instance)
    return answer


async def _pause(stop: asyncio.Event) -> None:
    """Waits at random, so that the writers don't keep step; less if they are to stop."""
    try:
        async with asyncio.timeout(random.uniform(0, 2 * PAUSE)):  # noqa: S311
            await stop.wait()
    except TimeoutError:
        pass


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _colour(answer: bytes) -> bytes:
    """The channels of a pixel that was read; nothing if the answer is not a pixel."""
    try:
        pixel = _parsed(answer)
        return bytes(pixel[channel] for channel in CHANNELS)
    except (KeyError, TypeError, ValueError):
        return b""
