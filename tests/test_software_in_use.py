"""A web server, Redis or monitoring of others on a host is reported, and replaced only on request.

One playbook runs the checks of the roles that precede any change. All hosts are this machine.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DPKG = """#!/bin/sh
# A package whose configuration was changed, on a host whose name says so.
case $HOST in *changed*) echo "??5?????? c /etc/$2/its.conf" ;; esac
"""


def listen(program: Path, server: socket.socket) -> subprocess.Popen[bytes]:
    """Start a program of this name that holds a listening socket."""
    program.symlink_to(Path(sys.executable).resolve())
    with server:
        return subprocess.Popen([program, "-c", "import time; time.sleep(600)"], pass_fds=[server.fileno()])


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message of each host: the reason why nothing was changed, or an empty string."""
    folder = tmp_path_factory.mktemp("hosts")
    web, redis = socket.create_server(("", 0)), socket.create_server(("", 0))
    # Bound but not listening, so that no other program takes it.
    unused = socket.socket()
    unused.bind(("", 0))
    web_port, redis_port, free = (each.getsockname()[1] for each in (web, redis, unused))
    hosts: dict[str, dict[str, Any]] = {
        "web_default": {"file": "sites-enabled/default"},
        "web_site": {"file": "sites-enabled/shop"},
        "web_conf": {"file": "conf.d/shop.conf"},
        "web_changed": {},
        "web_port": {"nginx_lb_listen_port": web_port},
        "web_tls_port": {"nginx_lb_tls_port": web_port, "nginx_lb_tls": "selfsigned"},
        "web_port_without_tls": {"nginx_lb_tls_port": web_port},
        "web_site_asked": {"file": "sites-enabled/shop", "nginx_lb_take_over": "true"},
        "web_port_asked": {"nginx_lb_listen_port": web_port, "nginx_lb_take_over": "true"},
        "web_ours_changed": {"file": "staged", "nginx_lb_listen_port": web_port},
        "redis_data": {"file": "data/dump.rdb"},
        "redis_empty_data": {"file": "data/small"},
        "redis_changed": {},
        "redis_port": {"redis_port": redis_port},
        "redis_data_asked": {"file": "data/dump.rdb", "redis_take_over": "true"},
        "redis_ours_changed": {"file": "acl"},
        "watch_fresh": {},
        "watch_changed": {},
        "watch_port": {"exporter_port": web_port},
        "watch_changed_asked": {"monitoring_take_over": "true"},
        "watch_port_asked": {"exporter_port": web_port, "monitoring_take_over": "true"},
        "watch_ours_changed": {"file": "unit", "exporter_port": web_port},
    }
    for name, variables in hosts.items():
        root = folder / name
        variables |= {"root": str(root), "ansible_connection": "local"}
        variables |= {"ansible_python_interpreter": sys.executable}
        if path := variables.get("file"):
            (root / path).parent.mkdir(parents=True)
            (root / path).write_text("x" if path.endswith("small") else "x" * 2000)
    (folder / "dpkg").write_text(DPKG)
    (folder / "dpkg").chmod(0o755)

    plays = []
    for role, group in (("nginx_lb", "web"), ("redis", "redis"), ("monitoring", "watch")):
        text = (ROOT / "roles" / role / "tasks" / "install.yml").read_text()
        text = text.replace(
            "{{ _monitoring_here | map('pixel.endpoint.exporter_port') | join(' ') }}", "{{ exporter_port }}"
        )
        look, check, *_ = yaml.safe_load(text.replace("/etc/nginx/", "{{ root }}/"))
        assert "ansible.builtin.shell" in look
        look["environment"] = {"HOST": "{{ inventory_hostname }}"}
        paths = {
            "_redis_acl": "{{ root }}/acl",
            "_redis_data": "{{ root }}/data",
            "_nginx_lb_tls": "{{ nginx_lb_tls }}",
            "_monitoring_unit_of_node": "{{ root }}/unit",
        }
        defaults = {
            "nginx_lb_listen_port": free,
            "nginx_lb_tls": "off",
            "nginx_lb_tls_port": free,
            "redis_port": free,
        }
        defaults |= {f"{each}_take_over": False for each in ("nginx_lb", "redis", "monitoring")}
        defaults |= {"exporter_port": free, "monitoring_group": "monitoring"}
        plays.append({"hosts": group, "gather_facts": False, "vars": paths, "tasks": [look, check]})
        for variables in hosts.values():
            variables |= {name: value for name, value in defaults.items() if name not in variables}
    inventory = {
        group: {"hosts": {name: own for name, own in hosts.items() if name.startswith(group)}}
        for group in ("web", "redis", "watch")
    }
    (folder / "play.yml").write_text(json.dumps(plays))
    (folder / "hosts.yml").write_text(json.dumps(inventory))
    servers = [listen(folder / "apache2", web), listen(folder / "valkey", redis)]
    try:
        done = subprocess.run(
            [Path(sys.prefix, "bin", "ansible-playbook"), "-i", folder / "hosts.yml", folder / "play.yml"],
            env=os.environ
            | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
            | {"PATH": f"{folder}:{os.environ['PATH']}"},
            text=True,
            capture_output=True,
            check=False,
        )
    finally:
        unused.close()
        for server in servers:
            server.terminate()
            server.wait(10)
    passed = set(re.findall(r"^(\w+) +: ok=2 +changed=0 .* failed=0 ", done.stdout, re.M))
    failed = re.findall(r"^fatal: \[(\w+)\]: FAILED! =>.*\n((?: +.*\n)+)", done.stdout, re.M)
    messages = {name: " ".join(result.partition("msg: ")[2].split()).strip("'") for name, result in failed}
    assert passed | messages.keys() == hosts.keys(), done.stdout + done.stderr
    assert not passed & messages.keys()
    return {name: messages.get(name, "") for name in hosts} | {
        "port": str(web_port),
        "other": str(redis_port),
    }


@pytest.mark.parametrize(
    "host",
    [
        *("web_default", "web_port_without_tls", "web_site_asked", "web_ours_changed"),
        *("redis_empty_data", "redis_data_asked", "redis_ours_changed"),
        *("watch_fresh", "watch_changed_asked", "watch_ours_changed"),
    ],
)
def test_nothing_stops_a_run_where_nothing_is_displaced(verdicts: dict[str, str], host: str) -> None:
    assert verdicts[host] == ""


CLAIMS = {
    "web": ("already has a web server", "nginx_lb_take_over"),
    "redis": ("already has a Redis", "redis_take_over"),
    "watch": ("is already monitored", "monitoring_take_over"),
}


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("web_site", "site ROOT/sites-enabled/shop"),
        ("web_conf", "site ROOT/conf.d/shop.conf"),
        ("web_changed", "changed /etc/nginx-common/its.conf"),
        ("web_port", "port PORT used by apache2"),
        ("web_tls_port", "port PORT used by apache2"),
        # The other server keeps running, so Nginx couldn't start.
        ("web_port_asked", "port PORT used by apache2"),
        ("redis_data", "data in ROOT/data/dump.rdb"),
        ("redis_changed", "a changed /etc/redis-server/its.conf"),
        ("redis_port", "port PORT in use by valkey"),
        ("watch_changed", "changed /etc/prometheus/its.conf"),
        ("watch_port", "port PORT used by apache2"),
        ("watch_port_asked", "port PORT used by apache2"),
    ],
)
def test_software_in_use_is_named(verdicts: dict[str, str], host: str, found: str) -> None:
    kind = host.partition("_")[0]
    claim, variable = CLAIMS[kind]
    port = verdicts["other" if kind == "redis" else "port"]
    message = re.sub(r"\S+/hosts0/\w+/", "ROOT/", verdicts[host]).replace(port, "PORT")
    assert message.startswith(f"{host} {claim}: {found}. Nothing was changed.")
    assert f"set {variable} to true" in message
