"""Runs of role firewall that change the rules. Each playbook runs once for both hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

NAMES = ("debian12", "debian13")
PUBLIC = [22, 80, 443]
# Ports of the fleet, and one that no role uses.
OTHERS = [8000, 6379, 9100, 9113, 9115, 9121, 9090, 9093, 5000]


# Not the whole table: it contains a set of the clients that are connected now.
RULES = "nft list chain inet pixel input; nft list set inet pixel fleet"


@pytest.fixture
def both(hosts: dict[str, Any]) -> dict[str, Any]:
    """The hosts with the firewall."""
    return {name: hosts[name] for name in NAMES}


@pytest.fixture
def seen(ports_seen: Any) -> Callable[[], list[list[int]]]:
    """The ports of both hosts that host `stranger` can connect to."""
    return lambda: [ports_seen("stranger", name, [*PUBLIC, *OTHERS]) for name in NAMES]


@pytest.fixture
def firewall(play: Any) -> Any:
    """Run firewall.yml with the scenario's variables."""
    scenario = yaml.safe_load((Path(__file__).parents[1] / "vars" / "main.yml").read_text())
    own = {name: value for name, value in scenario.items() if name.startswith("firewall_")}

    def run(*arguments: str, **variables: Any) -> Any:
        return play("playbooks/firewall.yml", *arguments, **(own | variables))

    return run


def test_rules_that_lock_the_operator_out_are_rolled_back(both: Any, firewall: Any, seen: Any) -> None:
    """The former rules are restored without a connection."""
    rules = [host.check_output(RULES) for host in both.values()]
    done = firewall(firewall_ssh_networks=["203.0.113.0/24"], firewall_rollback=20)
    assert done.returncode != 0
    # Ansible was locked out; if its attempt takes long, it connects after the former rules were restored.
    last = done.stdout.split("fatal:")[0].rsplit("TASK", 1)[-1]
    assert "Reconnect under the new rules" in last or "The former rules have been restored." in done.stdout
    for _ in range(30):
        if all(22 in ports for ports in seen()):
            break
        time.sleep(1)
    assert [host.check_output(RULES) for host in both.values()] == rules
    for host in both.values():
        assert "203.0.113" not in host.file("/etc/pixel-firewall/rules.nft").content_string
    # The next run corrects what is staged.
    assert firewall().returncode == 0
    for host in both.values():
        assert "203.0.113" not in host.file("/etc/pixel-firewall/staged.nft").content_string


def test_the_rules_can_be_removed_and_restored(firewall: Any, seen: Any) -> None:
    # The manual's command: text, not a boolean.
    assert firewall("-e", "firewall_enabled=false").returncode == 0
    assert seen() == [[*PUBLIC, *OTHERS]] * 2
    done = firewall()
    assert done.returncode == 0
    assert "reset_connection" not in done.stdout + done.stderr
    assert seen() == [PUBLIC] * 2


def test_another_firewall_is_reported(both: Any, firewall: Any) -> None:
    for host in both.values():
        host.run_expect([0], "mkdir -p /etc/ufw && echo ENABLED=yes >/etc/ufw/ufw.conf")
    try:
        failures = firewall().failures()
        assert set(failures) == set(both)
        for name, message in failures.items():
            assert f"{name} has ufw active" in message
    finally:
        for host in both.values():
            host.run_expect([0], "rm -r /etc/ufw")
