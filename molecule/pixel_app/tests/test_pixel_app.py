"""Role pixel_app alone, with a Redis on the same host."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


@pytest.fixture
def converge(play: Any, host: Any) -> Any:
    """Run the role again on this host; keyword arguments become extra variables."""
    playbook = "molecule/pixel_app/converge.yml"
    return lambda **variables: play(playbook, "--limit", host.backend.hostname, **variables)


@pytest.fixture
def ask(host: Any, address: str) -> Any:
    """GET from the app on its own host; returns the decoded body."""
    program = (
        "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=3).read().decode())"
    )

    def run(path: str, port: int = 8000) -> Any:
        return json.loads(host.check_output(f"python3 -c '{program}' http://{address}:{port}{path}"))

    return run


def main_pid(host: Any) -> int:
    return int(host.service("pixel").systemd_properties["MainPID"])


def wait_until_ready(host: Any, ask: Any) -> None:
    for _ in range(50):
        try:
            if ask("/readyz")["redis"] == "ok":
                return
        except AssertionError:
            time.sleep(0.2)
    raise AssertionError("not ready within 10 s")


@pytest.mark.parametrize("unit", ["pixel.socket", "pixel.service"])
def test_the_units_run_and_start_at_boot(host: Any, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_the_app_is_ready(ask: Any, host: Any) -> None:
    ready = ask("/readyz")
    assert ready["redis"] == "ok"
    assert ready["instance"] == host.backend.hostname


def test_the_app_connects_to_the_redis_of_the_url(host: Any) -> None:
    port = {"debian12": 6379, "debian13": 6380}[host.backend.hostname]
    assert "gunicorn" in host.check_output(f"ss -tnp state established dst :{port}")


def test_the_number_of_workers_is_as_configured_and_they_are_unprivileged(host: Any) -> None:
    master = main_pid(host)
    workers = host.process.filter(ppid=master)
    assert len(workers) == 2
    assert {process.user for process in workers} == {"pixel"}
    assert host.process.get(pid=master).user == "pixel"


def test_the_app_listens_on_the_private_address_only(host: Any, address: str) -> None:
    listening = [socket for socket in host.socket.get_listening_sockets() if ":8000" in socket]
    assert listening == [f"tcp://{address}:8000"]
    file = host.file("/run/pixel.sock")
    assert file.is_socket
    assert (file.user, file.group, oct(file.mode)) == ("root", "www-data", "0o660")


def test_the_app_serves_the_current_release(host: Any, ask: Any) -> None:
    release = Path(host.check_output("readlink /opt/pixel/current"))
    assert release.parent == Path("/opt/pixel/releases")
    assert ask("/ping")["release"] == release.name
    assert host.file("/opt/pixel/current/bin/python").user == "root"
    assert not host.file(f"{release}/wheels").exists


def test_the_services_user_cannot_write_to_the_release_or_its_settings(host: Any) -> None:
    done = host.run("sudo -u pixel touch /opt/pixel/current/x /etc/pixel/x")
    assert done.rc != 0
    assert "Permission denied" in done.stderr


def test_the_password_file_is_readable_by_root_only(host: Any) -> None:
    for path, mode in (
        ("/etc/pixel/credentials", "0o700"),
        ("/etc/pixel/credentials/redis_password", "0o600"),
    ):
        file = host.file(path)
        assert (file.user, oct(file.mode)) == ("root", mode)


def test_the_unit_is_sandboxed(host: Any) -> None:
    rating = host.run("systemd-analyze security pixel.service").stdout
    assert float(rating.strip().splitlines()[-1].split(":")[1].split()[0]) <= 2.0


def test_a_hup_replaces_the_workers_and_not_the_master(host: Any, ask: Any) -> None:
    master = main_pid(host)
    before = {process.pid for process in host.process.filter(ppid=master)}
    host.run_expect([0], "systemctl reload pixel")
    for _ in range(50):
        after = {process.pid for process in host.process.filter(ppid=master)}
        if len(after) == 2 and not after & before:
            break
        time.sleep(0.2)
    assert not after & before
    assert main_pid(host) == master
    wait_until_ready(host, ask)


RESTART_UNDER_REQUESTS = """
import http.client, subprocess, threading, time
restart = subprocess.Popen(["systemctl", "restart", "pixel"])
answers, end = [], None
while end is None or time.monotonic() < end:
    if end is None and restart.poll() is not None:
        end = time.monotonic() + 1
    connection = http.client.HTTPConnection("{address}", 8000, timeout=20)
    connection.request("GET", "/ping", headers={{"Connection": "close"}})
    answers.append(connection.getresponse().status)
print(len(answers), set(answers))
"""


def test_a_restart_refuses_no_connection(host: Any, shell: Any, address: str, ask: Any) -> None:
    before = main_pid(host)
    output = shell(f"python3 - <<'END'\n{RESTART_UNDER_REQUESTS.format(address=address)}\nEND\n")
    count, statuses = output.split(maxsplit=1)
    assert int(count) > 5
    assert statuses.strip() == "{200}"
    assert main_pid(host) != before


def test_a_killed_master_is_restarted(host: Any, ask: Any) -> None:
    before = main_pid(host)
    host.run_expect([0], f"kill -9 {before}")
    wait_until_ready(host, ask)
    assert main_pid(host) not in (0, before)


def test_without_redis_the_app_is_not_ready_and_recovers_by_itself(host: Any, ask: Any) -> None:
    host.run_expect([0], "systemctl stop redis-server")
    try:
        program = (
            "import sys, time, urllib.request, urllib.error\n"
            "start = time.monotonic()\n"
            "try: urllib.request.urlopen(sys.argv[1], timeout=5)\n"
            "except urllib.error.HTTPError as error:\n"
            "    print(error.code, error.headers['Retry-After'], time.monotonic() - start < 1)\n"
        )
        output = host.check_output(
            f'python3 -c "{program}" http://$(hostname -I | cut -d" " -f1):8000/readyz'
        )
        assert output == "503 1 True"
    finally:
        host.run_expect([0], "systemctl start redis-server")
    wait_until_ready(host, ask)


def test_invalid_settings_stop_the_play_and_the_service_keeps_running(
    converge: Any, host: Any, ask: Any
) -> None:
    before = main_pid(host)
    done = converge(pixel_app_settings={"PIXEL_EVENTS_MAXLEN": "few"})
    assert done.returncode != 0
    assert "PIXEL_EVENTS_MAXLEN" in done.stdout
    assert main_pid(host) == before
    wait_until_ready(host, ask)


def test_a_deploy_removes_old_releases(converge: Any, host: Any, ask: Any) -> None:
    """Three are kept: the current one, the one before it, and the newest complete one of the others."""
    former = ask("/ping")["release"]
    for number in range(1, 6):
        path = f"/opt/pixel/releases/old-{number}"
        complete = f"touch {path}/release.env" if number < 5 else "true"
        host.run_expect([0], f"sh -c 'mkdir -p {path} && {complete} && touch -d 2020-01-0{number} {path}'")
    host.run_expect([0], f"touch -d 2019-01-01 /opt/pixel/releases/{former}")
    done = converge(pixel_app_release="named-by-hand")
    assert done.returncode == 0, done.stdout
    assert ask("/ping")["release"] == "named-by-hand"
    releases = host.check_output("ls /opt/pixel/releases").split()
    assert sorted(releases) == sorted(["named-by-hand", former, "old-4"])
    assert converge().returncode == 0
    assert ask("/ping")["release"] == former


def test_a_candidate_port_in_use_is_reported_and_the_same_release_can_be_deployed_later(
    converge: Any, host: Any, ask: Any
) -> None:
    name = host.backend.hostname
    before = main_pid(host)
    squatter = "systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 7999"
    host.run_expect([0], squatter)
    try:
        refused = converge(pixel_app_settings={"PIXEL_EVENTS_MAXLEN": 5000})
    finally:
        host.run_expect([0], "systemctl stop squatter")
    assert refused.returncode != 0
    assert f"port 7999 on {name} is in use by python3" in refused.words
    assert main_pid(host) == before
    assert converge(pixel_app_settings={"PIXEL_EVENTS_MAXLEN": 5000}).returncode == 0
    assert main_pid(host) != before
    assert converge().returncode == 0
    wait_until_ready(host, ask)


def test_a_deploy_works_with_a_strict_umask_and_a_dead_proxy_on_the_host(
    converge: Any, host: Any, ask: Any, shell: Any
) -> None:
    """sudo's umask would hide files from the service's user; the proxy does not answer."""
    former = ask("/ping")["release"]
    shell(
        "cp /etc/environment /etc/environment.kept; echo http_proxy=http://127.0.0.1:1 >>/etc/environment\n"
        "printf 'Defaults umask=0077\\nDefaults umask_override\\n' >/etc/sudoers.d/umask\n"
    )
    try:
        assert host.check_output("umask") == "0077"
        done = converge(pixel_app_release="under-0077")
    finally:
        shell("rm /etc/sudoers.d/umask; mv /etc/environment.kept /etc/environment")
    assert done.returncode == 0, done.stdout
    assert ask("/ping")["release"] == "under-0077"
    assert converge(pixel_app_release=former).returncode == 0
    assert ask("/ping")["release"] == former


@pytest.mark.parametrize(
    "damage",
    ["chmod 0700 .", "ln -sfn /usr/bin/python3.99 bin/python3; ln -sfn /usr/bin/python3.99 bin/python"],
    ids=["unreadable", "python-replaced"],
)
def test_a_release_that_cannot_start_is_built_again(
    converge: Any, host: Any, ask: Any, shell: Any, damage: str
) -> None:
    """As after a strict umask, or after a distribution upgrade that replaces Python."""
    shell(f"cd $(readlink /opt/pixel/current) && {{ {damage}; }}; systemctl restart --no-block pixel")
    done = converge()
    assert done.returncode == 0, done.stdout
    wait_until_ready(host, ask)
    host.run_expect([0], "systemctl restart pixel")
    wait_until_ready(host, ask)
    assert converge().changes() == {host.backend.hostname: 0}


SECOND = ["pixel@8001.socket", "pixel@8001.service"]


def test_instances_can_be_added_and_removed(converge: Any, host: Any, ask: Any, address: str) -> None:
    name = host.backend.hostname
    first = ask("/ping")
    second = first | {"instance": f"{name}-8001", "port": 8001}
    assert converge(pixel_app_instances=2).returncode == 0
    for unit in SECOND:
        assert host.service(unit).is_running
        assert host.service(unit).is_enabled
    file = host.file("/run/pixel-8001.sock")
    assert (file.is_socket, file.group, oct(file.mode)) == (True, "www-data", "0o660")
    assert [ask("/ping", port) for port in (8000, 8001)] == [first, second]
    before = main_pid(host)
    host.run_expect([0], "systemctl restart pixel@8001")
    assert ask("/readyz", 8001)["redis"] == "ok"
    assert main_pid(host) == before

    # A third instance cannot listen; the other two keep serving.
    host.run_expect([0], f"systemd-run --unit=squatter python3 -m http.server --bind {address} 8002")
    try:
        done = converge(pixel_app_instances=3)
        assert done.returncode != 0
        assert f"{name} did not take release" in done.words
        assert "was restored and serves" in done.words
        assert not host.service("pixel@8002").is_running
        assert [ask("/ping", port) for port in (8000, 8001)] == [first, second]
    finally:
        host.run_expect([0], "systemctl stop squatter")
    assert converge(pixel_app_instances=2).changes() == {name: 0}

    assert converge().returncode == 0
    assert ask("/ping") == first
    assert not [each for each in host.socket.get_listening_sockets() if ":8001" in each]
    assert host.check_output("systemctl list-units --all --plain --no-legend 'pixel@*.service'") == ""
    assert host.check_output("find /etc/systemd/system -name 'pixel@*'") == ""
