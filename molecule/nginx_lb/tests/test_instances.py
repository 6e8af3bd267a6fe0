"""Role nginx_lb with two instances on one host and one on the other."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

VARIABLES = {
    "pixel_app_instances": "{{ 2 if inventory_hostname == 'debian12' else 1 }}",
    "nginx_lb_method": "round_robin",
    "nginx_lb_sticky": True,
    "nginx_lb_health_checks": False,
}
INSTANCES = {"debian12": ["debian12", "debian12-8001"], "debian13": ["debian13"]}
testinfra_hosts = ["debian12", "debian13"]


@pytest.fixture
def many(host: Any) -> Any:
    """Send `count` requests in sequence; return how many each instance answered."""
    return lambda count, path="/who": Counter(json.loads(host.check_output(f"client many {count} {path}")))


def test_a_second_run_changes_nothing(play: Any) -> None:
    assert play("playbooks/nginx_lb.yml", **VARIABLES).changes() == {"debian12": 0, "debian13": 0}


def test_the_instances_of_a_host_share_its_weight(many: Any) -> None:
    # Hosts have weights 3 and 2, so the instances have 1.5, 1.5 and 2: as integers 3, 3 and 4.
    assert many(100) == {"debian12": 30, "debian12-8001": 30, "debian13": 40}


def test_each_instance_has_its_own_server_line(host: Any, fleet: dict[str, Any]) -> None:
    config = host.check_output("nginx -T 2>/dev/null")
    address = fleet["hosts"]["debian12"]["address"]
    own = host.backend.hostname == "debian12"
    addresses = {
        "debian12": "unix:/run/pixel.sock" if own else f"{address}:8000",
        "debian12-8001": "unix:/run/pixel-8001.sock" if own else f"{address}:8001",
    }
    for name, where in addresses.items():
        assert f"server {where} weight=3 max_fails=10 fail_timeout=1s; # {name}" in config
    # The hash ring lists the same addresses on all balancers.
    for port in (8000, 8001):
        assert f"server {address}:{port} weight=3" in config


def test_a_drain_removes_all_instances_of_a_host(host: Any, many: Any) -> None:
    assert host.check_output("pixel-lb drain debian12") == "changed"
    try:
        states = json.loads(host.check_output("pixel-lb status"))["backends"]
        drained = [name for name, backend in states.items() if backend["state"] == "drained"]
        assert drained == INSTANCES["debian12"]
        assert many(20) == {"debian13": 20}
        assert host.run("pixel-lb drain debian13").rc == 3
    finally:
        assert host.check_output("pixel-lb undrain debian12") == "changed"
    assert many(50) == {"debian12": 15, "debian12-8001": 15, "debian13": 20}


def test_a_dead_instance_fails_no_request_and_the_other_one_still_serves(shell: Any, many: Any) -> None:
    shell("systemctl stop backend-8001", on="debian12")
    try:
        assert set(many(40)) == {"debian12", "debian13"}
    finally:
        shell("systemctl start backend-8001", on="debian12")
