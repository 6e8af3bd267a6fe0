"""Servers and upstreams from the inventory's facts."""

from __future__ import annotations

from typing import Any

import pytest
from pixel_lb.errors import Refused
from pixel_lb.fleet import CreditQuery


def test_every_instance_has_its_own_name_and_address(make_fleet: Any) -> None:
    fleet = make_fleet(
        {"name": "a", "instances": 2}, {"name": "b", "address": "10.0.0.2", "instances": 2}, balancer="a"
    )
    assert [(server.name, server.host, server.address) for server in fleet.servers] == [
        ("a", "a", "unix:/run/pixel.sock"),
        ("a-8001", "a", "unix:/run/pixel-8001.sock"),
        ("b", "b", "10.0.0.2:8000"),
        ("b-8001", "b", "10.0.0.2:8001"),
    ]


def test_without_sockets_the_balancers_own_host_is_reached_by_tcp(balancer: Any) -> None:
    balancer.write_facts(balancer="a")
    assert balancer.fleet.servers[0].address == "unix:/run/pixel.sock"
    balancer.facts["hosts"][0]["instances"][0]["socket"] = ""
    balancer.write_facts()
    assert balancer.fleet.servers[0].address == "10.0.0.1:8000"


def test_consistent_hashing_uses_the_same_addresses_on_all_balancers(make_fleet: Any) -> None:
    hosts = ({"name": "a"}, {"name": "b", "address": "10.0.0.2"})
    fleet = make_fleet(*hosts, balancer="a", sticky=True)
    pixel, sticky = fleet.upstreams
    assert (sticky.name, sticky.method, sticky.is_ring) == ("pixel_sticky", "hash $uri consistent", True)
    assert [server.address for server in pixel.servers] == ["unix:/run/pixel.sock", "10.0.0.2:8000"]
    assert [server.address for server in sticky.servers] == ["10.0.0.1:8000", "10.0.0.2:8000"]
    fleet = make_fleet(*hosts, balancer="a", method="hash")
    assert [server.address for server in fleet.servers] == ["10.0.0.1:8000", "10.0.0.2:8000"]


@pytest.mark.parametrize(
    ("method", "consistent", "directive"),
    [
        ("round_robin", True, ""),
        ("least_conn", True, "least_conn"),
        ("random", True, "random two least_conn"),
        ("ip_hash", True, "ip_hash"),
        ("hash", True, "hash $request_uri consistent"),
        ("hash", False, "hash $request_uri"),
    ],
)
def test_methods_become_directives(make_fleet: Any, method: str, consistent: bool, directive: str) -> None:
    fleet = make_fleet({"name": "a"}, method=method, hash_consistent=consistent)
    assert fleet.upstreams[0].method == directive


def test_a_cluster_is_a_group_a_type_or_a_family_and_has_no_backups(make_fleet: Any) -> None:
    fleet = make_fleet(
        {"name": "a", "instance_type": "c5.xlarge", "groups": ["pixel_app", "big"]},
        {"name": "b", "instance_type": "t2.xlarge", "backup": True},
        {"name": "c", "instance_type": "t2.large"},
        clusters={"group": "big", "family": "t2", "type": "t2.xlarge"},
    )
    members = {upstream.name: [server.name for server in upstream.servers] for upstream in fleet.upstreams}
    assert members == {
        "pixel": ["a", "b", "c"],
        "cluster_group": ["a"],
        "cluster_family": ["b", "c"],
        "cluster_type": ["b"],
    }
    assert [server.backup for server in fleet.servers] == [False, True, False]
    assert not fleet.upstreams[2].servers[0].backup


def test_credits_are_queried_for_hosts_with_an_instance_id(make_fleet: Any) -> None:
    fleet = make_fleet(
        {"name": "a", "instance_type": "c5.xlarge"},
        {"name": "b", "instance_type": "t2.xlarge", "instance_id": "i-0123456789abcdef0", "vcpus": 4},
    )
    assert list(fleet.credits) == ["b"]
    assert fleet.credits["b"] == CreditQuery("i-0123456789abcdef0", "t2.xlarge", 4)


@pytest.mark.parametrize("text", ["", "{}", '{"upstreams": {"pixel": {}}}'])
def test_facts_of_another_release_are_refused(balancer: Any, text: str) -> None:
    balancer.paths.facts.write_text(text)
    with pytest.raises(Refused, match=r"backends\.json is invalid .*: run playbooks/nginx_lb\.yml"):
        balancer.undrain("a")
