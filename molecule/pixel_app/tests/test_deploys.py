"""Deploys of role pixel_app. Each playbook runs once for both hosts, and every host's result is checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def converge(play: Any) -> Any:
    """Run the role again on all hosts; keyword arguments become extra variables."""
    return lambda **variables: play("molecule/pixel_app/converge.yml", **variables)


@pytest.fixture
def ask(hosts: dict[str, Any], fleet: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """GET a path from the app, on every host; returns the decoded bodies by host."""
    program = (
        "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=3).read().decode())"
    )

    def run(path: str, port: int = 8000) -> dict[str, Any]:
        return {
            name: json.loads(
                host.check_output(f"python3 -c '{program}' http://{facts['address']}:{port}{path}")
            )
            for name, host, facts in ((name, hosts[name], fleet["hosts"][name]) for name in hosts)
        }

    return run


@pytest.fixture
def releases(ask: Any) -> Callable[[], dict[str, str]]:
    """The release that each host serves."""
    return lambda: {name: answer["release"] for name, answer in ask("/ping").items()}


@pytest.fixture
def everywhere(hosts: dict[str, Any]) -> Callable[[str], None]:
    """Run a command on every host; all must succeed."""

    def run(command: str) -> None:
        for host in hosts.values():
            host.run_expect([0], command)

    return run


def main_pids(hosts: dict[str, Any]) -> dict[str, int]:
    return {name: int(host.service("pixel").systemd_properties["MainPID"]) for name, host in hosts.items()}


def wait_until_ready(ask: Any) -> None:
    for _ in range(50):
        try:
            if {answer["redis"] for answer in ask("/readyz").values()} == {"ok"}:
                return
        except AssertionError:
            time.sleep(0.2)
    raise AssertionError("not ready within 10 s")


def test_invalid_settings_stop_the_play_and_the_service_keeps_running(
    converge: Any, hosts: Any, ask: Any
) -> None:
    before = main_pids(hosts)
    failures = converge(pixel_app_settings={"PIXEL_EVENTS_MAXLEN": "few"}).failures()
    assert set(failures) == set(hosts)
    assert all("PIXEL_EVENTS_MAXLEN" in message for message in failures.values())
    assert main_pids(hosts) == before
    wait_until_ready(ask)


def test_a_deploy_removes_old_releases_and_works_with_a_strict_umask_and_a_dead_proxy_on_the_host(
    converge: Any, hosts: Any, releases: Any, everywhere: Any
) -> None:
    """Three releases are kept: the current one, the one before it, and the newest complete one of the others.

    With sudo's umask, the service's user could not read the files; the proxy does not answer.
    """
    former = releases()
    for number in range(1, 6):
        path = f"/opt/pixel/releases/old-{number}"
        complete = f"touch {path}/release.env" if number < 5 else "true"
        everywhere(f"sh -c 'mkdir -p {path} && {complete} && touch -d 2020-01-0{number} {path}'")
    everywhere("sh -c 'touch -d 2019-01-01 $(readlink /opt/pixel/current)'")
    everywhere("sh -c 'cp /etc/environment /etc/environment.kept'")
    everywhere("sh -c 'echo http_proxy=http://127.0.0.1:1 >>/etc/environment'")
    everywhere("sh -c 'printf \"Defaults umask=0077\\nDefaults umask_override\\n\" >/etc/sudoers.d/umask'")
    try:
        assert {host.check_output("umask") for host in hosts.values()} == {"0077"}
        done = converge(pixel_app_release="under-0077")
    finally:
        everywhere("sh -c 'rm /etc/sudoers.d/umask && mv /etc/environment.kept /etc/environment'")
    assert done.returncode == 0, done.stdout
    assert set(releases().values()) == {"under-0077"}
    for name, host in hosts.items():
        kept = host.check_output("ls /opt/pixel/releases").split()
        assert sorted(kept) == sorted(["under-0077", former[name], "old-4"])
    assert converge().returncode == 0
    assert releases() == former


DAMAGE = {
    "unreadable": "chmod 0700 .",
    "python-replaced": "ln -sfn /usr/bin/python3.99 bin/python3; ln -sfn /usr/bin/python3.99 bin/python",
}


def test_a_release_that_cannot_start_is_built_again(converge: Any, ask: Any, everywhere: Any) -> None:
    """As after a strict umask, or after a distribution upgrade that replaces Python."""
    for damage in DAMAGE.values():
        everywhere(f"sh -c 'cd $(readlink /opt/pixel/current) && {{ {damage}; }}'")
        everywhere("systemctl restart --no-block pixel")
        done = converge()
        assert done.returncode == 0, done.stdout
        wait_until_ready(ask)
        everywhere("systemctl restart pixel")
        wait_until_ready(ask)
    assert set(converge().changes().values()) == {0}


def test_instances_and_settings_are_changed_together_and_refused_deploys_change_nothing(
    converge: Any, hosts: Any, ask: Any, everywhere: Any
) -> None:
    two = {"pixel_app_instances": 2, "pixel_app_settings": {"PIXEL_EVENTS_MAXLEN": 5000}}
    first = ask("/ping")
    second = {name: answer | {"instance": f"{name}-8001", "port": 8001} for name, answer in first.items()}

    # The port of the trial is in use. The same deployment can be deployed later.
    before = main_pids(hosts)
    everywhere("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 7999")
    try:
        failures = converge(**two).failures()
    finally:
        everywhere("systemctl stop squatter")
    for name, host in hosts.items():
        assert f"port 7999 on {name} is in use by python3" in failures[name]
        assert not host.file("/etc/pixel/staged").exists
    assert main_pids(hosts) == before
    assert converge(**two).returncode == 0
    assert not set(main_pids(hosts).items()) & set(before.items())
    assert [ask("/ping", port) for port in (8000, 8001)] == [first, second]
    for host in hosts.values():
        for unit in ("pixel@8001.socket", "pixel@8001.service"):
            assert host.service(unit).is_running
            assert host.service(unit).is_enabled
        file = host.file("/run/pixel-8001.sock")
        assert (file.is_socket, file.group, oct(file.mode)) == (True, "www-data", "0o660")

    # A restart of one leaves the other.
    before = main_pids(hosts)
    everywhere("systemctl restart pixel@8001")
    assert {answer["redis"] for answer in ask("/readyz", 8001).values()} == {"ok"}
    assert main_pids(hosts) == before

    # A third instance can't have its socket; the other two keep serving.
    everywhere("mkdir -p /run/pixel-8002.sock/taken")
    try:
        failures = converge(**two | {"pixel_app_instances": 3}).failures()
        for name, host in hosts.items():
            assert f"{name} did not take release" in failures[name]
            assert "was restored and serves" in failures[name]
            assert not host.service("pixel@8002").is_running
        assert [ask("/ping", port) for port in (8000, 8001)] == [first, second]
    finally:
        everywhere("rm -r /run/pixel-8002.sock")
    assert converge(**two).changes() == dict.fromkeys(hosts, 0)

    assert converge().returncode == 0
    assert ask("/ping") == first
    for host in hosts.values():
        assert not [each for each in host.socket.get_listening_sockets() if ":8001" in each]
        assert host.check_output("systemctl list-units --all --plain --no-legend 'pixel@*.service'") == ""
        assert host.check_output("find /etc/systemd/system -name 'pixel@*'") == ""
    wait_until_ready(ask)
