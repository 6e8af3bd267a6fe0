"""What of a host is open, to strangers and to the fleet; on every port something listens."""

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
    """The ports of the host under test that answer another host."""
    ports = " ".join(map(str, [*PUBLIC, *FLEET, UNKNOWN]))
    return lambda other: json.loads(shell(f"visitor ports {address} {ports}", on=other))


@pytest.fixture
def firewall(play: Any, host: Any) -> Any:
    """Run its playbook for the host under test."""
    limit = ("--limit", host.backend.hostname)
    # As the scenario configures it.
    scenario = yaml.safe_load((Path(__file__).parents[1] / "vars" / "main.yml").read_text())
    own = {name: value for name, value in scenario.items() if name.startswith("firewall_")}

    def run(*arguments: str, **variables: Any) -> Any:
        return play("playbooks/firewall.yml", *limit, *arguments, **(own | variables))

    return run


def test_everything_listens(host: Any) -> None:
    listening = {
        int(line.split()[3].rsplit(":", 1)[1]) for line in host.check_output("ss -Hltn").splitlines()
    }
    assert listening >= {*PUBLIC, *FLEET, UNKNOWN}


def test_a_stranger_reaches_what_is_public(seen: Any) -> None:
    assert seen("stranger") == PUBLIC


def test_the_fleet_reaches_its_own(seen: Any, host: Any) -> None:
    (other,) = {"debian12", "debian13"} - {host.backend.hostname}
    assert seen(other) == PUBLIC + FLEET


def test_the_rules_are_there_after_a_boot(host: Any, seen: Any) -> None:
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


def test_who_locks_himself_out_gets_in_again(host: Any, firewall: Any, seen: Any) -> None:
    """The rules come back by themselves, without a connection."""
    rules = host.check_output("nft list table inet pixel")
    done = firewall(firewall_ssh_networks=["203.0.113.0/24"], firewall_rollback=20)
    assert done.returncode != 0
    # It was locked out; where a try takes long, it gets in by the former rules, which are back by then.
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


def test_it_can_be_taken_away(firewall: Any, seen: Any) -> None:
    # As the manual has it: text, not a boolean.
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
    """What vars/main.yml sets: 500. Nginx counts complete headers only."""
    network = fleet["hosts"]["stranger"]["address"].rsplit(".", 1)[0]
    assert json.loads(shell(f"visitor half {address} {network}.200 600", on="stranger")) == 500
    assert json.loads(shell(f"visitor half {address} {network}.201 50", on="stranger")) == 50


def test_the_fleet_speaks_further_protocols(host: Any) -> None:
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
