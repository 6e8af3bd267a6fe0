"""Attempts at a write: each has its own time stamp, and a retry goes to another host."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]

Ask = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def ask(curl: Any) -> Ask:
    """Send a request through the balancer on its own host; returns status, headers (lower case) and body."""

    def run(
        path: str = "/pixel", method: str = "POST", body: str = "a body"
    ) -> tuple[int, dict[str, str], str]:
        answer: tuple[int, dict[str, str], str] = curl(path, method, body, "X-Request-Start: 1 6.6.6.6:80")
        return answer

    return run


@pytest.fixture
def behave(shell: Any, fleet: dict[str, Any]) -> Iterator[Callable[[str, str], None]]:
    """Set a backend's behaviour for writes; see backend.py."""

    def run(name: str, behaviour: str) -> None:
        shell(f"echo {behaviour} >/run/behaviour", on=name)

    yield run
    for name in fleet["hosts"]:
        shell("rm -f /run/behaviour", on=name)
    # Nginx forgets a backend's failures after `fail_timeout`.
    time.sleep(2)


def test_the_balancer_serves_its_clock(ask: Ask) -> None:
    status, _, body = ask("/lb/clock", "GET", "")
    assert status == 200
    assert abs(float(body) - time.time()) < 5


def test_an_attempt_is_stamped_and_a_clients_stamp_is_replaced(ask: Ask, address: str) -> None:
    status, headers, body = ask()
    assert status == 200
    stamp = json.loads(body)["headers"]["X-Request-Start"].split()
    assert abs(float(stamp[0]) - time.time()) < 5
    assert stamp[1:] == [f"{address}:80"]
    assert "x-accel-redirect" not in headers


@pytest.mark.parametrize(
    ("behaviour", "mark", "seconds"),
    [("no", [], 0), ("maybe", ["maybe"], 0), ("break", ["wait"], 0), ("hang", ["maybe"], 2)],
)
def test_a_write_that_one_host_does_not_serve_is_retried_on_the_other_with_a_new_stamp(
    ask: Ask, behave: Callable[[str, str], None], behaviour: str, mark: list[str], seconds: float
) -> None:
    behave("debian13", behaviour)
    marks = []
    for _ in range(8):
        began = time.time()
        status, headers, body = ask()
        assert (status, headers["x-pixel-instance"]) == (200, "debian12")
        seen = json.loads(body)
        assert (seen["method"], seen["body"]) == ("POST", "a body")
        stamp = seen["headers"]["X-Request-Start"].split()
        marks.append(stamp[2:])
        # The other host is a balancer too. A retry states the request's age.
        sent, _, age = stamp[0].partition("/")
        assert sent.startswith("+")
        if marks[-1] or (not mark and float(sent) > began + seconds):
            assert float(sent) >= began + seconds - 0.1
        assert age or not marks[-1]
        assert float(age or 0) >= (seconds - 0.1 if marks[-1] else 0)
        assert "x-pixel-written" not in headers
    if mark:
        # Some requests were first sent to the failing host, others were not.
        assert {tuple(each) for each in marks} == {(), tuple(mark)}
    else:
        assert marks == [[]] * 8


def test_the_host_that_refused_is_asked_again_if_the_other_one_cannot_be_reached(
    host: Any, ask: Ask, behave: Callable[[str, str], None], shell: Any, fleet: dict[str, Any], address: str
) -> None:
    """As when a host has just died: only a later attempt shows that it doesn't answer."""
    here = host.check_output("hostname")
    [other] = set(fleet["hosts"]) - {here}
    shell(f"ip route add blackhole {address}", on=other)
    try:
        behave(here, "no")
        answers = [ask() for _ in range(6)]
    finally:
        shell(f"ip route del blackhole {address}", on=other)
    assert {(status, headers.get("x-pixel-instance")) for status, headers, _ in answers} == {(503, here)}


def test_a_refusal_by_all_hosts_is_passed_to_the_client(
    ask: Ask, behave: Callable[[str, str], None], fleet: dict[str, Any]
) -> None:
    for name in fleet["hosts"]:
        behave(name, "no")
    status, headers, body = ask()
    assert status == 503
    assert "x-accel-redirect" not in headers
    stamp = json.loads(body)["headers"]["X-Request-Start"].split()
    assert len(stamp) == 2


def test_connections_that_break_on_all_hosts_are_answered_502(
    ask: Ask, behave: Callable[[str, str], None], fleet: dict[str, Any]
) -> None:
    for name in fleet["hosts"]:
        behave(name, "break")
    status, headers, body = ask()
    assert (status, json.loads(body)["title"]) == (502, "Bad Gateway")
    assert headers["retry-after"] == "1"


def test_a_request_to_a_cluster_is_not_retried_elsewhere(
    ask: Ask, behave: Callable[[str, str], None]
) -> None:
    behave("debian13", "no")
    for _ in range(4):
        status, headers, _ = ask("/cluster/t2/pixel")
        assert (status, headers["x-pixel-instance"]) == (503, "debian13")
