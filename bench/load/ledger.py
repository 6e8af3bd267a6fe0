"""The ledger of the open loop: all writes, and the service's answers.

Each write has its own cell and channel, so no later write can hide its result. Its value differs
from the cell's previous value, so a missing write is detected. An old write that is executed after a
newer one is not detected here but by `writers.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

CHANNELS = "RGB"
SCATTER = 1_000_003  # successive writes are far apart on the canvas
EXAMPLES = 20
NOTHING_WRITTEN = b"nothing was written"  # detail of a 503; the check verifies it


class Fate(IntEnum):
    """What is known about a write."""

    UNSENT = 0  # not sent
    ACKNOWLEDGED = 1  # the service reports it as stored
    REFUSED = 2  # the service reports it as not stored (4xx, "nothing was written")
    UNKNOWN = 3  # no answer, or one (5xx) that leaves it open


def fate_of_failure(status: int, body: bytes) -> Fate:
    """Returns the fate of a write that was not answered 2xx."""
    if 400 <= status < 500 or NOTHING_WRITTEN in body.lower():
        return Fate.REFUSED
    return Fate.UNKNOWN


class Write(NamedTuple):
    x: int
    y: int
    channel: str
    value: int


class Fault(NamedTuple):
    """A write whose cell holds a wrong value."""

    write: Write
    fate: Fate
    before: int
    found: int

    def __str__(self) -> str:
        x, y, channel, value = self.write
        return (
            f"({x}, {y}) {channel}: wrote {value}, {self.fate.name.lower()};"
            f" held {self.before}, holds {self.found}"
        )


@dataclass
class Verdict:
    """The result of checking the ledger against the canvas."""

    fates: Counter[Fate] = field(default_factory=Counter)
    lost: list[Fault] = field(default_factory=list)
    wrong: list[Fault] = field(default_factory=list)
    unknown_written: int = 0

    @property
    def clean(self) -> bool:
        return not self.lost and not self.wrong

    def as_json(self) -> dict[str, Any]:
        return {
            **{fate.name.lower(): self.fates[fate] for fate in Fate},
            "unknown_written": self.unknown_written,
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "examples": [str(fault) for fault in (self.lost + self.wrong)[:EXAMPLES]],
        }


class Ledger:
    """Issues unique writes and records their fates."""

    def __init__(
        self,
        width: int = 1024,
        height: int = 1024,
        before: bytes | None = None,
        first: int = 0,
        reserved: int = 0,
    ) -> None:
        """Creates an empty ledger.

        Args:
            width, height: size of the canvas in pixels.
            before: the canvas as raw RGB bytes; black if None.
            first: number of the first write's position in the fixed order of positions.
            reserved: number of pixels at the end of the canvas that belong to `writers.py`.

        Raises:
            ValueError: `before` is of another size.
        """
        self.width = width
        self.height = height
        self.size = width * height * len(CHANNELS)
        self.capacity = self.size - reserved * len(CHANNELS)
        if before is not None and len(before) != self.size:
            raise ValueError(f"a canvas of {width}x{height} has {self.size} bytes, not {len(before)}")
        self._before = before if before is not None else bytes(self.size)
        self._first = first
        self._step = SCATTER
        while math.gcd(self._step, self.capacity) != 1:
            self._step += 1
        self._fates = bytearray()

    def __len__(self) -> int:
        return len(self._fates)

    def open(self) -> int:
        """Adds an unsent write and returns its number."""
        number = len(self._fates)
        if number >= self.capacity:
            raise ValueError(f"the canvas has only {self.capacity} cells and channels")
        self._fates.append(Fate.UNSENT)
        return number

    def close(self, number: int, fate: Fate) -> None:
        self._fates[number] = fate

    def fate(self, number: int) -> Fate:
        return Fate(self._fates[number])

    def _position(self, number: int) -> int:
        """Returns the write's offset in the canvas as raw RGB bytes."""
        return (self._first + number * self._step) % self.capacity

    def write(self, number: int) -> Write:
        position = self._position(number)
        cell, channel = divmod(position, len(CHANNELS))
        y, x = divmod(cell, self.width)
        value = (self._before[position] + 1 + number % 255) % 256
        return Write(x, y, CHANNELS[channel], value)

    def cells(self, numbers: range) -> set[tuple[int, int]]:
        """Returns the cells of these writes, for a service that is read cell by cell."""
        return {self.write(number)[:2] for number in numbers}

    def check(self, after: bytes) -> Verdict:
        """Compares the canvas, as raw RGB bytes, with the writes and their fates."""
        if len(after) != self.size:
            raise ValueError(f"the canvas has {len(after)} bytes, and had {self.size}")
        verdict = Verdict()
        for number, state in enumerate(self._fates):
            fate = Fate(state)
            write = self.write(number)
            position = self._position(number)
            before, found = self._before[position], after[position]
            verdict.fates[fate] += 1
            written, untouched = found == write.value, found == before
            if fate is Fate.UNKNOWN and written:
                verdict.unknown_written += 1
            if (written and fate in (Fate.ACKNOWLEDGED, Fate.UNKNOWN)) or (
                untouched and fate is not Fate.ACKNOWLEDGED
            ):
                continue
            fault = Fault(write, fate, before, found)
            (verdict.lost if untouched else verdict.wrong).append(fault)
        return verdict
