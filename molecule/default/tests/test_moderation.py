"""Moderation through the balancer and by playbook, and the API's description against the fleet."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

testinfra_hosts = ["c5"]

Ask = Callable[..., tuple[int, Any, Any]]


@pytest.fixture(scope="module")
def moderator(play: Any) -> Iterator[str]:
    """The token of a key with all scopes."""
    name = f"moderator-{int(time.time())}"
    done = play("playbooks/keys.yml", create=name, scopes="paint,batch,moderate")
    [token] = re.findall(r"pixel_[A-Za-z0-9_-]{43}", done.words)
    time.sleep(2)
    yield token
    play("playbooks/keys.yml", revoke=name)


@pytest.fixture
def ask(fleet: dict[str, Any]) -> Ask:
    """Send a request with JSON or without a body; returns status, headers and the decoded answer."""

    def send(method: str, path: str, token: str = "", body: Any = None, **lines: str) -> tuple[int, Any, Any]:
        headers = lines | ({"Authorization": f"Bearer {token}"} if token else {})
        content = None if body is None else json.dumps(body).encode()
        headers |= {} if body is None else {"Content-Type": "application/json"}
        url = path if path.startswith("http") else fleet["url"] + path
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, content, headers, method=method), timeout=20
            ) as answer:
                return answer.status, answer.headers, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    return send


def test_an_operator_protects_an_area_and_blocks_a_client(
    play: Any, ask: Ask, moderator: str, fleet: dict[str, Any]
) -> None:
    colour = {"R": 1, "G": 2, "B": 3}

    def statuses(path: str, **options: Any) -> Counter[int]:
        """The answers of all workers of all hosts."""
        return Counter(
            ask("PUT", f"http://{host['address']}:8000{path}", body=colour, **options)[0]
            for host in fleet["hosts"].values()
            for _ in range(20)
        )

    done = play("playbooks/moderate.yml", protect="900,900,8,8", reason="The logo")
    assert done.changes() == {"c5": 1}
    time.sleep(2)
    assert statuses("/pixel/907/907") == {403: 40}
    assert statuses("/pixel/908/907") == {200: 40}
    assert statuses("/pixel/907/907", token=moderator) == {200: 40}
    _, _, problem = ask("PUT", "/pixel/900/900", body=colour)
    assert problem["detail"] == "The area 900,900,8,8 is protected: The logo; nothing was written."

    play("playbooks/moderate.yml", block="addr:192.0.2.7", time="12h").changes()
    time.sleep(2)
    blocked = {"X-Forwarded-For": "192.0.2.7"}
    assert statuses("/pixel/1/1", **blocked) == {403: 40}
    assert statuses("/pixel/1/1", **{"X-Forwarded-For": "192.0.2.8"}) == {200: 40}

    listed = play("playbooks/moderate.yml")
    assert listed.changes() == {"c5": 0}
    _, _, restrictions = ask("GET", "/moderation", moderator)
    for item in (*restrictions["areas"], *restrictions["blocks"]):
        assert item["by"].startswith("operator:")
        assert item["id"] in listed.words
        play("playbooks/moderate.yml", lift=item["id"]).changes()
    time.sleep(2)
    assert statuses("/pixel/907/907", **blocked) == {200: 40}
    acts = ask("GET", "/moderation/acts?limit=4", moderator)[2]
    assert [act["did"] for act in acts] == ["remove", "remove", "block", "protect"]


def test_a_faulty_command_says_why(play: Any) -> None:
    for variables, message in (
        ({"protect": "1,2,3"}, "area must be x,y,width,height"),
        ({"block": "addr:192.0.2.7"}, "-e time=12h"),
        ({"block": "nobody", "time": "1h"}, "must be key:NAME or addr:ADDRESS"),
        ({"lift": "00000000"}, "no area or block with this ID"),
        ({"lift": "00000000", "reason": "a"}, "belongs to protect and block"),
        ({"protect": "0,0,1,1", "acts": "true"}, "Name one action"),
    ):
        done = play("playbooks/moderate.yml", **variables)
        assert done.returncode != 0
        assert message in done.words


def test_a_moderator_undoes_over_http(ask: Ask, moderator: str) -> None:
    before = ask("GET", "/pixel/740/7")[2]
    since = ask("GET", "/history?limit=1")[2]["changes"][0]["time"]
    time.sleep(0.1)
    other = {channel: (before[channel] + 9) % 256 for channel in "RGB"}
    assert ask("PUT", "/pixel/740/7", body=other)[0] == 200
    wanted = {"area": "735,0,10,20", "since": since}
    end = time.monotonic() + 20
    while ask("POST", "/history/undo", moderator, wanted)[2]["changed"] != 3:
        assert time.monotonic() < end
    authors = ask("GET", f"/history/authors?area=735,0,10,20&since={since}", moderator)[2]["authors"]
    assert [one["changes"] for one in authors] == [3]
    status, _, done = ask("POST", "/history/undo", moderator, wanted | {"apply": True})
    assert (status, done["changed"], done["next"]) == (200, 3, None)
    assert ask("GET", "/pixel/740/7")[2] == before
    assert ask("POST", "/history/undo", "", wanted)[0] == 401


# Rules that a schema can't express; see app/tests/test_openapi.py.
RELATED = {
    "/canvas.rgb",
    "/canvas.png",
    "/moderation/areas",
    "/moderation/blocks",
    "/history",
    "/history/authors",
    "/history/undo",
}


def integers(body: Any) -> Any:
    """A body in which integral floats, which JSON Schema accepts as integers, are integers."""
    if isinstance(body, dict):
        return {name: integers(value) for name, value in body.items()}
    if isinstance(body, list):
        return [integers(value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


@pytest.fixture(scope="module")
def description(fleet: dict[str, Any], moderator: str) -> Iterator[Any]:
    """The fleet's description of its API, whose requests change little."""
    schema = schemathesis.openapi.from_url(f"{fleet['url']}/openapi.json").exclude(path="/events")
    schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413", "415", "422"]
    # The test sends a key itself.
    schema.config.generation.update(with_security_parameters=False)

    @schema.hook
    def map_body(context: schemathesis.HookContext, body: Any) -> Any:
        operation = context.operation
        assert operation is not None
        if operation.path == "/history/undo" and isinstance(body, dict) and body.get("apply") is True:
            return integers(body) | {"apply": False}
        return integers(body)

    yield schema
    # Areas that were protected.
    headers = {"Authorization": f"Bearer {moderator}"}
    request = urllib.request.Request(f"{fleet['url']}/moderation", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        restrictions = json.load(answer)
    for kind, items in restrictions.items():
        for item in items:
            url = f"{fleet['url']}/moderation/{kind}/{item['id']}"
            urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="DELETE"), timeout=10)


@settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=strategies.data())
def test_the_fleet_answers_as_described(description: Any, moderator: str, data: Any) -> None:
    """No request makes a 500, valid ones are accepted, and a 405 has an Allow, also through Nginx."""
    operations = [result.ok() for result in description.get_all_operations()]
    case = data.draw(strategies.sampled_from(operations).flatmap(lambda each: each.as_strategy()))
    excluded = [positive_data_acceptance] if case.path in RELATED else []
    if case.path.startswith("/fleet/"):
        excluded.append(not_a_server_error)  # a timeout of milliseconds is a 504
    case.call_and_validate(headers={"Authorization": f"Bearer {moderator}"}, excluded_checks=excluded)


def test_a_method_that_nginx_refuses_has_an_allow(ask: Ask) -> None:
    status, headers, problem = ask("TRACE", "/ping")
    assert (status, problem["title"]) == (405, "Method Not Allowed")
    assert "GET" in headers["Allow"]
