"""What clients notice when the holder of the address fails, and who holds it afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

testinfra_hosts = ["debian12"]

LISTEN = """
import socket, time
listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112)
listener.settimeout(0.2)
end, seen = time.time() + 3, set()
while time.time() < end:
    try:
        seen.add(listener.recvfrom(99)[1][0])
    except TimeoutError:
        pass
print(*seen)
"""
# Advertisements with the highest priority.
SEND = """
import socket, sys, time
sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112)
for _ in range(25):
    for target in sys.argv[1:]:
        sender.sendto(bytes.fromhex("3150ff01003200000a000001"), (target, 0))
    time.sleep(0.2)
"""


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.2)


def test_one_balancer_holds_the_address_and_keepalived_starts_at_boot(
    holders: Any, hosts: dict[str, Any]
) -> None:
    assert len(holders()) == 1
    for name in ("debian12", "debian13"):
        assert hosts[name].service("keepalived").is_enabled


def test_the_address_moves_when_nginx_stops_and_does_not_return(
    hosts: dict[str, Any], holder: str, other: str, holders: Any, clients: Any
) -> None:
    with clients() as running:
        time.sleep(0.5)
        event = time.time()
        hosts[holder].check_output("systemctl stop nginx")
        time.sleep(2.5)
        hosts[holder].check_output("systemctl start nginx")
        time.sleep(4)
    assert holders() == [other]
    running.check(event)


def test_the_address_moves_when_its_holder_dies_which_learns_of_a_drain_when_it_returns(
    hosts: dict[str, Any],
    holder: str,
    other: str,
    holders: Any,
    status: Any,
    clients: Any,
    power: Any,
    play: Any,
) -> None:
    with clients() as running:
        time.sleep(0.5)
        event = time.time()
        power(holder, "off")
        time.sleep(2.5)
        assert holders(other) == [other]
        drained = play("playbooks/drain.yml", host=holder)
        assert (
            f"{holder}: drain is in force on {other}. {holder} is down and was not changed" in drained.words
        )
        power(holder, "on")
        wait_until(lambda: hosts[holder].service("nginx").is_running, 10)
        time.sleep(2)
    assert holders() == [other]
    running.check(event)
    # It knew the drain before Nginx started.
    assert "changed" in hosts[holder].check_output("journalctl --unit=nginx --boot --output=cat").splitlines()
    for name in (holder, other):
        assert status(name)["backends"][holder]["state"] == "drained"
    play("playbooks/undrain.yml", host=holder).changes()
    for name in (holder, other):
        assert status(name)["backends"][holder]["state"] == "up"


def test_a_holder_that_was_frozen_records_it_and_one_balancer_has_the_address(
    fleet: dict[str, Any], holder: str, other: str, holders: Any, clients: Any, client_of: Any, power: Any
) -> None:
    with clients() as running:
        time.sleep(0.5)
        froze = time.time()
        power(holder, "freeze")
        time.sleep(3)
        assert holders(other) == [other]
        resumed = time.time()
        power(holder, "on")
        time.sleep(4)
    assert len(holders()) == 1
    running.check(froze, resumed)
    # When requests that have waited in it can no longer arrive at app hosts, and when the record was updated.
    status, _, record = client_of(fleet["hosts"][holder]["address"]).ask("/lb/pauses")
    assert status == 200
    ended, updated = map(float, record.split())
    assert resumed < ended < resumed + 2
    assert time.time() - updated < 0.9
    status, _, seen = client_of(fleet["address"].partition("/")[0]).ask("/pixel/1/2")
    assert status == 200
    assert json.loads(seen)["headers"]["X-Request-Start"].startswith("+")


def test_a_drain_on_one_balancer_is_adopted_by_the_other_and_moves_the_address(
    hosts: dict[str, Any], holder: str, other: str, holders: Any, status: Any, clients: Any
) -> None:
    with clients() as running:
        time.sleep(0.5)
        # Not on the holder.
        hosts[other].check_output(f"pixel-lb drain {holder}")
        wait_until(lambda: holders() == [other], 10)
        event = time.time()
        hosts[holder].check_output(f"pixel-lb undrain {holder}")
        wait_until(lambda: status(other)["backends"][holder]["state"] == "up", 10)
        time.sleep(2)
    assert holders() == [other]
    # The event is earlier: `drained` was seen a moment after the move.
    running.check(event - 3)


def test_vrrp_of_hosts_outside_the_group_is_dropped(
    shell: Any, fleet: dict[str, Any], holder: str, other: str, holders: Any
) -> None:
    addresses = {name: facts["address"] for name, facts in fleet["hosts"].items()}
    shell(f"python3 -c '{SEND}' {addresses[holder]} {addresses[other]} >/dev/null 2>&1 &", on="stranger")
    assert shell(f"python3 -c '{LISTEN}'", on=other).split() == [addresses[holder]]
    assert holders() == [holder]


def test_an_invalid_configuration_does_not_replace_the_running_one(hosts: dict[str, Any], other: str) -> None:
    path = "/etc/keepalived/keepalived.conf"
    hosts[other].check_output(f"keepalived --config-test --use-file {path}")
    hosts[other].check_output(f"sed 's/nopreempt/noprempt/' {path} >/run/invalid.conf")
    assert hosts[other].run("keepalived --config-test --use-file /run/invalid.conf").rc != 0
