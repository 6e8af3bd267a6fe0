"""Role nginx_lb with other variables: balancing by a key, and combinations that it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

VARIABLES = {
    "nginx_lb_sticky": True,
    "nginx_lb_method": "hash",
    "nginx_lb_hash_key": "$http_x_own",
    "nginx_lb_health_checks": False,
}
testinfra_hosts = ["debian12", "debian13"]


ITEMS = [f"/pixel/{x}/{x * 7 % 100}" for x in range(60)]


def owners(host: Any) -> dict[str, str]:
    """Return the instance that answers for each item; assert that a second request gets the same one."""
    words = " ".join(ITEMS * 2)
    seen = json.loads(host.check_output(f"client each {words}"))
    assert seen[: len(ITEMS)] == seen[len(ITEMS) :]
    return dict(zip(ITEMS, seen, strict=False))


def test_an_item_keeps_its_instance_and_only_items_of_a_drained_host_move(host: Any) -> None:
    before = owners(host)
    assert set(before.values()) == {"debian12", "debian13"}
    host.check_output("pixel-lb drain debian13")
    try:
        while_drained = owners(host)
    finally:
        host.check_output("pixel-lb undrain debian13")
    assert set(while_drained.values()) == {"debian12"}
    assert owners(host) == before


def test_balancers_agree_on_an_items_instance(host: Any, state: Path) -> None:
    before = owners(host)
    (other,) = {"debian12", "debian13"} - {host.backend.hostname}
    ask = ["ssh", "-F", str(state / "ssh_config"), other, "client", "each", *ITEMS]
    done = subprocess.run(ask, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == list(before.values())


def test_the_hash_key_selects_the_instance(host: Any) -> None:
    def who(value: str) -> str:
        answer = json.loads(host.check_output(f"client one /who GET '' 'X-Own: {value}'"))
        instance: str = answer[1]["x-pixel-instance"]
        return instance

    values = [f"value-{number}" for number in range(20)]
    first = [who(value) for value in values]
    assert set(first) == {"debian12", "debian13"}
    assert [who(value) for value in values] == first
