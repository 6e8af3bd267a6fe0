"""playbooks/keys.yml, and what keys and budgets do on all hosts of the fleet."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest

testinfra_hosts = ["c5"]

INSTANCES = ("c5", "t2")
PIXEL = b'{"x":5,"y":5,"channel":"R","value":9}'
TOKEN = re.compile(r"pixel_[A-Za-z0-9_-]{43}")


@pytest.fixture
def keys(play: Any) -> Iterator[Callable[..., str]]:
    """Run playbooks/keys.yml; return the token, if it shows one. Keys are revoked after the test."""
    created = set()

    def run(**variables: str) -> str:
        done = play("playbooks/keys.yml", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        if "create" in variables:
            created.add(variables["create"])
        found = TOKEN.findall(done.words)
        assert len(found) == (1 if {"create", "rotate"} & set(variables) else 0)
        return found[0] if found else ""

    yield run
    for name in created:
        play("playbooks/keys.yml", revoke=name)


def send(url: str, body: bytes, **headers: str) -> tuple[int, Any, Any]:
    """Send a POST; return status, headers and the decoded answer."""
    lines = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, lines), timeout=10) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def name_of(purpose: str) -> str:
    """A name that no earlier run has used: revoked keys keep theirs."""
    return f"{purpose}-{int(time.time())}"


def test_a_key_lives_on_all_hosts_from_its_creation_to_its_end(
    keys: Callable[..., str], play: Any, fleet: dict[str, Any], hosts: dict[str, Any], shell: Any
) -> None:
    def statuses(token: str) -> Counter[int]:
        """The answers of all workers of all hosts."""
        return Counter(
            send(f"{fleet['url']}/cluster/{name}/pixel", PIXEL, Authorization=f"Bearer {token}")[0]
            for name in INSTANCES
            for _ in range(20)
        )

    name = name_of("alice")
    token = keys(create=name, scopes="paint,batch", expires="1h")
    time.sleep(2)
    assert statuses(token) == {200: 40}
    status, _, answer = send(f"{fleet['url']}/pixels", b"[%b]" % PIXEL, Authorization=f"Bearer {token}")
    assert (status, answer["written"]) == (200, 1)
    listed = play("playbooks/keys.yml")
    assert listed.changes() == dict.fromkeys(listed.changes(), 0)
    assert re.search(rf"{name} +valid +paint,batch +none +", listed.stdout)

    rotated = keys(rotate=name)
    time.sleep(2)
    assert statuses(token) == {401: 40}
    assert statuses(rotated) == {200: 40}

    keys(revoke=name)
    time.sleep(2)
    assert statuses(rotated) == {401: 40}
    _, headers, problem = send(f"{fleet['url']}/pixel", PIXEL, Authorization=f"Bearer {rotated}")
    assert headers["WWW-Authenticate"] == 'Bearer realm="pixel", error="invalid_token"'
    assert problem["written"] == "no"

    # Nginx writes its log once a second.
    time.sleep(1.5)
    for host in hosts:
        for secret in (token, rotated):
            # The script comes by standard input, so the search itself leaves no trace.
            found = shell(
                f"journalctl --quiet --no-pager --since=-15min | grep -c -e '{secret}'\n"
                f"grep -r -c -e '{secret}' /var/log /etc /run/systemd 2>/dev/null | grep -v ':0$'",
                on=host,
            )
            assert found.split() == ["0"]


def test_a_faulty_command_says_why(play: Any) -> None:
    for variables, message in (
        ({"create": "bob"}, "-e scopes=paint,batch,moderate"),
        ({"create": "bob", "scopes": "rule"}, "unknown scope 'rule'"),
        ({"revoke": "nobody"}, "there is no key nobody"),
        ({"create": "bob", "revoke": "bob"}, "Name one action"),
    ):
        done = play("playbooks/keys.yml", **variables)
        assert done.returncode != 0
        assert message in done.words


def test_a_budget_is_one_for_all_hosts(keys: Callable[..., str], fleet: dict[str, Any]) -> None:
    token = keys(create=name_of("bot"), scopes="paint", per_minute="1", burst="30")
    time.sleep(2)
    answers = []
    for _, name in zip(range(60), cycle(INSTANCES), strict=False):
        url = f"{fleet['url']}/cluster/{name}/pixel"
        answers.append(send(url, PIXEL, Authorization=f"Bearer {token}"))
    # One more if a minute has passed meanwhile.
    assert Counter(status for status, _, _ in answers) in ({200: 30, 429: 30}, {200: 31, 429: 29})
    _, headers, problem = answers[-1]
    assert headers["RateLimit-Policy"] == '"writes";q=30;w=1800'
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert "1 channel writes a minute, and 30 at once" in problem["detail"]


def test_a_client_without_a_key_has_the_budget_of_its_address(fleet: dict[str, Any]) -> None:
    """The operator's network is exempt; so the test sends as a balancer does, for another client."""
    _, headers, _ = send(f"{fleet['url']}/pixel", PIXEL)
    assert headers["RateLimit"] is None

    def write(name: str, client: str, size: int) -> tuple[int, Any]:
        url = f"http://{fleet['hosts'][name]['address']}:8000/pixels"
        status, headers, _ = send(url, b"[%b]" % b",".join([PIXEL] * size), X_Forwarded_For=client)
        return status, headers["RateLimit"]

    network = f"2001:db8:{int(time.time()) % 65536:x}:1:"
    assert write("c5", f"{network}:1", 10_000)[0] == 429
    assert write("c5", f"{network}:1", 3_000)[0] == 200
    assert write("t2", f"{network}:2", 2_900)[0] == 200
    assert write("c5", f"{network}:3", 3_000)[0] == 429
    assert write("t2", f"{network}:4", 3_000)[0] == 429
    assert write("t2", f"{network[:-2]}2::1", 3_000)[0] == 200
