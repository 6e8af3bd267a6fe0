"""Role pixel_app alone, with a Redis on the same host."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


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
        # For two seconds, writes wait for a restart of Redis; then they are refused at once.
        program = (
            "import sys, time, urllib.request, urllib.error\n"
            "end = time.monotonic() + 8\n"
            "quick = 0\n"
            "while quick < 3 and time.monotonic() < end:\n"
            "    start = time.monotonic()\n"
            "    try: urllib.request.urlopen(sys.argv[1], timeout=5)\n"
            "    except urllib.error.HTTPError as error: answer = error\n"
            "    quick = quick + 1 if time.monotonic() - start < 1 else 0\n"
            "    print(answer.code, answer.headers['Retry-After'])\n"
            "print(quick)\n"
        )
        output = host.check_output(
            f'python3 -c "{program}" http://$(hostname -I | cut -d" " -f1):8000/readyz'
        )
        *answers, quick = output.splitlines()
        assert (set(answers), quick) == ({"503 1"}, "3")
    finally:
        host.run_expect([0], "systemctl start redis-server")
    wait_until_ready(host, ask)
