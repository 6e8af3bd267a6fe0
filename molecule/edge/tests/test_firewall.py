"""Ports open to outside clients and to the fleet. A service listens on every port tested."""

from __future__ import annotations

import json
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]

PUBLIC = [22, 80, 443]
FLEET = [8000, 6379, 9100, 9113, 9115, 9121, 9090, 9093]
UNKNOWN = 5000


@pytest.fixture
def seen(ports_seen: Any, host: Any) -> Any:
    """The ports of the host under test that answer another host."""
    return lambda other: ports_seen(other, host.backend.hostname, [*PUBLIC, *FLEET, UNKNOWN])


def test_every_port_has_a_listener(host: Any) -> None:
    listening = {
        int(line.split()[3].rsplit(":", 1)[1]) for line in host.check_output("ss -Hltn").splitlines()
    }
    assert listening >= {*PUBLIC, *FLEET, UNKNOWN}


def test_outside_clients_reach_public_ports_only(seen: Any) -> None:
    assert seen("stranger") == PUBLIC


def test_fleet_hosts_reach_the_fleets_ports(seen: Any, host: Any) -> None:
    (other,) = {"debian12", "debian13"} - {host.backend.hostname}
    assert seen(other) == PUBLIC + FLEET


def test_the_rules_are_loaded_at_boot(host: Any, seen: Any) -> None:
    unit = host.service("pixel-firewall")
    assert unit.is_enabled
    assert "network-pre.target" in unit.systemd_properties["Before"]
    host.run_expect([0], "systemctl stop pixel-firewall")
    assert UNKNOWN in seen("stranger")
    host.run_expect([0], "systemctl start pixel-firewall")
    assert seen("stranger") == PUBLIC


def test_other_tables_are_left_alone(host: Any) -> None:
    host.run_expect([0], "nft add table inet others")
    try:
        host.run_expect([0], "systemctl reload pixel-firewall")
        assert "table inet others" in host.check_output("nft list tables")
    finally:
        host.run_expect([0], "nft delete table inet others")


def test_connections_of_one_client_are_bounded_before_they_have_sent_a_request(
    shell: Any, host: Any, address: str, fleet: dict[str, Any]
) -> None:
    """The limit of 500 is set in vars/main.yml. Nginx counts only requests with a complete header."""
    network = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0]
    assert json.loads(shell(f"visitor half {address} {network}.200 600", on="stranger")) == 500
    assert json.loads(shell(f"visitor half {address} {network}.201 50", on="stranger")) == 50


def test_further_protocols_are_open_between_fleet_hosts(host: Any) -> None:
    rules = host.check_output("nft list chain inet pixel input")
    assert "ip saddr @fleet udp dport 5001 accept" in rules
    assert "ip saddr @fleet meta l4proto vrrp accept" in rules or "l4proto 112" in rules
