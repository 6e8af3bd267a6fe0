"""Measures what many viewers of the event stream receive, and when, during writes.

    python -m bench.load.viewers --url http://127.0.0.1:8080 --viewers 5000 --rate 100 --seconds 30

Each viewer holds a stream open. Writes are due at a constant rate, one change each. The latency of a
message is the time since its oldest change was due. Exit status: 0 success; 1 a stream ended or was
refused, or a viewer did not receive the last change; 2 the run was not possible.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
from collections.abc import Coroutine
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast

from bench.load.figures import Spread
from bench.load.http1 import BadAnswerError, Client, Target
from bench.load.options import ImpossibleError, allow_files, count, positive

OPENED_AT_ONCE = 100
OPENING_SECONDS = 60.0
WRITERS = 8
HEARD_SECONDS = 10.0
OBSERVED_SECONDS = 0.02
SIDE = 256

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_MESSAGE = re.compile(rb"id: ([^\n]+)\ndata: (\[\[[^\n]*\]\])\n\n")


@dataclass
class Audience:
    """Messages and streams of all viewers together."""

    opened: int = 0
    refused: int = 0
    lost: int = 0
    messages: int = 0
    received: int = 0  # bytes
    late: list[float] = field(default_factory=list)  # seconds
    due: dict[tuple[int, ...], float] = field(default_factory=dict)  # due time by change
    _oldest: dict[bytes, float | None] = field(default_factory=dict)

    def hear(self, data: bytes, now: float) -> None:
        """Records complete messages. All viewers receive the same ones, so each is parsed once."""
        self.received += len(data)
        for event, changes in _MESSAGE.findall(data):
            if event not in self._oldest:
                known = (self.due.get((x, y, value)) for x, y, _, value in json.loads(changes))
                self._oldest[event] = min((at for at in known if at is not None), default=None)
            self.messages += 1
            if (oldest := self._oldest[event]) is not None:
                self.late.append(now - oldest)


class Viewer(asyncio.Protocol):
    """One stream; an incomplete message is buffered."""

    def __init__(self, audience: Audience, request: bytes) -> None:
        self._audience = audience
        self._request = request
        self._rest = b""
        self._ending = False
        self.opened = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if not self.opened.done():
            status = _HEAD.match(data)
            good = status is not None and status[1] == b"200"
            self._audience.opened += good
            self._audience.refused += not good
            self.opened.set_result(good)
        data = self._rest + data
        end = data.rfind(b"\n\n") + 2
        self._rest = data[end:] if end > 1 else data
        if end > 1:
            self._audience.hear(data[:end], now)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self._audience.refused += 1
            self.opened.set_result(False)
        elif not self._ending:
            self._audience.lost += 1

    def close(self) -> None:
        self._ending = True
        self._transport.abort()


@dataclass(frozen=True)
class Report:
    """Messages of the measured seconds, and their latencies."""

    viewers: int
    refused: int
    lost: int
    writes: int
    failed_writes: int
    seconds: float
    messages: int
    received: int
    late: Spread
    generator_late: Spread
    all_heard: bool

    @property
    def good(self) -> bool:
        return not self.refused and not self.lost and self.all_heard

    def as_json(self) -> dict[str, Any]:
        spreads = {"late": self.late.as_json(), "generator_late": self.generator_late.as_json()}
        return {**self.__dict__, **spreads, "late_unit": "ms"}

    def __str__(self) -> str:
        each = self.messages / max(self.viewers, 1) / self.seconds
        return (
            f"{self.viewers} viewers for {self.seconds:.0f} s: {self.refused} refused, {self.lost} lost;"
            f" {self.writes} writes, {self.failed_writes} failed; {self.messages} messages, {each:.1f} a"
            f" second to each; late by p50 {self.late.p50:.0f} ms, p99 {self.late.p99:.0f} ms, max"
            f" {self.late.max:.0f} ms; {'all' if self.all_heard else 'NOT all'} heard the last change"
        )


async def watch(
    target: Target,
    viewers: int,
    rate: float,
    seconds: float,
    *,
    events: str = "/events",
    publish: str = "",
    changes: int = 1,
) -> Report:
    """Opens streams, writes for some seconds, and reports the messages.

    Args:
        target: the service.
        viewers: number of streams.
        rate: changes per second.
        seconds: duration of the writes.
        events: path of the streams.
        publish: path for whole messages, of a message broker; if empty, writes go to ``POST /pixel``.
        changes: number of changes in a published message.
    """
    allow_files(viewers + WRITERS)
    audience = Audience()
    everybody = await _open(target, audience, viewers, events)
    try:
        began = perf_counter()
        audience.messages = audience.received = 0
        failed = 0
        numbers = iter(range(round(rate * seconds)))

        async def write_on() -> None:
            nonlocal failed
            with closing(Client(target)) as client:
                for number in numbers:
                    due = began + number / rate
                    await asyncio.sleep(max(0, due - perf_counter()))
                    failed += not await _write(client, audience, number, due, publish, changes)

        own_delays: list[float] = []
        observing = asyncio.create_task(_observe_delays(own_delays))
        await asyncio.gather(*(write_on() for _ in range(WRITERS)))
        observing.cancel()
        took = perf_counter() - began
        report = (audience.messages, audience.received)
        late = Spread.of_seconds(audience.late)
        all_heard = await _hear_last(target, audience, everybody, publish)
        return Report(
            audience.opened, audience.refused, audience.lost, round(rate * seconds), failed, took, *report,
            late, Spread.of_seconds(own_delays), all_heard,
        )  # fmt: skip
    finally:
        for viewer in everybody:
            viewer.close()


async def _observe_delays(delays: list[float]) -> None:
    """Records the delays of this program, which are part of the measured latencies."""
    while True:
        due = perf_counter() + OBSERVED_SECONDS
        await asyncio.sleep(OBSERVED_SECONDS)
        delays.append(perf_counter() - due)


async def _open(target: Target, audience: Audience, viewers: int, events: str) -> list[Viewer]:
    loop = asyncio.get_running_loop()
    request = target.head("GET", events) + b"Accept: text/event-stream\r\n\r\n"
    everybody: list[Viewer] = []
    async with asyncio.timeout(OPENING_SECONDS):
        while len(everybody) < viewers:
            number = min(OPENED_AT_ONCE, viewers - len(everybody))
            made = await asyncio.gather(
                *(
                    loop.create_connection(
                        lambda: Viewer(audience, request), target.host, target.port, ssl=target.tls
                    )
                    for _ in range(number)
                )
            )
            everybody += [viewer for _, viewer in made]
            await asyncio.gather(*(viewer.opened for _, viewer in made))
    return everybody


async def _write(
    client: Client, audience: Audience, number: int, due: float, publish: str, changes: int
) -> bool:
    """Writes a change, or publishes a message with changes; returns whether it was accepted."""
    if publish and number % changes:
        return True  # part of the previous message
    # A pair of cell and value is used again only after SIDE² × 255 changes.
    cells = [(n % SIDE, n // SIDE % SIDE, n // SIDE**2 % 255 + 1) for n in range(number, number + changes)]
    audience.due.update(dict.fromkeys(cells, due))
    if publish:
        message = [[x, y, "R", value] for x, y, value in cells]
        path, body = publish, json.dumps(message, separators=(",", ":")).encode()
    else:
        x, y, value = cells[0]
        path = "/pixel"
        body = json.dumps({"x": x, "y": y, "channel": "R", "value": value}).encode()
    try:
        answer = await client.request("POST", path, body)
    except (OSError, BadAnswerError):
        return False
    return 200 <= answer.status < 300


async def _hear_last(target: Target, audience: Audience, everybody: list[Viewer], publish: str) -> bool:
    """Returns whether all viewers receive one more change in time."""
    last = (SIDE, SIDE, 255)
    audience.late.clear()
    before = audience.messages
    body = json.dumps([[*last[:2], "R", last[2]]], separators=(",", ":")).encode()
    with closing(Client(target)) as client:
        if publish:
            await client.request("POST", publish, body)
        else:
            await asyncio.sleep(1)  # so that earlier messages have arrived
            before = audience.messages
            x, y, value = last
            pixel = {"x": x, "y": y, "channel": "R", "value": value}
            await client.request("POST", "/pixel", json.dumps(pixel).encode())
    deadline = perf_counter() + HEARD_SECONDS
    while audience.messages < before + len(everybody) and perf_counter() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return audience.messages >= before + len(everybody)


def run(watching: Coroutine[Any, Any, Report]) -> Report:
    """Runs a measurement, on uvloop if it is installed: a message then takes half the time."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(watching)
    return uvloop.run(watching)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.viewers", description="Holds event streams open while others paint."
    )
    add = parser.add_argument
    add("--url", type=Target.parse, required=True, dest="target", metavar="URL")
    add("--viewers", type=count, default=1000, help="streams (default 1000)")
    add("--rate", type=positive, default=100, help="writes a second (100)")
    add("--seconds", type=positive, default=30, help="how long (30)")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        report = run(watch(options.target, options.viewers, options.rate, options.seconds))
    except (ImpossibleError, OSError, BadAnswerError) as error:
        print(f"bench.load.viewers: {error}", file=sys.stderr)
        return 2
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(report.as_json()) if options.json else report)
    share = (used.ru_utime + used.ru_stime) / report.seconds
    late = report.generator_late
    print(
        f"generator: {share:.0%} of a core, itself late by p50 {late.p50:.0f} ms, p99 {late.p99:.0f} ms",
        file=sys.stderr,
    )
    return int(not report.good)


if __name__ == "__main__":
    sys.exit(main())
