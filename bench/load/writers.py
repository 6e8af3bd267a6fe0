"""Sequential writers: they detect an old write that is executed after newer ones.

Each writer has its own pixels. It writes increasing values to a pixel, one after another, then
continues with the next pixel, and returns to the first one after the last. Writers share no pixel,
so only an older write of the same writer can change an acknowledged value. An undone value stays in
the pixel until the writer returns to it or the canvas is checked.

Half of the writers set the three channels of a pixel at once (`PUT /pixel/{x}/{y}`, 24-bit values),
the others set one channel at a time (`POST /pixel`, 8-bit values that wrap).
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
WRITES_A_VISIT = 8  # to a pixel before the writer continues with the next, on average
READS = 0.2  # share of the writes before which the pixel is read
SETTLE = 12.0  # seconds from the end of a fault, or of the writes, until the canvas is checked


def pixels_of(width: int, height: int, writers: int) -> list[tuple[int, int]]:
    """The pixels of all writers together: the last ones of the canvas."""
    total = width * height
    numbers = range(total - writers * PIXELS_EACH, total)
    return [(number % width, number // width) for number in numbers]


class Register:
    """One or three channels of a pixel, to which one writer writes increasing values.

    Attributes:
        acknowledged: number of the last acknowledged write; 0 if there is none.
        last: number of the last write.
        doubtful: numbers of later writes that may have been stored.
    """

    def __init__(self, x: int, y: int, channels: str, before: bytes) -> None:
        """Creates a register whose channels hold `before`, one byte per channel."""
        self.x, self.y, self.channels = x, y, channels
        self.acknowledged = 0
        self.last = 0
        self.doubtful: list[int] = []
        self._before = int.from_bytes(before)
        self._values = 1 << 8 * len(channels)

    def value(self, number: int) -> bytes:
        """The value of a write, one byte per channel."""
        return ((self._before + number) % self._values).to_bytes(len(self.channels))

    def begin(self) -> int:
        """Returns the number of a new write; it is in doubt until `close` sets its fate."""
        self.last += 1
        self.doubtful.append(self.last)
        return self.last

    def close(self, number: int, fate: Fate) -> None:
        if fate is Fate.ACKNOWLEDGED:
            self.acknowledged = number
            self.doubtful.clear()  # all of them are older: the writer sends one write at a time
        elif fate is not Fate.UNKNOWN:
            self.doubtful.remove(number)

    def fault(self, found: bytes) -> Fault | None:
        """Returns the fault if the channels hold `found`; None if the value is right."""
        if any(found == self.value(n) for n in (self.acknowledged, *self.doubtful)):
            return None
        behind = (int.from_bytes(self.value(self.last)) - int.from_bytes(found)) % self._values
        number = self.last - behind
        undone = bool(self.acknowledged) and 0 <= number < self.acknowledged
        return Fault(self, self.acknowledged, number if number >= 0 else None, found, undone)


class Fault(NamedTuple):
    """A register with a wrong value.

    `acknowledged` and `held` are numbers of writes; `held` is None if no write had this value.
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
    """The result of the writers.

    Attributes:
        sent, acknowledged: numbers of writes.
        reads: number of answered reads.
        undone: registers that returned to a value before an acknowledged write, once per write.
        wrong: registers with a value that was refused, or was never written.
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
    """Writes in sequence until stopped, then checks the canvas."""

    def __init__(
        self,
        target: Target,
        size: tuple[int, int],
        before: bytes,
        count: int,
        timeout: float = 10.0,
        watch: Callable[[Sample], None] | None = None,
        others: int = 0,
    ) -> None:
        """Prepares the writers.

        Args:
            target: the service.
            size: width and height of the canvas in pixels.
            before: the canvas as raw RGB bytes; only the pixels of `pixels_of` are used.
            count: number of writers.
            timeout: seconds until a request times out.
            watch: called with every request that is done.
            others: number of writers of another instance, whose pixels are left alone.
        """
        self._target = target
        self._width = size[0]
        self._timeout = timeout
        self._watch = watch
        self._seen: set[tuple[int, Register]] = set()
        self._verdict = WritersVerdict(count)
        places = pixels_of(*size, count + others)
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
        """Writes until `stop` is set and each request is answered, failed or timed out."""
        async with asyncio.TaskGroup() as group:
            for pixels in self._pixels:
                group.create_task(self._write(pixels, stop))

    def check(self, after: bytes) -> WritersVerdict:
        """Checks all pixels of the canvas, given as raw RGB bytes; includes faults that writers found."""
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
        """One writer: visits its pixels in turn; reads each on arrival and before some writes."""
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
    """A writer's request, and the check of the body of a 2xx answer."""

    method: str
    path: str
    body: bytes | None
    right: Callable[[bytes], bool]


class Failure(NamedTuple):
    """A request without the expected answer, and the resulting fate of a write."""

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
    """Waits for a random time, so that the writers don't run in step; ends early when `stop` is set."""
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
    """The channels of a pixel that was read, as bytes; empty if the answer is not a pixel."""
    try:
        pixel = _parsed(answer)
        return bytes(pixel[channel] for channel in CHANNELS)
    except (KeyError, TypeError, ValueError):
        return b""
