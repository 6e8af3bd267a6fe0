"""cleanup.yml stops the services of a group that a host has left, and no others. systemctl is a stub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"redis": ["a"], "pixel_app": ["a", "b"], "nginx_lb": ["a"], "monitoring": ["a"]}
TRACES = {
    "pixel_app": "/etc/systemd/system/pixel.socket",
    "nginx_lb": "/etc/systemd/system/pixel-lb.service",
    "redis": "/etc/systemd/system/redis-server.service.d/pixel.conf",
    "monitoring": "/etc/prometheus/pixel.rules.yml",
}
STUBS = {
    "systemctl": 'if [ "$1" = list-units ]; then echo "$5 loaded active"; else echo "$@" >>"$STOPPED"; fi',
    "getent": 'case $2 in redis.internal) echo 10.0.0.1 STREAM ;; 10.*) echo "$2 STREAM" ;; *) exit 2; esac',
    "hostname": "echo 192.0.2.7",
}
Run = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def cleanup(tmp_path: Path) -> Run:
    """Run the playbook on two hosts that are this machine, each with a root directory of its own."""
    shutil.copytree(ROOT / "playbooks", tmp_path / "playbooks", symlinks=True)
    table = tmp_path / "playbooks" / "vars" / "cleanup.yml"
    variables = yaml.safe_load(table.read_text())
    for trace in variables["_traces"].values():
        trace["file"] = "{{ root }}" + trace["file"]
        trace["remove"] = ["{{ root }}" + path for path in trace["remove"]]
    table.write_text(json.dumps(variables))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in STUBS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)

    def run(groups: dict[str, list[str]], *arguments: str, **variables: Any) -> tuple[str, list[str]]:
        hosts = {}
        for host in ("a", "b"):
            root = tmp_path / host
            for trace in TRACES.values():
                (root / trace[1:]).parent.mkdir(parents=True, exist_ok=True)
                (root / trace[1:]).touch()
            hosts[host] = {
                "ansible_connection": "local",
                "ansible_python_interpreter": sys.executable,
                "private_address": {"a": "10.0.0.1", "b": "10.0.0.2"}[host],
                "root": str(root),
            }
        inventory: dict[str, Any] = {"fleet": {"hosts": hosts, "vars": variables}}
        inventory |= {
            group: {"hosts": {member: {} for member in members}} for group, members in groups.items()
        }
        (tmp_path / "hosts.yml").write_text(json.dumps(inventory))
        stopped = tmp_path / "stopped"
        stopped.write_text("")
        playbook = tmp_path / "playbooks" / "cleanup.yml"
        environment = os.environ | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "STOPPED": str(stopped),
        }
        done = subprocess.run(
            [Path(sys.prefix, "bin", "ansible-playbook"), "-i", tmp_path / "hosts.yml", playbook, *arguments],
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        disabled = [
            line.split()[-1] for line in stopped.read_text().splitlines() if line.startswith("disable")
        ]
        return " ".join(done.stdout.split()), disabled

    return run


def test_services_of_a_group_that_a_host_has_left_are_stopped(cleanup: Run, tmp_path: Path) -> None:
    left = GROUPS | {
        "pixel_app": ["a"],
        "redis": ["a", "b"],
        "nginx_lb": ["a", "b"],
        "monitoring": ["a", "b"],
    }
    words, disabled = cleanup(left)
    assert "b has left pixel_app: its services are stopped and disabled." in words
    assert "a has left" not in words
    assert disabled == ["pixel.socket", "pixel.service", "pixel@*.socket", "pixel@*.service"]
    assert not (tmp_path / "b" / TRACES["pixel_app"][1:]).exists()
    assert (tmp_path / "a" / TRACES["pixel_app"][1:]).exists()


@pytest.mark.parametrize("name", ["10.0.0.1", "redis.internal"])
def test_a_redis_that_the_app_uses_is_left_alone(cleanup: Run, name: str) -> None:
    """Without group redis, pixel_app_redis_url names the Redis host, by address or by name."""
    groups = {group: ["a", "b"] for group in GROUPS if group != "redis"}
    words, disabled = cleanup(groups, pixel_app_redis_url=f"redis://{name}:6379/0")
    assert "b has left redis" in words
    assert "a has left" not in words
    assert disabled == [
        *("pixel-backup.timer", "redis-cluster.service", "redis-server@voter.service"),
        *("redis-server.service", "prometheus-redis-exporter.service"),
    ]


@pytest.mark.parametrize(
    "url",
    [
        "redis://{{ hostvars['a'].private_address }}:6379/0",
        "{{ 'redis://10.0.0.9' if inventory_hostname == 'a' else hostvars['a'].other }}",
        "redis://unknown.internal",
    ],
)
def test_no_redis_is_stopped_while_it_is_unknown_which_one_the_app_uses(cleanup: Run, url: str) -> None:
    """Group redis has moved to another host."""
    groups = {"pixel_app": ["a", "b"], "nginx_lb": ["a", "b"], "monitoring": ["a", "b"], "redis": ["a"]}
    words, disabled = cleanup(groups, pixel_app_redis_url=url)
    assert disabled == []
    assert "has left" not in words


def test_no_service_is_stopped_in_a_dry_run_or_if_the_limit_excludes_a_balancer(cleanup: Run) -> None:
    for arguments in (("--check",), ("--limit", "b")):
        words, disabled = cleanup(GROUPS | {"pixel_app": ["a"]}, *arguments)
        assert disabled == []
        assert "stopped and disabled" not in words
