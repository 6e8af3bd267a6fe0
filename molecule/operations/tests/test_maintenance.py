"""Maintenance under load: what is refused and how it is reported, on all hosts and after a reboot."""

from __future__ import annotations

import json
import re
import time
from typing import Any

testinfra_hosts = ["c5"]

PIXEL = json.dumps({"x": 1, "y": 2, "channel": "G", "value": 3}).encode()


def test_read_only_refuses_writes_and_nothing_else_and_off_ends_it(
    client: Any, play: Any, requests: Any, shell: Any, watched: Any
) -> None:
    with watched() as viewer, requests(strict=False) as report:
        try:
            started = play("playbooks/maintenance.yml", "-e", "state=read-only", message="Back at 22:00.")
            assert started.returncode == 0, started.words
            time.sleep(1)
            event = viewer.event
            for instance in ("c5", "t2"):
                status, headers, body = client.ask(f"/cluster/{instance}/pixel", PIXEL)
                assert (status, headers["Retry-After"]) == (503, "10")
                assert json.loads(body)["detail"] == "Back at 22:00; nothing was written."
                client.read_from(instance, "/pixel/1/2")
            # A worker that starts obeys too, and the host stays in the balancer.
            shell("systemctl restart pixel", on="t2")
            for _ in range(60):
                if client.ask("/cluster/t2/ping")[0] == 200:
                    break
                time.sleep(0.5)
            assert client.ask("/cluster/t2/pixel", PIXEL)[0] == 503
            time.sleep(3)
            status = play("playbooks/status.yml")
            assert "MAINTENANCE read-only since 20" in status.words
            assert ": Back at 22:00." in status.words
            assert len(re.findall(r" active +up ", status.stdout)) == 2
            assert viewer.event == event
        finally:
            ended = play("playbooks/maintenance.yml", "-e", "state=off")
        assert ended.returncode == 0, ended.words
        assert client.ask("/pixel", PIXEL)[0] == 200
    assert set(report["errors"]) == {"status 503"}
    assert "MAINTENANCE" not in play("playbooks/status.yml").words


def test_on_refuses_the_api_but_not_health_checks(client: Any, play: Any) -> None:
    assert play("playbooks/maintenance.yml", "-e", "state=on").returncode == 0
    try:
        assert play("playbooks/maintenance.yml", "-e", "state=on").changes() == {"c5": 0, "t2": 0}
        for path in ("/pixel/1/2", "/events", "/canvas.png?x=7"):
            status, _, body = client.ask(path)
            assert (status, json.loads(body)["maintenance"]) == (503, "on")
        for path in ("/", "/readyz", "/healthz", "/ping"):
            assert client.ask(path)[0] == 200
    finally:
        assert play("playbooks/maintenance.yml", "-e", "state=off").returncode == 0
    assert client.ask("/pixel/1/2")[0] == 200


def test_an_unknown_state_is_refused(play: Any) -> None:
    for arguments, fault in (
        (("-e", "state=readonly"), "There is no state 'readonly'."),
        ((), "No state is given. Use -e state=read-only"),
    ):
        refused = play("playbooks/maintenance.yml", *arguments)
        assert refused.returncode != 0
        assert fault in refused.words
