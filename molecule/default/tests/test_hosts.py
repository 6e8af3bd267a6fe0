"""Every host of the fleet: releases, processes, listening sockets, secrets and sandboxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

testinfra_hosts = ["c5", "t2"]

PIXEL = {"x": 10, "y": 20, "channel": "R", "value": 255}


def test_a_pixel_written_through_the_other_host_can_be_read_from_this_one(host: Any, client: Any) -> None:
    for _ in range(20):
        status, headers, body = client.ask("/pixel", json.dumps(PIXEL).encode())
        assert (status, body) == (
            200,
            '{"status":"ok","received":{"x":10,"y":20,"channel":"R","value":255}}',
        )
        if headers["X-Pixel-Instance"] != host.backend.hostname:
            break
    else:
        raise AssertionError("the other host takes no writes")
    pixel = client.read_from(host.backend.hostname, "/pixel/10/20")
    assert (pixel["x"], pixel["y"], pixel["R"]) == (10, 20, 255)


def test_there_is_one_worker_per_vcpu(host: Any) -> None:
    master = int(host.service("pixel").systemd_properties["MainPID"])
    workers = host.process.filter(ppid=master)
    assert len(workers) == int(host.check_output("nproc"))
    assert {process.user for process in workers} == {"pixel"}


def test_both_hosts_run_the_same_release(host: Any, client: Any) -> None:
    current = host.check_output("readlink /opt/pixel/current")
    ping = client.read_from(host.backend.hostname, "/ping")
    assert current.endswith("/" + ping["release"])


def test_passwords_leak_nowhere(shell: Any, password: Any) -> None:
    secrets = "\n".join(password(user) for user in ("app", "admin", "monitor"))

    def found(command: str) -> str:
        """Lines of a command's output that contain a password. The host searches them: logs are long."""
        search = "grep --text --fixed-strings --file=/dev/fd/3"
        lines: str = shell(f"{{ {command}; }} 2>/dev/null | {search} 3<<'END'\n{secrets}\nEND\n")
        return lines

    # Proof that the search finds a password.
    assert found("cat /etc/pixel/credentials/redis_password") != ""
    for place in (
        "systemctl show pixel redis-server nginx 'prometheus*'",
        "ps -eo args",
        "journalctl --no-pager",
        "cat /etc/systemd/system/pixel.* /etc/pixel/*.env /etc/default/*",
        "cat /proc/$(systemctl show -P MainPID pixel)/environ",
        "cat /var/log/nginx/*",
    ):
        assert found(place) == "", place


def test_an_unprivileged_user_cannot_read_the_password(host: Any) -> None:
    done = host.run("sudo -u nobody cat /etc/pixel/credentials/redis_password")
    assert done.rc != 0
    assert "Permission denied" in done.stderr


def test_redis_and_the_app_listen_on_private_addresses_only(host: Any, address: str) -> None:
    listening = {line.split()[3] for line in host.check_output("ss -Hltn").splitlines()}
    redis = {one for one in listening if one.endswith(":6379")}
    assert redis == ({f"{address}:6379", "127.0.0.1:6379"} if host.backend.hostname == "c5" else set())
    assert {one for one in listening if one.endswith(":8000")} == {f"{address}:8000"}


def test_redis_refuses_an_unauthenticated_client(host: Any, fleet: dict[str, Any]) -> None:
    program = (
        "import socket, sys\n"
        "connection = socket.create_connection((sys.argv[1], 6379), 3)\n"
        "connection.sendall(b'PING\\r\\n')\n"
        "print(connection.recv(100).decode())\n"
    )
    address = fleet["hosts"]["c5"]["address"]
    assert "NOAUTH" in host.check_output(f'python3 -c "{program}" {address}')


def test_directories_that_root_writes_to_are_writable_by_root_only(host: Any) -> None:
    """Otherwise a symbolic link could redirect the agent, pixel-watch, backups or the firewall."""
    places = [
        "/etc/nginx/pixel",
        "/var/lib/pixel-lb",
        "/run/pixel-lb",
        "/var/lib/pixel-metrics",
        "/etc/pixel-firewall",
    ]
    existing = [place for place in places if host.file(place).exists]
    assert {"/var/lib/pixel-metrics", "/etc/pixel-firewall"} <= set(existing)
    for place in existing:
        for directory in (Path(place), *Path(place).parents):
            facts = host.file(str(directory))
            assert (facts.user, facts.group, facts.mode & 0o022) == ("root", "root", 0), directory


def test_every_unit_is_sandboxed(host: Any) -> None:
    """systemd-analyze rates the exposure from 0 to 10; the limit is 3."""
    exposure = {}
    for unit in (
        "nginx",
        "pixel",
        "pixel-firewall",
        "pixel-history",
        "pixel-lb",
        "pixel-watch",
        "prometheus",
        "prometheus-alertmanager",
        "prometheus-nginx-exporter",
        "prometheus-node-exporter",
        "prometheus-redis-exporter",
        "redis-server",
    ):
        if host.run(f"systemctl cat {unit}.service").rc == 0:
            rating = host.run(f"systemd-analyze security --no-pager {unit}.service").stdout
            exposure[unit] = float(rating.strip().splitlines()[-1].split(":")[1].split()[0])
    assert len(exposure) == {"c5": 12, "t2": 3}[host.backend.hostname]
    assert {unit: value for unit, value in exposure.items() if value > 3} == {}
