"""The API through the balancer, as its users see it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
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
def test_a_bad_pixel_is_refused_and_nothing_is_written(
    client: Any, change: dict[str, Any], status: int, field: str
) -> None:
    before = client.ask("/pixel/10/20")[2]
    wrong = {name: value for name, value in (PIXEL | change).items() if value is not None}
    got, headers, body = client.ask("/pixel", json.dumps(wrong).encode())
    assert got == status
    assert headers["Content-Type"] == "application/problem+json"
    assert field in [error["field"] for error in json.loads(body)["errors"]]
    assert client.ask("/pixel/10/20")[2] == before


def test_what_is_not_json_is_refused(client: Any) -> None:
    status, headers, body = client.ask("/pixel", b"x=1&y=2")
    assert (status, json.loads(body)["title"]) == (400, "Bad Request")
    assert headers["Content-Type"] == "application/problem+json"


def test_requests_are_shared_by_weight(client: Any) -> None:
    seen = Counter(client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(100))
    assert 57 <= seen["c5"] <= 63
    assert seen["c5"] + seen["t2"] == 100


def test_the_upstream_is_the_inventorys(host: Any, fleet: dict[str, Any]) -> None:
    config = host.check_output("nginx -T 2>/dev/null")
    assert "server unix:/run/pixel.sock weight=3 max_fails=10 fail_timeout=1s; # c5" in config
    address = fleet["hosts"]["t2"]["address"]
    assert f"server {address}:8000 weight=2 max_fails=10 fail_timeout=1s; # t2" in config


def test_two_thousand_connections_are_held_and_served(fleet: dict[str, Any]) -> None:
    """`load.py` writes on all of them by turns, and ends with 1 if one write failed or was lost."""
    load = [sys.executable, ROOT / "bench" / "load.py", "--url", fleet["url"], "--strict"]
    plan = ["--connections", "2000", "--rate", "500", "--seconds", "10"]
    done = subprocess.run([*load, *plan], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2000 opened, 0 closed by the service" in done.stdout


def test_the_operator_sees_the_metrics(client: Any) -> None:
    """That others don't is tested in scenario edge, where there are others."""
    status, _, body = client.ask("/metrics")
    assert (status, body[:6]) == (200, "# HELP")


def test_the_documentation_is_there(client: Any) -> None:
    assert client.ask("/docs")[0] == 200
    assert "/pixel" in json.loads(client.ask("/openapi.json")[2])["paths"]
