"""A viewer's copy of the canvas, tested with an event service whose streams are scripts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.load.follower import Differences, Follower

WIDTH, HEIGHT = 4, 2
CANVAS = bytes(range(WIDTH * HEIGHT * 3))
Script = list[bytes]


class Service(ThreadingHTTPServer):
    """Serves pictures of the canvas, the last of which stays, and one script for each stream."""

    daemon_threads = True

    def __init__(self, pictures: list[tuple[str, bytes]], scripts: list[Script]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pictures = pictures
        self.scripts = iter(scripts)
        self.resumed: list[str] = []
        self.stopped = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        if self.path == "/canvas.rgb":
            event, body = (
                self.server.pictures.pop(0) if len(self.server.pictures) > 1 else self.server.pictures[0]
            )
            self.send_response(200)
            for name, value in {"Width": str(WIDTH), "Event": event}.items():
                self.send_header(f"X-Pixel-{name}", value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        script = next(self.server.scripts, None)
        self.send_response(503 if script is None else 200)
        self.send_header("X-Pixel-Instance", f"stream {len(self.server.resumed)}")
        self.end_headers()
        if script is not None:
            self.server.resumed.append(self.headers["Last-Event-ID"])
            self.wfile.write(b"".join(script))
            if script[-1:] == [OPEN]:
                self.server.stopped.wait(10)

    def log_message(self, *_: object) -> None:
        pass


OPEN = b": \n\n"  # a stream that ends with this stays open


@contextmanager
def serving(pictures: list[tuple[str, bytes]], *scripts: Script) -> Iterator[tuple[Service, str]]:
    with Service(pictures, list(scripts)) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service, f"http://127.0.0.1:{service.server_port}"
        finally:
            service.stopped.set()
            service.shutdown()
            thread.join()


def change(number: int, x: int, y: int, channel: str, value: int) -> bytes:
    return b'id: %d-0\ndata: [[%d,%d,"%b",%d]]\n\n' % (number, x, y, channel.encode(), value)


def with_value(at: int, value: int) -> bytes:
    canvas = bytearray(CANVAS)
    canvas[at] = value
    return bytes(canvas)


def follow(service: Service, url: str, event: str) -> Follower:
    """Follows until an event, and ends."""
    with Follower(url) as follower:
        follower.sees(lambda each: each.event == event, 5)
        service.stopped.set()
    return follower


def test_the_copy_follows_the_stream_across_connections() -> None:
    first = [change(2, 1, 0, "G", 100)]
    with serving([("1-0", CANVAS)], first, [change(3, 1, 0, "G", 101), OPEN]) as (service, url):
        follower = follow(service, url, "3-0")
    assert service.resumed[:2] == ["1-0", "2-0"]
    assert follower.instances[:2] == ["stream 0", "stream 1"]
    assert follower.channel(1, 0, "G") == 101
    assert follower.differences(with_value(4, 101)) == Differences(0, 0)


@pytest.mark.parametrize(
    ("true", "differences"),
    [
        (with_value(4, 102), Differences(1, 0)),  # a value that it has not received
        (with_value(4, 100), Differences(0, 1)),  # the former value: 101 was never on the canvas
        (CANVAS, Differences(0, 1)),  # the value of the snapshot
    ],
)
def test_what_differs_is_missing_or_was_never_there(true: bytes, differences: Differences) -> None:
    script = [change(2, 1, 0, "G", 100), change(3, 1, 0, "G", 101), OPEN]
    with serving([("1-0", CANVAS)], script) as (service, url):
        follower = follow(service, url, "3-0")
    assert follower.differences(true) == differences


def test_after_a_resync_the_canvas_is_fetched_again() -> None:
    newer = with_value(0, 77)
    diverged = [change(2, 1, 0, "G", 100), b"event: resync\nid: 9-0\ndata: []\n\n", OPEN]
    pictures = [("1-0", CANVAS), ("9-0", newer)]
    with serving(pictures, diverged, [change(10, 0, 1, "R", 5), OPEN]) as (service, url):
        follower = follow(service, url, "10-0")
    assert service.resumed[:2] == ["1-0", "9-0"]
    assert follower.channel(1, 0, "G") == CANVAS[4]
    assert follower.channel(0, 0, "R") == 77
    assert [fault for fault in follower.faults if "resync" in fault] == ["resync at 9-0"]


def test_a_silent_stream_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.follower.SILENCE", 0.2)
    with serving([("1-0", CANVAS)], [OPEN], [change(2, 1, 0, "G", 100), OPEN]) as (service, url):
        follower = follow(service, url, "2-0")
    assert follower.faults[0].startswith("broken: TimeoutError")
