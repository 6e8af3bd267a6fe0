"""The filter plugin for the fleet's facts, and its use in role nginx_lb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.filter import pixel_fleet
from pixel_lb.fleet import Fleet

ROOT = Path(__file__).resolve().parents[1]
HOST = {"inventory_hostname": "t2", "private_address": "10.0.0.2"}


def test_the_first_instance_has_plain_names_and_further_ones_include_the_port() -> None:
    assert pixel_fleet.pixel_instances(HOST | {"pixel_app_instances": 2}) == [
        {
            "name": "t2",
            "unit": "pixel",
            "port": 8000,
            "socket": "/run/pixel.sock",
            "address": "10.0.0.2:8000",
            "url": "http://10.0.0.2:8000",
        },
        {
            "name": "t2-8001",
            "unit": "pixel@8001",
            "port": 8001,
            "socket": "/run/pixel-8001.sock",
            "address": "10.0.0.2:8001",
            "url": "http://10.0.0.2:8001",
        },
    ]


@pytest.mark.parametrize(
    ("variables", "arguments", "ports"),
    [
        ({}, {}, [8000]),
        ({"pixel_app_port": "9000", "pixel_app_instances": "2"}, {}, [9000, 9001]),
        ({"pixel_app_port": 9000, "pixel_app_instances": 2}, {"port": 7000, "count": 1}, [7000]),
        ({"pixel_app_instances": 0}, {}, []),
    ],
)
def test_arguments_override_the_hosts_variables(
    variables: dict[str, Any], arguments: dict[str, Any], ports: list[int]
) -> None:
    instances = pixel_fleet.pixel_instances(HOST | variables, **arguments)
    assert [instance["port"] for instance in instances] == ports


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://10.0.0.2"),
        ({"nginx_lb_listen_port": "8080", "nginx_lb_server_names": ["a.example"]}, "http://10.0.0.2:8080"),
        ({"nginx_lb_tls": "selfsigned", "nginx_lb_server_names": ["a.example"]}, "https://a.example"),
        (
            {"nginx_lb_tls": "provided", "nginx_lb_server_names": ["a.example"], "nginx_lb_tls_port": 8443},
            "https://a.example:8443",
        ),
        ({"nginx_lb_tls": False, "nginx_lb_server_names": ["a.example"]}, "http://10.0.0.2"),
        ({"nginx_lb_address": "10.0.0.100/24"}, "http://10.0.0.100"),
    ],
)
def test_clients_reach_a_balancer_by_its_name_with_tls(variables: dict[str, Any], url: str) -> None:
    assert pixel_fleet.public_url(HOST | variables) == url


def test_vrrp_is_exchanged_between_the_balancers_only() -> None:
    moving = {"nginx_lb_address": "10.0.0.100/24"}
    balancers = [
        {"inventory_hostname": name, "private_address": f"10.0.0.{number}"}
        for number, name in enumerate(("c5", "t2", "m5"))
    ]
    assert pixel_fleet.vrrp_peers([each | moving for each in balancers], "t2") == ["10.0.0.0", "10.0.0.2"]
    assert pixel_fleet.vrrp_peers([each | moving for each in balancers], "app") == []
    assert pixel_fleet.vrrp_peers(balancers, "t2") == []


def test_socket_and_name_can_be_overridden() -> None:
    first, second = pixel_fleet.pixel_instances(HOST, count=2, socket="/srv/app.socket", name="blue")
    assert (first["name"], first["socket"]) == ("blue", "/srv/app.socket")
    assert (second["name"], second["socket"]) == ("blue-8001", "/srv/app-8001.socket")
    first, second = pixel_fleet.pixel_instances(HOST, count=2, socket="")
    assert (first["socket"], second["socket"]) == ("", "")
    (other,) = pixel_fleet.pixel_instances(HOST | {"pixel_app_socket": "/run/other.sock"})
    assert other["socket"] == "/run/other.sock"


def test_the_systemd_template_expands_to_an_instance() -> None:
    template = pixel_fleet.pixel_instance_template(HOST)
    (_, further) = pixel_fleet.pixel_instances(HOST, count=2)
    assert template["unit"] == "pixel@%i"
    replaced = {key: str(value).replace("%i", "8001") for key, value in template.items()}
    assert replaced == {key: str(value) for key, value in further.items()}


def test_fleet_ports_are_those_of_the_app_redis_the_history_and_exporters() -> None:
    ports = pixel_fleet.fleet_ports(HOST | {"pixel_app_instances": 2, "redis_port": "6400"})
    assert ports == [8000, 8001, 6400, 8100, 9100, 9113, 9115, 9121, 9090, 9093]
    assert pixel_fleet.fleet_ports(HOST)[:2] == [8000, 6379]
    assert pixel_fleet.exporter_port("redis") == 9121


def test_the_ports_of_a_redis_cluster_are_those_of_its_processes() -> None:
    groups = {"redis": ["a", "t2", "c"]}
    first, other = ({"inventory_hostname": name, "groups": groups} for name in ("a", "t2"))
    assert (pixel_fleet.redis_ports(first), pixel_fleet.redis_bus_ports(first)) == ([6379], [16379])
    assert (pixel_fleet.redis_ports(other), pixel_fleet.redis_bus_ports(other)) == (
        [6379, 6380],
        [16379, 16380],
    )
    assert pixel_fleet.fleet_ports(HOST | other)[:3] == [8000, 6379, 6380]
    # Without a cluster, and on a host that isn't in it, there is no bus.
    assert pixel_fleet.redis_bus_ports(first | {"groups": {"redis": ["a"]}}) == []
    assert pixel_fleet.redis_bus_ports(first | {"inventory_hostname": "b"}) == []
    assert pixel_fleet.redis_bus_ports(other | {"redis_hosts": ["t2"]}) == []


def test_defaults_equal_the_roles_defaults() -> None:
    app, redis, history = (
        yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text())
        for role in ("pixel_app", "redis", "history")
    )
    assert app["pixel_app_port"] == pixel_fleet.APP_PORT
    assert app["pixel_app_instances"] == pixel_fleet.APP_INSTANCES
    assert app["pixel_app_socket"] == pixel_fleet.APP_SOCKET
    assert redis["redis_port"] == pixel_fleet.REDIS_PORT
    assert redis["redis_voter_port"] == pixel_fleet.VOTER_PORT
    assert history["history_port"] == pixel_fleet.HISTORY_PORT


def test_security_groups_admit_the_fleets_ports() -> None:
    """Also those of a Redis Cluster, whose hosts other than the first have the most."""
    aws = yaml.safe_load((ROOT / "inventory" / "aws" / "group_vars" / "all.yml").read_text())
    member = HOST | {"groups": {"redis": ["c5", "t2", "m5"]}}
    ports = pixel_fleet.fleet_ports(member) + pixel_fleet.redis_bus_ports(member)
    assert sorted(aws["aws_fleet_ports"]) == sorted(ports)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of Ansible in which only the first run gathers facts."""
    folder = tmp_path_factory.mktemp("facts")
    return {"ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder)}


@pytest.fixture
def fleet(tmp_path: Path, facts: dict[str, str]) -> Any:
    """Render backends.json for balancer `a` from hosts and variables, and load it as the agent does."""

    def render(hosts: dict[str, dict[str, Any]], **variables: Any) -> Fleet:
        address = {"private_address": "10.0.0.1", "ansible_connection": "local"}
        local = {"ansible_python_interpreter": sys.executable, "ansible_become": False}
        inventory = {
            "pixel_app": {"hosts": {name: address | local | facts for name, facts in hosts.items()}},
            "nginx_lb": {"hosts": {"a": {}}},
        }
        (tmp_path / "hosts.yml").write_text(json.dumps(inventory))
        role = ROOT / "roles" / "nginx_lb"
        play = [
            {"hosts": "all", "gather_subset": ["!all", "hardware"]},
            {
                "hosts": "nginx_lb",
                "gather_facts": False,
                "vars_files": [str(role / "defaults/main.yml"), str(role / "vars/main.yml")],
                "tasks": [
                    {
                        "ansible.builtin.template": {
                            "src": str(role / "templates" / "backends.json.j2"),
                            "dest": str(tmp_path / "backends.json"),
                            "mode": "0644",
                        }
                    }
                ],
            },
        ]
        (tmp_path / "play.yml").write_text(json.dumps(play))
        program = Path(sys.prefix, "bin", "ansible-playbook")
        command: list[str | Path] = [program, "--inventory", tmp_path / "hosts.yml", tmp_path / "play.yml"]
        done = subprocess.run(
            [*command, "--extra-vars", json.dumps(variables)],
            cwd=ROOT,
            env=os.environ | {"ANSIBLE_NOCOLOR": "1"} | facts,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Fleet.load(tmp_path / "backends.json")

    return render


def test_a_host_without_variables_has_one_instance_on_the_default_port(fleet: Any) -> None:
    found = fleet({"a": {}, "b": {"private_address": "10.0.0.2"}})
    assert [(server.name, server.address, server.weight) for server in found.servers] == [
        ("a", "unix:/run/pixel.sock", 1),
        ("b", "10.0.0.2:8000", 1),
    ]
    assert found.credits == {}
    assert found.is_controlled


def test_the_facts_of_hosts_reach_the_agent(fleet: Any) -> None:
    found = fleet(
        {
            "a": {"nginx_lb_weight": 3, "pixel_app_instances": 2},
            "b": {
                "private_address": "10.0.0.2",
                "nginx_lb_weight": 2,
                "instance_type": "t2.xlarge",
                "instance_id": "i-0123456789abcdef0",
                "nginx_lb_backup": True,
            },
        },
        pixel_app_port=9000,
        nginx_lb_weights="adaptive",
        nginx_lb_credit_source="cloudwatch",
        nginx_lb_credit_region="eu-central-1",
        nginx_lb_clusters={"t2": "t2", "all": "pixel_app"},
        nginx_lb_dead_band=20,
    )
    assert [(server.name, server.address, server.weight, server.backup) for server in found.servers] == [
        ("a", "unix:/run/pixel.sock", 3, False),
        ("a-9001", "unix:/run/pixel-9001.sock", 3, False),
        ("b", "10.0.0.2:9000", 4, True),
    ]
    assert [(upstream.name, len(upstream.servers)) for upstream in found.upstreams] == [
        ("pixel", 3),
        ("cluster_t2", 1),
        ("cluster_all", 3),
    ]
    assert (found.credit_region, found.credits["b"].instance_id) == ("eu-central-1", "i-0123456789abcdef0")
    assert (found.settings.adaptive, found.settings.dead_band, found.settings.step) == (True, 0.2, 0.5)


def test_measured_weights_are_computed_from_the_hosts_variables(fleet: Any) -> None:
    hosts = {
        name: {"nginx_lb_measured": {"requests_per_second": rate}}
        for name, rate in (("a", 3000), ("b", 1500.4))
    }
    found = fleet(hosts, nginx_lb_weights="measured")
    assert [server.weight for server in found.servers] == [2, 1]
    assert found.weight_source == "measured"


def test_a_variable_of_another_host_is_its_own_or_the_default() -> None:
    variables = {"nginx_lb_weight": 0}
    assert pixel_fleet.host_variable(variables, "nginx_lb_weight", 3) == 0
    assert pixel_fleet.host_variable(variables, "nginx_lb_backup", False) is False
