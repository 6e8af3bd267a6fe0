"""HTTP and stream clients that reach the fleet through the balancer."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Client:
    """An HTTP client that returns error statuses instead of raising."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any, str]:
        """Send a GET, or a POST if there is a body; return status, headers and body."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def read_from(self, instance: str, path: str) -> Any:
        """GET a path from one instance through `/cluster/<instance>`, whatever the balancer would choose."""
        status, headers, body = self.ask(f"/cluster/{instance}{path}")
        assert (status, headers["X-Pixel-Instance"]) == (200, instance)
        return json.loads(body)


@pytest.fixture(scope="session")
def inventory() -> str:
    """The default inventory."""
    return "inventory/local"


@pytest.fixture(scope="session")
def client(fleet: dict[str, Any]) -> Client:
    """A client outside the fleet that knows only the balancer's address."""
    return Client(fleet["url"])


class Viewer:
    """A stream client that keeps a copy of the canvas, as the live page does."""

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
        """The value of a channel in the viewer's copy."""
        return self.canvas[(y * self._width + x) * 3 + "RGB".index(channel)]

    def sees(self, true: Callable[[Viewer], bool], seconds: float) -> None:
        """Wait until a condition on the viewer holds; fail after `seconds`."""
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
                # Resume after the last event received.
                connection.request("GET", "/events", headers={"Last-Event-ID": self.event})
                answer = connection.getresponse()
                if answer.status != 200:
                    self.faults.append(f"refused with {answer.status}")
                    time.sleep(0.2)
                else:
                    self._read(answer)
            except (OSError, http.client.HTTPException) as error:
                # A clean end of the stream (a last chunk) raises nothing and is no fault.
                self.faults.append(f"broken: {error!r}")
            finally:
                connection.close()

    def _read(self, answer: http.client.HTTPResponse) -> None:
        self.instances.append(answer.headers["X-Pixel-Instance"])
        rest = b""
        # Reads are short: a status event arrives every two seconds.
        while not self._stop.is_set() and (part := answer.read1()):
            *frames, rest = (rest + part).split(b"\n\n")
            for frame in frames:
                fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if line != ":")
                if "id" in fields:
                    self._apply(fields)

    def _apply(self, fields: dict[str, str]) -> None:
        if "event" in fields:
            self.faults.append(f"resync at {fields['id']}")
        for x, y, channel, value in json.loads(fields["data"]):
            self.canvas[(y * self._width + x) * 3 + "RGB".index(channel)] = value
        self.event = fields["id"]


@pytest.fixture
def requests(fleet: dict[str, Any], tmp_path: Path) -> Any:
    """A context under load: no write may be lost or undone, or fail (except for a slow disk).

    With `strict=False` writes may fail. The context's value contains bench.load's report at the end.
    """

    @contextmanager
    def load(strict: bool = True) -> Iterator[dict[str, Any]]:
        path = tmp_path / "load.json"
        options = ("--rate", "200", "--seconds", "900", "--writers", "16", "--json", str(path))
        sending = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.load", "--url", fleet["url"], "--forgive-disk", *options),
                *(["--strict"] if strict else []),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        report: dict[str, Any] = {}
        try:
            yield report
        finally:
            # On SIGINT, bench.load stops sending, waits for answers, and compares the canvas with its ledger.
            sending.send_signal(signal.SIGINT)
            output, _ = sending.communicate(timeout=60)
        assert sending.returncode == 0, output
        report |= json.loads(path.read_text())

    return load


@pytest.fixture
def viewer(fleet: dict[str, Any]) -> Callable[[], Viewer]:
    """Return a factory of viewers that stream through the balancer."""
    return lambda: Viewer(fleet["url"])


@pytest.fixture
def watched(client: Client, viewer: Callable[[], Viewer]) -> Any:
    """A context in which a viewer follows the stream; at its end the viewer's canvas equals the server's."""

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
