"""The API through the balancer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["c5"]

ROOT = Path(__file__).resolve().parents[3]

PIXEL = {"x": 10, "y": 20, "channel": "R", "value": 255}


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"value": 256}, 422, "value"),
        ({"value": -1}, 422, "value"),
        ({"value": "255"}, 422, "value"),
        ({"channel": "A"}, 422, "channel"),
        ({"channel": "r"}, 422, "channel"),
        ({"x": 1024}, 422, "x"),
        ({"y": None}, 422, "y"),
    ],
)
def test_an_invalid_pixel_is_refused_and_nothing_is_written(
    client: Any, change: dict[str, Any], status: int, field: str
) -> None:
    before = client.ask("/pixel/10/20")[2]
    invalid = {name: value for name, value in (PIXEL | change).items() if value is not None}
    answered, headers, body = client.ask("/pixel", json.dumps(invalid).encode())
    assert answered == status
    assert headers["Content-Type"] == "application/problem+json"
    assert field in [error["field"] for error in json.loads(body)["errors"]]
    assert client.ask("/pixel/10/20")[2] == before


def test_a_body_that_is_not_json_is_refused(client: Any) -> None:
    status, headers, body = client.ask("/pixel", b"x=1&y=2")
    assert (status, json.loads(body)["title"]) == (400, "Bad Request")
    assert headers["Content-Type"] == "application/problem+json"


def test_requests_are_shared_by_weight(client: Any) -> None:
    seen = Counter(client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(100))
    assert 57 <= seen["c5"] <= 63
    assert seen["c5"] + seen["t2"] == 100


def test_the_upstream_follows_the_inventory(host: Any, fleet: dict[str, Any]) -> None:
    config = host.check_output("nginx -T 2>/dev/null")
    assert "server unix:/run/pixel.sock weight=3 max_fails=10 fail_timeout=1s; # c5" in config
    address = fleet["hosts"]["t2"]["address"]
    assert f"server {address}:8000 weight=2 max_fails=10 fail_timeout=1s; # t2" in config


def test_two_thousand_connections_are_held_and_served(fleet: dict[str, Any]) -> None:
    """bench.load uses all connections in turn, and exits with 1 if a write failed, was lost or was undone."""
    load = [sys.executable, "-m", "bench.load", "--url", fleet["url"], "--writers", "16"]
    plan = ["--strict", "--forgive-disk", "--connections", "2000", "--rate", "500", "--seconds", "10"]
    done = subprocess.run([*load, *plan], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2000 opened, 0 closed by the service" in done.stdout


def test_an_operators_address_may_read_the_metrics(client: Any) -> None:
    """Scenario edge tests that other addresses may not."""
    status, _, body = client.ask("/metrics")
    assert (status, body[:6]) == (200, "# HELP")


def test_the_documentation_is_served(client: Any) -> None:
    assert client.ask("/docs")[0] == 200
    assert "/pixel" in json.loads(client.ask("/openapi.json")[2])["paths"]


def test_a_pixel_posted_to_one_host_appears_in_the_stream_of_the_other(client: Any, viewer: Any) -> None:
    """Both the write and the stream go through the balancer."""
    with ExitStack() as stack:
        viewers: dict[str, Any] = {}
        for _ in range(20):
            if len(viewers) == 2:
                break
            opened = stack.enter_context(viewer())
            viewers[opened.instances[0]] = opened
        for number in range(20):
            before = time.monotonic()
            pixel = PIXEL | {"x": 200, "y": number, "value": 1 + time.time_ns() % 255}
            # Name the host: streams count as requests in flight, so least_conn would favour one.
            poster, other_host = ("c5", "t2") if number % 2 else ("t2", "c5")
            status, headers, _ = client.ask(f"/cluster/{poster}/pixel", json.dumps(pixel).encode())
            assert (status, headers["X-Pixel-Instance"]) == (200, poster)
            other = viewers[other_host]
            other.sees(lambda it, y=number, to=pixel["value"]: it.channel(200, y, "R") == to, 3)
            # Usual: hundredths of a second. A buffering proxy would delay the event without end.
            assert time.monotonic() - before < 3


def test_the_live_page_is_the_same_from_all_hosts(client: Any) -> None:
    tags: Counter[tuple[str, str]] = Counter()
    for _ in range(10):
        status, headers, _ = client.ask("/live/main.js")
        assert status == 200
        assert headers["Cache-Control"] == "no-cache"
        tags[headers["ETag"], headers["X-Pixel-Instance"]] += 1
    assert len({tag for tag, _ in tags}) == 1
    assert {instance for _, instance in tags} == {"c5", "t2"}
    _, headers, page = client.ask("/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert 'id="board"' in page


def test_a_restart_ends_streams_cleanly_and_they_resume_on_the_other_host(
    client: Any, watched: Any, state: Path
) -> None:
    """As in a deploy: host by host, during writes. The viewer misses no event, and no connection breaks."""
    number = 0
    with watched() as viewer:
        for name in ("c5", "t2"):
            restart = subprocess.Popen(
                ["ssh", "-F", str(state / "ssh_config"), name, "sudo systemctl restart pixel"]
            )
            # Until the host serves, as a deploy does.
            while restart.poll() is None or client.ask(f"/cluster/{name}/readyz")[0] != 200:
                number += 1
                batch = [PIXEL | {"x": number % 1024, "y": y, "value": number % 256} for y in range(50)]
                assert client.ask("/pixels", json.dumps(batch).encode())[0] == 200
            assert restart.returncode == 0
        assert len(viewer.instances) > 1
