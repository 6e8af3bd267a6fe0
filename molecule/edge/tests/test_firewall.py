"""Ports open to outside clients and to the fleet. A service listens on every port tested."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

testinfra_hosts = ["debian12", "debian13"]

PUBLIC = [22, 80, 443]
FLEET = [8000, 6379, 9100, 9113, 9121, 9090, 9093]
UNKNOWN = 5000


@pytest.fixture
def seen(shell: Any, address: str) -> Any:
    """Return the ports of the host under test that another host can connect to."""
    ports = " ".join(map(str, [*PUBLIC, *FLEET, UNKNOWN]))
    return lambda other: json.loads(shell(f"visitor ports {address} {ports}", on=other))


@pytest.fixture
def firewall(play: Any, host: Any) -> Any:
    """Run playbooks/firewall.yml for the host under test, with the scenario's variables."""
    limit = ("--limit", host.backend.hostname)

    scenario = yaml.safe_load((Path(__file__).parents[1] / "vars" / "main.yml").read_text())
    own = {name: value for name, value in scenario.items() if name.startswith("firewall_")}

    def run(*arguments: str, **variables: Any) -> Any:
        return play("playbooks/firewall.yml", *limit, *arguments, **(own | variables))

    return run


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


def test_rules_that_lock_the_operator_out_are_rolled_back(host: Any, firewall: Any, seen: Any) -> None:
    """The host restores the former rules without a connection."""
    rules = host.check_output("nft list table inet pixel")
    done = firewall(firewall_ssh_networks=["203.0.113.0/24"], firewall_rollback=20)
    assert done.returncode != 0
    # The reconnect fails, or, if it takes long, succeeds by the rules restored meanwhile.
    last = done.stdout.split("fatal:")[0].rsplit("TASK", 1)[-1]
    assert "Reconnect under the new rules" in last or "The former rules have been restored." in done.stdout
    for _ in range(30):
        if 22 in seen("stranger"):
            break
        time.sleep(1)
    assert host.check_output("nft list table inet pixel") == rules
    assert "203.0.113" not in host.file("/etc/pixel-firewall/rules.nft").content_string
    # The next run corrects what is staged.
    assert firewall().returncode == 0
    assert "203.0.113" not in host.file("/etc/pixel-firewall/staged.nft").content_string


def test_the_firewall_can_be_removed(firewall: Any, seen: Any) -> None:
    # As in the manual: a string, not a boolean.
    assert firewall("-e", "firewall_enabled=false").returncode == 0
    assert seen("stranger") == [*PUBLIC, *FLEET, UNKNOWN]
    done = firewall()
    assert done.returncode == 0
    assert "reset_connection" not in done.stdout + done.stderr
    assert seen("stranger") == PUBLIC


def test_rules_that_were_changed_by_hand_are_repaired(host: Any, firewall: Any, seen: Any) -> None:
    host.run_expect([0], "nft delete table inet pixel")
    host.run_expect([0], "sed -i 's/policy drop/policy accept/' /etc/pixel-firewall/staged.nft")
    shown = firewall("--check", "--diff")
    assert shown.changes() == {host.backend.hostname: 1}
    assert "policy accept" in shown.stdout
    assert seen("stranger") == [*PUBLIC, *FLEET, UNKNOWN]
    assert firewall().returncode == 0
    assert seen("stranger") == PUBLIC
    assert firewall().changes() == {host.backend.hostname: 0}


def test_connections_of_one_client_are_bounded_before_they_have_sent_a_request(
    shell: Any, host: Any, address: str, fleet: dict[str, Any]
) -> None:
    """The limit of 500 is set in vars/main.yml. Nginx counts only requests with a complete header."""
    network = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0]
    assert json.loads(shell(f"visitor half {address} {network}.200 600", on="stranger")) == 500
    assert json.loads(shell(f"visitor half {address} {network}.201 50", on="stranger")) == 50


def test_further_protocols_are_open_between_fleet_hosts(host: Any) -> None:
    rules = host.check_output("nft list table inet pixel")
    assert "ip saddr @fleet udp dport 5001 accept" in rules
    assert "ip saddr @fleet meta l4proto vrrp accept" in rules or "l4proto 112" in rules


def test_another_firewall_is_named(host: Any, firewall: Any) -> None:
    host.run_expect([0], "mkdir -p /etc/ufw && echo ENABLED=yes >/etc/ufw/ufw.conf")
    try:
        done = firewall()
        assert done.returncode != 0
        assert f"{host.backend.hostname} has ufw active" in done.words
    finally:
        host.run_expect([0], "rm -r /etc/ufw")
