"""The weights that the balancer's staged configuration has, from what an inventory says of its hosts."""

from __future__ import annotations

import json
import os.path
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, StrictUndefined

ROLE = Path(__file__).resolve().parents[1] / "roles" / "nginx_lb"


def staged(
    weights: str = "capacity", app: dict[str, int] | None = None, /, **hosts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The servers of upstream `pixel`, staged at host `a`."""
    environment = Environment(trim_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {
        "bool": bool,
        "extract": lambda key, container, more: reduce(getitem, more, container[key]),
        "splitext": os.path.splitext,
        "to_nice_json": lambda value, sort_keys: json.dumps(value, sort_keys=sort_keys),
    }
    facts = {"private_address": "10.0.0.1", "ansible_facts": {"processor_vcpus": 4}}
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    port = environment.from_string(defaults["nginx_lb_backend_port"]).render(app or {})
    text = environment.from_string((ROLE / "templates" / "backends.json.j2").read_text()).render(
        defaults | {"nginx_lb_backend_port": port},
        inventory_hostname="a",
        nginx_lb_weights=weights,
        groups={"pixel_app": list(hosts)},
        hostvars={name: facts | facts_of_its_own for name, facts_of_its_own in hosts.items()},
        _nginx_lb_types=dict.fromkeys(hosts, ""),
        _nginx_lb_method="",
        _nginx_lb_credited=[],
    )
    servers: list[dict[str, Any]] = json.loads(text)["upstreams"]["pixel"]["servers"]
    return servers


@pytest.mark.parametrize(
    ("hosts", "weights"),
    [
        ([(3, 1), (2, 1)], [3, 2]),
        ([(12, 1), (8, 1)], [3, 2]),
        ([(0, 1), (0, 1)], [1, 1]),
        ([(3, 2), (2, 1)], [3, 3, 4]),
        ([(3, 2), (2, 2)], [3, 3, 2, 2]),
        ([(4, 2), (2, 1)], [1, 1, 1]),
        ([(1, 3), (1, 2)], [2, 2, 2, 3, 3]),
        ([(1000, 1), (1, 16), (7, 11)], [176000, *[11] * 16, *[112] * 11]),
    ],
)
def test_a_hosts_weight_is_its_instances_together_in_the_smallest_integers(
    hosts: list[tuple[int, int]], weights: list[int]
) -> None:
    said = {
        name: {"nginx_lb_weight": weight, "pixel_app_instances": instances}
        for name, (weight, instances) in zip("abc", hosts, strict=False)
    }
    assert [server["weight"] for server in staged(**said)] == weights


def test_measured_weights_are_in_the_ratio_of_what_was_measured() -> None:
    measured = {"nginx_lb_weight": 7, "nginx_lb_measured": {"requests_per_second": 3000}}
    slower = {"nginx_lb_measured": {"requests_per_second": 1290}, "pixel_app_instances": 2}
    servers = staged("measured", a=measured, b=slower, c={"nginx_lb_measured": {"requests_per_second": 3}})
    assert [server["weight"] for server in servers] == [200, 43, 43, 2]


def test_every_instance_has_a_name_and_an_address_of_its_own() -> None:
    servers = staged(
        a={"pixel_app_instances": 2}, b={"private_address": "10.0.0.2", "pixel_app_instances": 2}
    )
    assert [(server["name"], server["host"], server["address"]) for server in servers] == [
        ("a", "a", "unix:/run/pixel.sock"),
        ("a-8001", "a", "unix:/run/pixel-8001.sock"),
        ("b", "b", "10.0.0.2:8000"),
        ("b-8001", "b", "10.0.0.2:8001"),
    ]


def test_a_host_that_says_nothing_of_instances_has_one() -> None:
    assert [server["name"] for server in staged(a={}, b={})] == ["a", "b"]


def test_the_backends_port_is_the_apps() -> None:
    servers = staged("capacity", {"pixel_app_port": 9000}, b={"private_address": "10.0.0.2"})
    assert [server["address"] for server in servers] == ["10.0.0.2:9000"]
