"""A user of the fleet."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Client:
    """Asks over HTTP, and takes refusals as answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any, str]:
        """Status, headers and body; POST if there is a body."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def read_from(self, instance: str, path: str) -> Any:
        """What this instance answers, by its own path: open streams have a say in whose turn it is."""
        status, headers, body = self.ask(f"/cluster/{instance}{path}")
        assert (status, headers["X-Pixel-Instance"]) == (200, instance)
        return json.loads(body)


@pytest.fixture(scope="session")
def inventory() -> str:
    """As a user has it."""
    return "inventory/local"


@pytest.fixture(scope="session")
def client(fleet: dict[str, Any]) -> Client:
    """A user somewhere outside, who knows the balancer's address only."""
    return Client(fleet["url"])


class Viewer:
    """Keeps the canvas by what the balancer streams to it, as the live page does."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://")
        answer = urllib.request.urlopen(f"{url}/canvas.rgb", timeout=10)
        self.canvas = bytearray(answer.read())
        self._width = int(answer.headers["X-Pixel-Width"])
        self.event: str = answer.headers["X-Pixel-Event"]
        self.instances: list[str] = []
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def channel(self, x: int, y: int, channel: str) -> int:
        """What it believes a channel of a pixel to be."""
        return self.canvas[(y * self._width + x) * 3 + "RGB".index(channel)]

    def sees(self, true: Callable[[Viewer], bool], seconds: float) -> None:
        """Return when something is true of it; fail after some seconds."""
        end = time.monotonic() + seconds
        while not true(self):
            assert time.monotonic() < end, f"not within {seconds} s; streams came from {self.instances}"
            time.sleep(0.01)

    def __enter__(self) -> Viewer:
        self._thread.start()
        self.sees(lambda viewer: bool(viewer.instances), 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(self._address, timeout=10)
            try:
                # A client of the stream sends the id that it heard last.
                connection.request("GET", "/events", headers={"Last-Event-ID": self.event})
                answer = connection.getresponse()
                if answer.status != 200:
                    self.faults.append(f"refused with {answer.status}")
                    time.sleep(0.2)
                else:
                    self._read(answer)
            except (OSError, http.client.HTTPException) as error:
                # A stream that ends cleanly ends with its last chunk, and is no fault.
                self.faults.append(f"broken: {error!r}")
            finally:
                connection.close()

    def _read(self, answer: http.client.HTTPResponse) -> None:
        self.instances.append(answer.headers["X-Pixel-Instance"])
        rest = b""
        # It never waits for long: every two seconds a status comes.
        while not self._stop.is_set() and (part := answer.read1()):
            *frames, rest = (rest + part).split(b"\n\n")
            for frame in frames:
                fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if line != ":")
                if "id" in fields:
                    self._hear(fields)

    def _hear(self, fields: dict[str, str]) -> None:
        if "event" in fields:
            self.faults.append(f"got a resync at {fields['id']}")
        for x, y, channel, value in json.loads(fields["data"]):
            self.canvas[(y * self._width + x) * 3 + "RGB".index(channel)] = value
        self.event = fields["id"]


@pytest.fixture
def viewer(fleet: dict[str, Any]) -> Callable[[], Viewer]:
    """Opens a stream through the balancer."""
    return lambda: Viewer(fleet["url"])


@pytest.fixture
def watched(client: Client, viewer: Callable[[], Viewer]) -> Any:
    """Somebody watches meanwhile, and in the end has missed nothing."""

    @contextmanager
    def watch() -> Iterator[Viewer]:
        with viewer() as watching:
            yield watching
            fresh = urllib.request.Request(f"{client.url}/canvas.rgb", headers={"Cache-Control": "no-cache"})
            answer = urllib.request.urlopen(fresh, timeout=10)
            canvas, event = answer.read(), answer.headers["X-Pixel-Event"]
            watching.sees(lambda viewer: viewer.event == event, 5)
        assert watching.faults == []
        assert watching.canvas == canvas

    return watch
