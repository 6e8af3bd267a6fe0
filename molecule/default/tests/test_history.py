"""The history: authors and times over HTTP, deploys and kills of its service, undo by playbook."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

testinfra_hosts = ["c5"]

STATE = "/history/state"


def paint(client: Any, x: int, y: int, value: int) -> None:
    pixel = {"x": x, "y": y, "channel": "R", "value": value}
    assert client.ask("/pixel", json.dumps(pixel).encode())[0] == 200


def history(client: Any, path: str) -> Any:
    """The answer to a question about the history, once the balancer accepts it."""
    while True:
        status, headers, body = client.ask(path)
        if status == 200:
            return json.loads(body)
        assert status in (429, 502, 503), body
        time.sleep(int(headers["Retry-After"] or 1))


def wait_for(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.3)


def values(client: Any, x: int, y: int) -> list[int]:
    return [change["value"] for change in history(client, f"/pixel/{x}/{y}/history")["changes"]]


def test_the_history_listens_on_the_private_address_only(host: Any, address: str) -> None:
    assert host.service("pixel-history").is_enabled
    listening = {line.split()[3] for line in host.check_output("ss -Hltn").splitlines()}
    assert {one for one in listening if one.endswith(":8100")} == {f"{address}:8100"}


def test_the_history_is_readable_by_its_user_only(host: Any) -> None:
    assert host.run("sudo -u pixel cat /var/lib/pixel-history/history.sqlite").rc != 0
    assert host.file("/var/lib/pixel-history").user == "pixel-history"


def test_a_painted_pixel_is_in_the_history(client: Any) -> None:
    before = values(client, 700, 1)
    paint(client, 700, 1, 77)
    wait_for(lambda: values(client, 700, 1) == [77, *before])


def test_prometheus_reads_the_lag(host: Any, address: str) -> None:
    query = f"promtool query instant http://{address}:9090 pixel_history_lag_seconds"

    def lag() -> list[float]:
        return [float(number) for number in re.findall(r"=> ([0-9.]+) @", host.check_output(query))]

    wait_for(lambda: lag() and max(lag()) < 10, 60)


def test_an_undo_by_playbook_counts_and_then_restores(client: Any, play: Any) -> None:
    before = (values(client, 710, 5) or [0])[0]
    since = history(client, "/history?limit=1")["changes"][0]["time"]
    time.sleep(0.1)
    paint(client, 710, 5, (before + 9) % 256)
    wait_for(lambda: values(client, 710, 5)[:1] == [(before + 9) % 256])
    selection = {"area": "705,0,10,20", "since": since}
    counted = play("playbooks/undo.yml", **selection)
    assert counted.changes() == {"c5": 0}
    assert "1 channels would be given their former value" in counted.words
    assert "Nothing was changed: add -e apply=true" in counted.words
    assert values(client, 710, 5)[0] == (before + 9) % 256
    done = play("playbooks/undo.yml", apply="true", **selection)
    assert done.changes() == {"c5": 1}
    status, _, pixel = client.ask("/pixel/710/5")
    assert (status, json.loads(pixel)["R"]) == (200, before)
    wait_for(lambda: values(client, 710, 5)[0] == before)
    newest = history(client, "/pixel/710/5/history")["changes"][0]
    assert newest["author"].startswith("operator:")
    refused = play("playbooks/undo.yml")
    assert "Choose what to undo" in refused.words
    assert refused.returncode != 0


def test_addresses_are_shown_to_operators_only(host: Any, client: Any) -> None:
    paint(client, 730, 1, 5)
    show = "pixel-history show --area 730,1,1,1 --limit 5"
    wait_for(lambda: host.check_output(show))
    assert re.match(r"20\S+Z 730,1 R 5 (unknown|addr:[0-9a-f.:]+)$", host.check_output(show).splitlines()[0])
    assert "addr:" not in client.ask("/history?area=730,1,1,1")[2]


def test_a_history_that_is_killed_again_and_again_misses_nothing(host: Any, client: Any) -> None:
    """Each acknowledged change is in the history once."""
    stop = threading.Event()
    written: list[tuple[int, int, int]] = []

    def write() -> None:
        while not stop.is_set():
            place = len(written)
            paint(client, 800 + place % 200, place // 200, place % 256)
            written.append((800 + place % 200, place // 200, place % 256))

    started = history(client, STATE)
    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(20):
        time.sleep(0.7)
        host.run("systemctl kill --signal=KILL pixel-history; systemctl start pixel-history")
    stop.set()
    writer.join()
    wait_for(lambda: history(client, STATE)["changes"] >= started["changes"] + len(written))
    state = history(client, STATE)
    assert state["changes"] == started["changes"] + len(written)
    assert state["gaps"] == started["gaps"]
    found: list[tuple[int, int, int]] = []
    after = ""
    while len(found) < len(written):
        page = history(client, f"/history?limit=1000{after}")
        found += [(change["x"], change["y"], change["value"]) for change in page["changes"]]
        after = f"&after={page['next']}"
    assert found[: len(written)] == written[::-1]
