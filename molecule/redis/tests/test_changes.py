"""Runs of role redis that change something. Each playbook runs once for both hosts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Every character that a shell, a quotation or an ACL file treats specially.
ODD = r"""'"quo\ted"\\#%$&{-ü-€-'""" + "x" * 8


TLS = "--tls --cacert /etc/redis-tls/ca.pem"


@pytest.fixture
def answers(state: Path, fleet: dict[str, Any]) -> Callable[..., list[str]]:
    """Send PING as the app's user to every host, with the password on standard input; returns the answers."""

    def ping(name: str, password: str, options: str) -> str:
        client = f"timeout 2 redis-cli {options} -h {fleet['hosts'][name]['address']} --user pixel --askpass"
        script = f"{client} PING 2>&1 <<'END'\n{password}\nEND\n"
        command = ["ssh", "-F", str(state / "ssh_config"), name, "sudo sh -s"]
        done = subprocess.run(command, input=script, text=True, capture_output=True, check=False)
        lines = done.stdout.strip().splitlines()
        # redis-cli reports a refused login before the refused command.
        return "PONG" if lines[-1:] == ["PONG"] else " ".join(lines)

    return lambda password, options="": [ping(name, password, options) for name in fleet["hosts"]]


def test_a_new_password_needs_no_restart_and_the_former_one_is_valid_until_retired(
    hosts: dict[str, Any], play: Any, password: Any, answers: Any, state: Path
) -> None:
    former = password("app")
    roles = [
        {"ansible.builtin.include_role": {"name": "redis"} | part}
        for part in ({}, {"tasks_from": "retire.yml"})
    ]
    (state / "retire.yml").write_text(json.dumps([{"hosts": "redis", "tasks": roles}]))

    def main_pids() -> list[str]:
        services = [host.service("redis-server") for host in hosts.values()]
        return [service.systemd_properties["MainPID"] for service in services]

    def run(playbook: str, **variables: Any) -> set[int]:
        return set(play(playbook, **variables).changes().values())

    before = main_pids()
    try:
        assert run("molecule/redis/converge.yml", redis_app_password=ODD) == {2}
        assert {*answers(ODD), *answers(former)} == {"PONG"}
        assert run("molecule/redis/converge.yml", redis_app_password=ODD) == {0}
        assert run(str(state / "retire.yml"), redis_app_password=ODD) == {2}
        assert set(answers(ODD)) == {"PONG"}
        assert all("WRONGPASS" in answer for answer in answers(former))
        assert main_pids() == before
        # The file agrees with the running Redis.
        for host in hosts.values():
            host.run_expect([0], "systemctl restart redis-server")
        for _ in range(25):
            if "refused" not in " ".join(answers(ODD)):
                break
            time.sleep(0.2)
        assert set(answers(ODD)) == {"PONG"}
        for host in hosts.values():
            assert ODD not in host.run("journalctl --no-pager").stdout
    finally:
        run(str(state / "retire.yml"))
    assert set(answers(former)) == {"PONG"}
    assert all("WRONGPASS" in answer for answer in answers(ODD))


def test_tls_is_turned_on_and_off_with_a_restart_each(
    hosts: dict[str, Any], play: Any, password: Any, answers: Any
) -> None:
    def run(**variables: Any) -> None:
        play("molecule/redis/converge.yml", **variables)

    word = password("app")
    try:
        run(redis_tls=True)
        assert set(answers(word, TLS)) == {"PONG"}
        assert "PONG" not in answers(word)
    finally:
        run()
    assert set(answers(word)) == {"PONG"}
    assert "PONG" not in answers(word, TLS)
    assert not any(host.file("/etc/redis-tls").exists for host in hosts.values())
