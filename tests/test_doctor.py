"""What module host_checkup reads, and how the doctor's filters judge it. Scenario default plants faults."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.filter import doctor
from ansible_collections.pixel.endpoint.plugins.modules import host_checkup

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "all": ["c5", "t2"],
    "redis": ["c5"],
    "pixel_app": ["c5", "t2"],
    "nginx_lb": ["c5"],
    "monitoring": ["c5"],
}
NOW = 1_800_000_000.0
RUNNING = {"loaded": "loaded", "active": "active", "enabled": "enabled", "result": "success", "pid": "7"}


def healthy() -> dict[str, Any]:
    return {
        "clocks": {"10.0.0.1:80": {"offset": 0.01, "uncertainty": 0.001}},
        "synchronized": True,
        "filesystems": {"/": {"bytes": 0.5, "inodes": 0.9}, "/data": {"bytes": 0.5, "inodes": None}},
        "steal": 0.0,
        "memory": 0.5,
        "units": {"nginx.service": RUNNING},
        "listeners": {"9100": [{"name": "node", "pid": "7", "unit": "prometheus-node-exporter.service"}]},
        "open_files": {"nginx.service": {"used": 10, "limit": 1024}},
        "connection_errors": {},
        "packages": {"nginx": "1.22.1-9"},
        "certificates": {"/etc/nginx/tls/fullchain.pem": NOW + 40 * 86400},
        "backup": NOW - 3600,
        "drained": [],
        "backends": "",
        "reboot_required": False,
        "time": NOW,
    }


def staged(**changes: Any) -> dict[str, Any]:
    history = [{"time": "2027-01-01T00:00:00Z", "release": "1.0.0-a", "rolled_back_from": ""}]
    return {"changed": False, "current": "1.0.0-a", "history": history} | changes


@pytest.fixture
def hostvars() -> dict[str, dict[str, Any]]:
    """A healthy fleet of two hosts, with the registered results of the playbook."""
    return {
        host: {
            "inventory_hostname": host,
            "private_address": f"10.0.0.{number}",
            "__doctor": healthy(),
            "__pixel_app_stage": staged(),
        }
        for number, host in enumerate(("c5", "t2"), 1)
    }


def judge(hostvars: dict[str, dict[str, Any]]) -> list[str]:
    return doctor.doctor_findings(hostvars, GROUPS, ["c5", "t2"])


def test_a_healthy_fleet_has_no_finding(hostvars: dict[str, dict[str, Any]]) -> None:
    assert judge(hostvars) == []


def test_balancers_with_different_weights_are_found(hostvars: dict[str, dict[str, Any]]) -> None:
    for report in (hostvars[host]["__doctor"] for host in ("c5", "t2")):
        report["backends"] = "a"
    assert judge(hostvars) == []
    hostvars["t2"]["__doctor"]["backends"] = "b"
    (found,) = judge(hostvars)
    assert found.startswith("fleet: c5, t2 do not balance by the same backends and weights")


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ({"filesystems": {"/": {"bytes": 0.0312, "inodes": 0.9}}}, "3.1 % of the bytes of / are free."),
        ({"filesystems": {"/": {"bytes": 0.5, "inodes": 0.01}}}, "1 % of the inodes of / are free."),
        ({"memory": 0.02}, "2 % of the memory are available"),
        ({"steal": 0.4}, "the hypervisor takes 40 % of the CPU time."),
        (
            {"open_files": {"x.service": {"used": 90, "limit": 100}}},
            "a process of x.service has 90 of at most 100",
        ),
        ({"reboot_required": True}, "only after a reboot"),
        (
            {"units": {"nginx.service": RUNNING | {"active": "failed", "result": "exit-code"}}},
            "failed (exit-code)",
        ),
        (
            {"units": {"nginx.service": RUNNING | {"loaded": "not-found", "active": "inactive"}}},
            "is not installed",
        ),
        ({"units": {"pixel-lb.service": RUNNING | {"active": "inactive"}}}, "pixel-lb.service is inactive"),
        (
            {"listeners": {"9100": [{"name": "nc", "pid": "9", "unit": "session-1.scope"}]}},
            "port 9100 is used by nc (process 9), not by prometheus-node-exporter.service",
        ),
        (
            {"connection_errors": {"10.0.0.2:8000": "Connection refused"}},
            "can't reach the app on t2 at 10.0.0.2:8000",
        ),
        (
            {"clocks": {"10.0.0.1:80": {"offset": 3.0, "uncertainty": 0.1}}},
            "3.0 seconds ahead of that of Nginx on c5",
        ),
        (
            {"clocks": {"10.0.0.1:80": {"offset": -90.0, "uncertainty": 0.1}}},
            "2 minutes behind that of Nginx on c5",
        ),
        ({"synchronized": False}, "the clock is not synchronized"),
        ({"certificates": {"/a.pem": NOW + 5 * 86400}}, "the certificate /a.pem expires in 5 days"),
        ({"certificates": {"/a.pem": NOW - 7200}}, "the certificate /a.pem expired 2 hours ago"),
        ({"drained": ["t2"]}, "t2 is drained and gets no requests: playbooks/undrain.yml -e host=t2"),
    ],
)
def test_a_fault_of_a_host_is_one_finding(
    hostvars: dict[str, dict[str, Any]], fault: dict[str, Any], finding: str
) -> None:
    hostvars["c5"]["__doctor"] |= fault
    (found,) = judge(hostvars)
    assert found.startswith("c5: ")
    assert finding in found


@pytest.mark.parametrize(
    ("result", "finding"),
    [
        (
            staged(warning="", diff=[{"before_header": "/etc/pixel/pixel.env"}]),
            "(differs: /etc/pixel/pixel.env)",
        ),
        ({"failed": True, "msg": "no source"}, "can't be compared with the inventory's: no source"),
    ],
)
def test_drift_of_the_deployment_is_a_finding(
    hostvars: dict[str, dict[str, Any]], result: dict[str, Any], finding: str
) -> None:
    hostvars["t2"]["__pixel_app_stage"] = result
    (found,) = judge(hostvars)
    assert found.startswith("t2: ")
    assert finding in found


def test_versions_are_compared_between_hosts(hostvars: dict[str, dict[str, Any]]) -> None:
    hostvars["t2"]["__doctor"]["packages"] = {"nginx": "1.26"}
    hostvars["t2"]["__pixel_app_stage"]["current"] = "0.9.0-b"
    assert [line.partition("(")[2].partition(")")[0] for line in judge(hostvars)] == [
        "1.22.1-9 on c5, 1.26 on t2",
        "1.0.0-a on c5, 0.9.0-b on t2",
    ]


def test_an_old_backup_is_a_finding_and_a_missing_one_only_after_a_day(
    hostvars: dict[str, dict[str, Any]],
) -> None:
    hostvars["c5"]["__doctor"]["backup"] = NOW - 50 * 3600
    assert judge(hostvars) == ["fleet: the newest backup is 2 days old: playbooks/backup.yml"]
    hostvars["c5"]["__doctor"]["backup"] = None
    for each in hostvars.values():
        each["__pixel_app_stage"]["history"][0]["time"] = "2027-01-15T07:00:00Z"
    assert judge(hostvars) == []
    hostvars["t2"]["__pixel_app_stage"]["history"][0]["time"] = "2027-01-10T07:00:00Z"
    assert judge(hostvars) == ["fleet: no backup was ever made: playbooks/backup.yml"]


def test_a_host_that_does_not_answer_is_a_finding(hostvars: dict[str, dict[str, Any]]) -> None:
    hostvars["t2"] |= {"__doctor": {"unreachable": True, "msg": "timed\n out"}, "__pixel_app_stage": {}}
    assert judge(hostvars) == ["t2: can't be checked: timed out"]


def test_an_optional_unit_that_is_disabled_is_no_finding(hostvars: dict[str, dict[str, Any]]) -> None:
    off = RUNNING | {"active": "inactive", "enabled": "disabled"}
    hostvars["c5"]["__doctor"]["units"] = {
        "pixel-lb.service": off,
        "certbot.timer": off | {"loaded": "not-found"},
    }
    assert judge(hostvars) == []


def test_thresholds_are_those_of_role_monitoring(hostvars: dict[str, dict[str, Any]]) -> None:
    defaults = yaml.safe_load((ROOT / "roles/monitoring/defaults/main.yml").read_text())
    for name, value in (
        doctor.DISK_FREE_RATIO,
        doctor.STEAL_RATIO,
        doctor.CERTIFICATE_DAYS,
        doctor.BACKUP_HOURS,
    ):
        assert defaults[name] == value
    hostvars["c5"]["monitoring_disk_free_ratio"] = "0.6"
    assert len(judge(hostvars)) == 2


def test_checks_of_a_host_follow_from_its_groups(hostvars: dict[str, dict[str, Any]]) -> None:
    hostvars["t2"]["pixel_app_instances"] = 2
    first, second = (doctor.doctor_checks(hostvars, GROUPS, host) for host in ("c5", "t2"))
    assert {80, 6379, 8000, 9090, 9093, 9100, 9113, 9115, 9121} == set(first["ports"])
    assert second["ports"] == [8000, 8001, 9100]
    assert {"10.0.0.1:6379", "10.0.0.1:80", "10.0.0.1:8000"} <= set(second["connect"])
    assert {"10.0.0.2:8001", "10.0.0.2:9100"} <= set(first["connect"])
    assert {"pixel.service", "pixel.socket", "pixel@8001.service", "pixel@8001.socket"} <= set(
        second["units"]
    )
    assert "nginx.service" not in second["units"]
    assert (first["certificates"], second["certificates"]) == (["/etc/nginx/tls/fullchain.pem"], [])
    assert second["clocks"] == ["10.0.0.1:80"]


def test_a_voter_and_the_clusters_service_are_checked(hostvars: dict[str, dict[str, Any]]) -> None:
    groups = GROUPS | {"redis": ["c5", "t2", "t3"]}
    first, second = (doctor.doctor_checks(hostvars | {"t3": {}}, groups, host) for host in ("c5", "t2"))
    assert (6380 in first["ports"], 6380 in second["ports"]) == (False, True)
    assert {"redis-server.service", "redis-server@voter.service", "redis-cluster.service"} <= set(
        second["units"]
    )
    assert "redis-server@voter.service" not in first["units"]


class Clock(http.server.BaseHTTPRequestHandler):
    """A balancer whose clock is five seconds behind."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{time.time() - 5:.3f}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def balancer() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Clock) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_clock_is_compared_with_the_balancers(balancer: str) -> None:
    measured = host_checkup.clock(balancer, 3)
    assert abs(measured["offset"] - 5) < 0.1 + measured["uncertainty"]


def test_a_closed_port_is_reported_with_its_error(balancer: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
    assert host_checkup.connection_error(closed, 3) == "Connection refused"
    assert "refused" in host_checkup.clock(closed, 3)["error"]
    assert host_checkup.connection_error(balancer, 3) == ""


def test_file_systems_are_measured_once_and_read_only_ones_are_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "a b"):
        (tmp_path / name).mkdir()
    file = tmp_path / "hosts"
    file.write_text("")
    mounts = f"""proc /proc proc rw 0 0
/dev/sda1 {file} ext4 rw 0 0
/dev/sda1 {tmp_path}/a ext4 rw,relatime 0 0
/dev/sda1 {tmp_path}/b ext4 rw 0 0
tmpfs {tmp_path}/a\\040b tmpfs rw 0 0
/dev/loop1 / ext4 ro,nodev 0 0
"""
    # f_bsize, f_frsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree, f_favail, f_flag, f_namemax
    full = os.statvfs_result((4096, 4096, 100, 10, 5, 1000, 20, 20, 0, 255))
    found = host_checkup.filesystems(mounts, lambda _: full)
    assert found == {f"{tmp_path}/{name}": {"bytes": 0.05, "inodes": 0.02} for name in ("a", "a b")}


def test_steal_is_a_share_of_all_time_between_two_samples() -> None:
    before = "cpu  100 0 100 800 0 0 0 50 30 0\ncpu0 1 2 3\n"
    after = "cpu  120 0 110 850 0 0 0 70 40 0\ncpu0 1 2 3\n"
    assert host_checkup.steal_share(before, after) == 0.2


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("1:name=systemd:/docker/ab/system.slice/nginx.service\n0::/\n", "nginx.service"),
        ("0::/system.slice/system-pixel.slice/pixel@8001.service/app\n", "pixel@8001.service"),
        ("0::/init.scope\n", "init.scope"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", "session-1.scope"),
        ("0::/\n", ""),
    ],
)
def test_the_unit_of_a_process_is_the_innermost_of_its_control_group(cgroups: str, unit: str) -> None:
    assert host_checkup.unit_of(cgroups) == unit


def test_listeners_and_open_files_of_this_process_are_found() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = host_checkup.listeners(host_checkup.run("ss", "-Hltnp"), [port, 1])
        assert [process["pid"] for process in found[str(port)]] == [str(os.getpid())]
        assert found["1"] == []
        used, limit = host_checkup.open_files(str(os.getpid()))
    assert 3 < used < limit


def test_texts_of_programs_are_parsed() -> None:
    shown = "Id=a.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\nMainPID=5\n"
    assert host_checkup.unit_states(f"{shown}\n{shown.replace('a.service', 'b.timer')}").keys() == {
        "a.service",
        "b.timer",
    }
    assert host_checkup.package_versions("ii  nginx 1.22.1-9\nrc  redis 7\nun  x \n") == {"nginx": "1.22.1-9"}
    assert host_checkup.backup_time("# HELP x\npixel_backup_timestamp_seconds 1800000000\n") == 1_800_000_000
    verified = (
        "pixel_backup_timestamp_seconds 1800000000\npixel_backup_verified_timestamp_seconds 1700000000\n"
    )
    assert host_checkup.backup_time(verified) == 1_700_000_000
    assert host_checkup.backup_time("") is None
    assert host_checkup.memory_share("MemTotal:  200 kB\nMemFree: 1 kB\nMemAvailable:   50 kB\n") == 0.25
