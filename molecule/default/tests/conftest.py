"""HTTP and stream clients that reach the fleet through the balancer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.load.follower import Follower

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
def viewer(fleet: dict[str, Any]) -> Callable[[], Follower]:
    """Return a factory of viewers that stream through the balancer."""
    return lambda: Follower(fleet["url"])


@pytest.fixture
def watched(client: Client, viewer: Callable[[], Follower]) -> Any:
    """A context in which a viewer follows the stream; at its end the viewer's canvas equals the server's."""

    @contextmanager
    def watch() -> Iterator[Follower]:
        with viewer() as watching:
            yield watching
            fresh = urllib.request.Request(f"{client.url}/canvas.rgb", headers={"Cache-Control": "no-cache"})
            answer = urllib.request.urlopen(fresh, timeout=10)
            canvas, event = answer.read(), answer.headers["X-Pixel-Event"]
            watching.sees(lambda viewer: viewer.event == event, 5)
        assert watching.faults == []
        assert watching.canvas == canvas

    return watch
