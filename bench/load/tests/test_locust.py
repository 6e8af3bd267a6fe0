"""The users of locustfile.py detect wrong answers with status 200."""

import csv
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

SIDE = 256
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class Wrong(BaseHTTPRequestHandler):
    """A service whose answers are wrong in different ways, except for the page and the canvas."""

    protocol_version = "HTTP/1.1"
    stopped = threading.Event()
    asked: ClassVar[Counter[str]] = Counter()
    painted: ClassVar[list[tuple[int, int, str, int]]] = []

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, status: int = 200, event: str = "9-0", tag: str = '"a"') -> None:
        self.send_response(status)
        headers = {
            "X-Pixel-Event": event,
            "X-Pixel-Width": SIDE,
            "X-Pixel-Height": SIDE,
            "ETag": tag,
        }
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        given = self.rfile.read(int(self.headers["Content-Length"] or 0))
        known = self.headers["If-None-Match"]
        path, _, query = self.path.partition("?")
        self.asked[path] += 1
        if path == "/":
            self.send(b"" if known else b'<script src="live/main.js">', 304 if known else 200)
        elif path == "/live/main.js":
            self.send(b"", 304 if known and self.asked[path] % 2 else 200)
        elif path == "/canvas.rgb":
            self.send(b"" if known else bytes(SIDE * SIDE * 3), 304 if known else 200)
        elif path == "/canvas.png" and known:
            self.send(b"", 304, event="4-9")
        elif path == "/canvas.png":
            self.send(PNG + bytes(8))
        elif path == "/events":
            self.stream(query.removeprefix("after="))
        elif path == "/pixels":
            self.send(b'{"status":"ok","written":1}')
        elif path == "/pixel":
            pixel = json.loads(given)
            echo = {"status": "ok", "received": pixel | {"value": pixel["value"] ^ 1}}
            self.send(json.dumps(echo).encode())
        else:
            x, y = map(int, path.split("/")[2:])
            colour = json.loads(given) if given else {"R": 0, "G": 0, "B": 0}
            wrong = self.command == "GET" or x % 2
            self.painted.append((x, y, "R", 0))
            self.send(json.dumps({"x": x + wrong, "y": y} | colour).encode())

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - so http.server names them

    def stream(self, after: str) -> None:
        """Starts at a wrong event if resumed; otherwise lacks a pixel, breaks off, or is correct."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        first, turn = after or "1-0", self.asked["/events"] % 3
        self.chunk(b"id: %b\ndata: []\n\n" % first.encode())
        if turn == 1:
            self.chunk(b"id: 9-1\ndata: %b\n\n" % json.dumps(self.painted).encode())
        while turn and not self.stopped.wait(0.5):
            self.chunk(b'event: status\ndata: {"viewers":1,"writes":0.0}\n\n')

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign] # users disconnect
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Wrong.stopped.set()
        server.shutdown()
        thread.join()


WRONG = {
    ("GET /live/{name} (again)", "ETag and status contradict"),
    ("GET /canvas.png", "wrong size"),
    ("GET /canvas.png (again)", "older than an answer before it"),
    ("GET /pixel/{x}/{y}", "another pixel"),
    ("POST /pixel", "another write is acknowledged"),
    ("PUT /pixel/{x}/{y}", "another pixel is acknowledged"),
    ("POST /pixels", "not all written"),
    ("GET /events", "a pixel is missing"),
    ("GET /events", "Response ended prematurely"),
    ("GET /events (resumed)", "begins at another event"),
}


def failures(file: Path) -> set[tuple[str, str]]:
    """Returns the failed requests and their errors."""
    if not file.exists():
        return set()
    with file.open() as lines:
        return {
            (f"{row['Method']} {row['Name']}", row["Error"].split("(")[-1].strip("'\")"))
            for row in csv.DictReader(lines)
        }


def test_every_wrong_answer_is_a_failure(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "--locustfile", "locustfile.py", "--headless"]
    plan = ["--users", "60", "--spawn-rate", "60", "--run-time", "60s", "--only-summary"]
    users = subprocess.Popen(
        [*command, *plan, "--host", url, "--csv", str(tmp_path / "locust")],
        cwd=Path(__file__).parents[1],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while users.poll() is None and not failures(tmp_path / "locust_failures.csv") >= WRONG:
        time.sleep(0.5)
    users.terminate()
    output, _ = users.communicate(timeout=20)
    assert failures(tmp_path / "locust_failures.csv") == WRONG, output
    assert "Traceback" not in output
    assert users.returncode == 1
