"""Maintenance: what is refused, how workers learn of it, and the command that changes it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from conftest import RedisServer, Service, wait_until
from starlette.testclient import TestClient

from pixel.app import create_app
from pixel.maintenance import RETRY_AFTER
from pixel.names import MAINTENANCE

PIXEL = {"x": 1, "y": 2, "channel": "G", "value": 3}
WRITES = (
    ("POST", "/pixel", PIXEL),
    ("PUT", "/pixel/1/2", {"R": 1, "G": 2, "B": 3}),
    ("POST", "/pixels", [PIXEL]),
)
READS = ("/pixel/1/2", "/canvas.png", "/canvas.rgb")
ALWAYS = ("/healthz", "/readyz", "/metrics", "/ping", "/fleet/self", "/", "/live/main.js", "/openapi.json")


def maintain(url: str, *arguments: str) -> dict[str, Any]:
    """Run the command as playbooks/maintenance.yml does; return what it prints."""
    done = _maintain(url, *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _maintain(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": "src",
        "PIXEL_REDIS_URL": url,
        "PIXEL_REDIS_USERNAME": "pixel",
        "PIXEL_REDIS_PASSWORD": "correct-horse",
    }
    command = [sys.executable, "-m", "pixel.maintenance", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def statuses(client: Any) -> list[int]:
    """The status of each of WRITES, then of each of READS."""
    written = [client.request(method, path, json=body).status_code for method, path, body in WRITES]
    return written + [client.get(path).status_code for path in READS]


def becomes(client: Any, *expected: int) -> None:
    wait_until(lambda: statuses(client) == list(expected))


@pytest.mark.parametrize("way", ["protocol", "routes"])
def test_states_and_what_they_refuse(
    way: str, redis_server: RedisServer, start_service: Callable[..., Service]
) -> None:
    """Both ways of a request: at level debug, all go through FastAPI."""
    level = "debug" if way == "routes" else "info"
    service = start_service(redis_server.url, PIXEL_WORKERS="1", PIXEL_LOG_LEVEL=level)
    with httpx.Client(base_url=service.url, timeout=20) as client:
        assert statuses(client) == [200] * 6

        assert maintain(redis_server.url, "read-only", "New disks until 22:00.")["changed"]
        becomes(client, 503, 503, 503, 200, 200, 200)
        event = client.get("/canvas.rgb").headers["x-pixel-event"]
        for method, path, body in WRITES:
            answer = client.request(method, path, json=body)
            assert answer.headers["retry-after"] == str(RETRY_AFTER)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json() == {
                "type": "about:blank",
                "title": "Service Unavailable",
                "status": 503,
                "detail": "New disks until 22:00; nothing was written.",
                "written": "no",
                "maintenance": "read-only",
            }
        assert client.get("/canvas.rgb").headers["x-pixel-event"] == event

        maintain(redis_server.url, "on")
        becomes(client, *[503] * 6)
        refusal = client.get("/pixel/1/2")
        assert refusal.json()["detail"] == "The service is in maintenance."
        assert refusal.headers["retry-after"] == str(RETRY_AFTER)
        assert client.get("/events").status_code == 503
        assert [client.get(path).status_code for path in ALWAYS] == [200] * len(ALWAYS)
        assert client.get("/readyz").json()["maintenance"]["state"] == "on"
        assert 'pixel_maintenance_workers{state="on"} 1.0' in client.get("/metrics").text

        maintain(redis_server.url, "off")
        becomes(client, *[200] * 6)
        assert client.get("/canvas.rgb").headers["x-pixel-event"] != event
    wait_until(lambda: "maintenance is off" in service.output())
    if way == "protocol":
        assert service.output().count("was answered 503") == 0


def test_streams_end_when_maintenance_begins_and_are_told_of_read_only(
    redis_server: RedisServer, start_service: Callable[..., Service]
) -> None:
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    httpx.get(f"{service.url}/readyz", timeout=20)
    with httpx.stream("GET", f"{service.url}/events", timeout=20) as stream:
        lines = stream.iter_lines()
        maintain(redis_server.url, "read-only", "Moving")
        notices = (
            json.loads(line.removeprefix("data: "))["maintenance"] for line in lines if '"viewers"' in line
        )
        assert "Moving" in notices
        maintain(redis_server.url, "on")
        assert list(lines) is not None  # the stream ends
    wait_until(lambda: httpx.get(f"{service.url}/events").status_code == 503)
    maintain(redis_server.url, "off")

    def opens() -> bool:
        with httpx.stream("GET", f"{service.url}/events", timeout=20) as stream:
            return stream.status_code == 200

    wait_until(opens)


def test_a_worker_obeys_from_its_first_request_and_while_redis_is_away(
    fragile_redis: RedisServer, start_service: Callable[..., Service]
) -> None:
    maintain(fragile_redis.url, "read-only", "Moving")
    service = start_service(fragile_redis.url, PIXEL_WORKERS="1")
    assert httpx.post(f"{service.url}/pixel", json=PIXEL, timeout=20).json()["maintenance"] == "read-only"
    fragile_redis.kill()
    time.sleep(1.5)
    assert httpx.post(f"{service.url}/pixel", json=PIXEL).json()["maintenance"] == "read-only"
    # A worker that starts while Redis is away refuses writes until it knows the state.
    service.stop()
    service.start()
    answer = httpx.post(f"{service.url}/pixel", json=PIXEL, timeout=20)
    assert (answer.status_code, "maintenance" in answer.json()) == (503, False)
    fragile_redis.start()
    seen = []
    end = time.monotonic() + 3
    while time.monotonic() < end:
        answer = httpx.post(f"{service.url}/pixel", json=PIXEL)
        seen.append((answer.status_code, answer.json().get("maintenance")))
    assert {status for status, _ in seen} == {503}
    assert seen[-1][1] == "read-only"


def test_an_invalid_state_counts_as_off_only_if_there_was_no_other(redis_server: RedisServer) -> None:
    with redis_server.admin() as admin:
        admin.set(MAINTENANCE, "{}x")
    with TestClient(create_app(redis_server.settings())) as client:
        assert statuses(client) == [200] * 6
        maintain(redis_server.url, "on")
        becomes(client, *[503] * 6)
        with redis_server.admin() as admin:
            admin.set(MAINTENANCE, '{"state":"sometimes"}')
        time.sleep(1.5)
        assert statuses(client) == [503] * 6


def test_the_command_reports_and_changes_the_state(redis_server: RedisServer) -> None:
    url = redis_server.url
    assert maintain(url) == {"state": "off", "message": "", "since": "", "changed": False}
    first = maintain(url, "on", "Ünïcode “quotes” 'and' \"these\"")
    assert first["changed"]
    assert maintain(url, "on", first["message"]) == first | {"changed": False}
    assert maintain(url) == first | {"changed": False}
    assert maintain(url, "on", "Another")["changed"]
    maintain(url, "off")
    with redis_server.admin() as admin:
        assert admin.get(MAINTENANCE) == b""  # a backup doesn't count it as content
    for arguments, fault in (
        (("later",), "invalid choice: 'later'"),
        (("on", "x" * 201), "at most 200 characters"),
        (("on", "two\nlines"), "one line"),
        (("off", "done"), "leave it out"),
    ):
        refused = _maintain(url, *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert fault in refused.stderr
    away = _maintain("redis://127.0.0.1:1", "on")
    assert away.returncode == 1
    assert away.stderr.startswith("pixel.maintenance: Redis can't be used: ")
