"""A viewer that keeps a copy of the canvas, as the live page does, and compares it at the end."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from bench.load.ledger import CHANNELS

SILENCE = 6.0  # seconds; a status event arrives every two seconds
RETRY = 0.2


class Differences(NamedTuple):
    """Channels of a follower's copy that differ from the canvas.

    Attributes:
        gaps: the follower has never received the canvas's value.
        phantoms: the follower has received the canvas's value, and then another one.
    """

    gaps: int
    phantoms: int


class Follower:
    """Follows the event stream in its own thread.

    Attributes:
        canvas: the copy, as raw RGB bytes.
        event: ID of the last event in it.
        instances: sources of the streams, in their order.
        faults: refused and broken streams, and requests to fetch the canvas again.
    """

    def __init__(self, url: str) -> None:
        """Fetches the canvas. Raises OSError or HTTPException."""
        self._address = url.removeprefix("http://")
        self.instances: list[str] = []
        self.faults: list[str] = []
        self._fetch()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def channel(self, x: int, y: int, channel: str) -> int:
        """The value of a channel in the copy."""
        return self.canvas[self._at(x, y, channel)]

    def sees(self, true: Callable[[Follower], bool], seconds: float) -> None:
        """Waits until a condition on the follower holds; raises TimeoutError after some seconds."""
        end = time.monotonic() + seconds
        while not true(self):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s; streams came from {self.instances}")
            time.sleep(0.01)

    def differences(self, canvas: bytes) -> Differences:
        """Compares the copy with the canvas, which must have the same last event."""
        gaps = phantoms = 0
        if self.canvas != canvas:
            for at, (mine, true) in enumerate(zip(self.canvas, canvas, strict=True)):
                if mine != true:
                    received = true == self._snapshot[at] or true in self._received[at]
                    gaps, phantoms = gaps + (not received), phantoms + received
        return Differences(gaps, phantoms)

    def __enter__(self) -> Follower:
        self._thread.start()
        self.sees(lambda follower: bool(follower.instances), 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _at(self, x: int, y: int, channel: str) -> int:
        return (y * self._width + x) * len(CHANNELS) + CHANNELS.index(channel)

    def _fetch(self) -> None:
        with closing(http.client.HTTPConnection(self._address, timeout=SILENCE)) as connection:
            connection.request("GET", "/canvas.rgb", headers={"Cache-Control": "no-cache"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"/canvas.rgb answered {answer.status}")
            self._snapshot = answer.read()
        self.canvas = bytearray(self._snapshot)
        self._received: defaultdict[int, set[int]] = defaultdict(set)  # values since the snapshot
        self._width = int(answer.headers["X-Pixel-Width"])
        self.event: str = answer.headers["X-Pixel-Event"]
        self._is_outdated = False

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                if self._is_outdated:
                    self._fetch()
                self._stream()
            except (OSError, http.client.HTTPException) as error:
                # A clean end of the stream (a last chunk) raises nothing and is no fault.
                self.faults.append(f"broken: {error!r}")
                self._stop.wait(RETRY)

    def _stream(self) -> None:
        with closing(http.client.HTTPConnection(self._address, timeout=SILENCE)) as connection:
            # Resume after the last event received.
            connection.request("GET", "/events", headers={"Last-Event-ID": self.event})
            answer = connection.getresponse()
            if answer.status != 200:
                self.faults.append(f"refused with {answer.status}")
                self._stop.wait(RETRY)
                return
            self.instances.append(answer.headers["X-Pixel-Instance"])
            rest = b""
            while not (self._stop.is_set() or self._is_outdated) and (part := answer.read1()):
                *frames, rest = (rest + part).split(b"\n\n")
                for frame in frames:
                    fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if line != ":")
                    if "id" in fields:
                        self._apply(fields)

    def _apply(self, fields: dict[str, str]) -> None:
        if "event" in fields:
            self.faults.append(f"resync at {fields['id']}")
            self._is_outdated = True
        if self._is_outdated:
            return
        for x, y, channel, value in json.loads(fields["data"]):
            at = self._at(x, y, channel)
            self.canvas[at] = value
            self._received[at].add(value)
        self.event = fields["id"]
