"""Status of the fleet when some instances misbehave."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import RedisServer
from starlette.testclient import TestClient

from pixel.app import create_app

STATEMENT = {
    "instance": "t2",
    "port": 8000,
    "release": "r1",
    "uptime_s": 1.0,
    "workers": 4,
    "load": [0.1, 0.2, 0.3],
    "redis_ms": 0.5,
    "writes": 7,
    "viewers": 0,
}


class StandIn:
    """A server that sends the same answer to every request."""

    def __init__(self, answer: bytes, *, hang: float = 0, reset: bool = False) -> None:
        self._answer, self._hang, self._reset = answer, hang, reset
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor()
        self._pool.submit(self._accept)

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            if self._over.is_set():
                connection.close()
                return
            self._pool.submit(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            if self._reset:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return
            self._over.wait(self._hang)
            connection.sendall(self._answer)

    def close(self) -> None:
        self._over.set()
        socket.create_connection(self._server.getsockname()).close()
        self._pool.shutdown()
        self._server.close()


def http(status: str, body: bytes, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


GOOD = http("200 OK", json.dumps(STATEMENT).encode())
BAD = {
    "an error": (http("500 Internal Server Error", b"oops"), "status 500"),
    "garbage": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "something else"),
    "no JSON": (http("200 OK", b"<html>"), "something else"),
    "no statement": (http("200 OK", b'{"instance":"t2"}'), "something else"),
    "bad bytes": (http("200 OK", b'{"instance":"\xff"}'), "something else"),
    "half an answer": (http("200 OK", b"{", length=100), "something else"),
    "nothing": (b"", "something else"),
    "too much": (http("200 OK", b" " * 1_000_000), "too much"),
}


@pytest.fixture
def good() -> Iterator[StandIn]:
    server = StandIn(GOOD)
    yield server
    server.close()


@pytest.fixture
def hanging() -> Iterator[StandIn]:
    server = StandIn(GOOD, hang=30)
    yield server
    server.close()


@pytest.fixture
def resetting() -> Iterator[StandIn]:
    server = StandIn(b"", reset=True)
    yield server
    server.close()


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def fleet(redis_server: RedisServer, *peers: str) -> TestClient:
    return TestClient(create_app(redis_server.settings(instance="c5", peers=json.dumps(peers))))


def test_an_instance_reports_its_status(client: TestClient) -> None:
    client.post("/pixel", json={"x": 1, "y": 1, "channel": "R", "value": 1})
    own = client.get("/fleet/self").json()
    assert own.keys() == STATEMENT.keys()
    assert (own["instance"], own["release"]) == ("c5", "r1")
    assert own["writes"] >= 1
    assert 0 < own["redis_ms"] < 800
    assert 0 <= own["uptime_s"] < 600
    # A fleet of one.
    assert client.get("/fleet/all").json()["instances"][0]["instance"] == "c5"
    assert client.get("/fleet/first").json()["instance"] == "c5"


def test_all_instances_are_asked_at_once(redis_server: RedisServer) -> None:
    slow = [StandIn(GOOD, hang=0.3) for _ in range(5)]
    with fleet(redis_server, *(server.url for server in slow)) as client:
        started = time.monotonic()
        answer = client.get("/fleet/all")
        assert time.monotonic() - started < 1
    assert answer.status_code == 200
    assert answer.json() == {"instances": [STATEMENT] * 5}
    for server in slow:
        server.close()


@pytest.mark.parametrize("kind", BAD)
def test_an_instance_that_answers_wrongly_is_named(
    redis_server: RedisServer, good: StandIn, kind: str
) -> None:
    answer_bytes, cause = BAD[kind]
    bad = StandIn(answer_bytes)
    with fleet(redis_server, good.url, bad.url) as client:
        answer = client.get("/fleet/all?timeout=2000")
        assert answer.status_code == 502
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["instances"] == [STATEMENT]
        assert [failure["peer"] for failure in problem["failures"]] == [bad.url]
        assert cause in problem["failures"][0]["cause"]
        # The first success counts, even after failures.
        assert client.get("/fleet/first").json() == STATEMENT
    bad.close()


def test_an_instance_that_is_down_or_resets_is_named(
    redis_server: RedisServer, good: StandIn, resetting: StandIn, closed_port: str
) -> None:
    with fleet(redis_server, closed_port, good.url, resetting.url) as client:
        answer = client.get("/fleet/all")
        assert answer.status_code == 502
        assert answer.json()["instances"] == [STATEMENT]
        causes = {failure["peer"]: failure["cause"] for failure in answer.json()["failures"]}
        assert causes.keys() == {closed_port, resetting.url}
        assert all(cause.startswith("can't be reached: ") for cause in causes.values())
        assert client.get("/fleet/first").json() == STATEMENT


def test_a_late_instance_delays_fleet_all_but_not_fleet_first(
    redis_server: RedisServer, good: StandIn, hanging: StandIn
) -> None:
    with fleet(redis_server, hanging.url, good.url) as client:
        started = time.monotonic()
        assert client.get("/fleet/first").json() == STATEMENT
        assert time.monotonic() - started < 1
        answer = client.get("/fleet/all?timeout=200")
        assert time.monotonic() - started < 2
        assert answer.status_code == 504
        assert answer.json()["instances"] == [STATEMENT]
        assert answer.json()["failures"] == [{"peer": hanging.url, "cause": "is late"}]


def test_fleet_first_fails_only_if_all_instances_fail(
    redis_server: RedisServer, hanging: StandIn, closed_port: str, resetting: StandIn
) -> None:
    with fleet(redis_server, closed_port, resetting.url) as client:
        answer = client.get("/fleet/first")
        assert answer.status_code == 502
        assert len(answer.json()["failures"]) == 2
    with fleet(redis_server, closed_port, hanging.url) as client:
        answer = client.get("/fleet/first?timeout=200")
        assert answer.status_code == 504
        assert [failure["peer"] for failure in answer.json()["failures"]] == [
            closed_port,
            hanging.url,
        ]


def test_requests_to_the_fleet_are_bounded(
    redis_server: RedisServer, hanging: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixel.routes.fleet.FAN_OUTS", 2)
    with fleet(redis_server, hanging.url) as client, ThreadPoolExecutor() as pool:
        asked = [pool.submit(client.get, f"/fleet/{n}?timeout=800") for n in ("all", "first")]
        time.sleep(0.3)
        for path in ("/fleet/all", "/fleet/first"):
            started = time.monotonic()
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert time.monotonic() - started < 0.3
        assert [answer.result().status_code for answer in asked] == [504, 504]
        assert client.get("/fleet/all?timeout=1").status_code == 504


@pytest.mark.parametrize("timeout", ["0", "60001", "-1", "x", "", "1.5"])
@pytest.mark.parametrize("path", ["/fleet/all", "/fleet/first"])
def test_a_timeout_is_1_to_60000_milliseconds(client: TestClient, path: str, timeout: str) -> None:
    answer = client.get(f"{path}?timeout={timeout}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "timeout"


def test_an_instance_without_redis_still_reports_its_status(fragile_redis: RedisServer) -> None:
    with TestClient(create_app(fragile_redis.settings(instance="c5"))) as client:
        fragile_redis.kill()
        answer = client.get("/fleet/self")
        assert answer.status_code == 200
        assert answer.json()["redis_ms"] is None
