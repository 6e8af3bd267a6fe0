#!/usr/bin/python
"""Ansible module: gather on a host what `playbooks/doctor.yml` judges. It changes nothing."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_checkup
short_description: Gather facts about a host's state that commonly cause faults
description:
  - >-
    Reads clocks, file systems, CPU steal, memory, units, listening ports, certificates, package versions and
    limits of open files, and tries connections to other hosts, all in one run of about a second. It changes
    nothing.
  - The filter P(pixel.endpoint.doctor_checks#filter) computes the options of a host, and
    P(pixel.endpoint.doctor_findings#filter) judges the results of all hosts.
options:
  units:
    description: Names of systemd units with their suffix.
    type: list
    elements: str
    default: []
  ports:
    description: TCP ports whose listeners are reported.
    type: list
    elements: int
    default: []
  connect:
    description: Addresses C(host:port) to which a TCP connection is opened and closed.
    type: list
    elements: str
    default: []
  clocks:
    description: Addresses C(host:port) of balancers whose clock is compared with this host's.
    type: list
    elements: str
    default: []
  packages:
    description: Names of Debian packages.
    type: list
    elements: str
    default: []
  certificates:
    description: Paths of certificates. Paths that do not exist are left out.
    type: list
    elements: path
    default: []
  timeout:
    description: Seconds that a connection may take.
    type: float
    default: 3
attributes:
  check_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Gather the state of the host
  pixel.endpoint.host_checkup:
    units: [nginx.service]
    ports: [80]
    connect: ["10.0.0.12:8000"]
"""

RETURN = r"""
clocks:
  description: >-
    By address, C(offset) (this host's clock minus the other's) and C(uncertainty) in seconds, or C(error).
  type: dict
  returned: always
synchronized:
  description: Whether the clock is synchronized; null in a container, which has the clock of its machine.
  type: bool
  returned: always
filesystems:
  description: By mount point, the free shares C(bytes) and C(inodes); C(inodes) is null without a limit.
  type: dict
  returned: always
steal:
  description: Share of CPU time that the hypervisor gave to others during the run.
  type: float
  returned: always
memory:
  description: Available share of the memory.
  type: float
  returned: always
units:
  description: By name, C(loaded), C(active), C(enabled) and C(result) as systemd reports them.
  type: dict
  returned: always
listeners:
  description: By port, the listening processes, each with C(name), C(pid) and C(unit).
  type: dict
  returned: always
open_files:
  description: By unit, C(used) and C(limit) of its process that is closest to its limit of open files.
  type: dict
  returned: always
connection_errors:
  description: By address, the error of a connection that failed.
  type: dict
  returned: always
packages:
  description: Versions of installed packages by name.
  type: dict
  returned: always
certificates:
  description: Expiry time of each certificate by path, in seconds since 1970.
  type: dict
  returned: always
backup:
  description: Time of the last backup in seconds since 1970; null if there is none.
  type: float
  returned: always
drained:
  description: App hosts that an operator has drained on this balancer.
  type: list
  elements: str
  returned: always
backends:
  description: Hash of the backends and weights that all balancers share; empty if this is no balancer.
  type: str
  returned: always
reboot_required:
  description: Whether an upgrade takes effect only after a reboot.
  type: bool
  returned: always
time:
  description: Time of this host, in seconds since 1970.
  type: float
  returned: always
"""

import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

# Seconds between the two samples of CPU times.
SAMPLE = 1.0
# File systems that use a disk or memory. Others, such as proc, have no free space.
SPACES = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "nfs", "nfs4", "overlay", "tmpfs", "xfs", "zfs"}
BACKUP = Path("/var/lib/pixel-metrics/pixel_backup.prom")
DRAINS = Path("/var/lib/pixel-lb/drains.json")
BACKENDS = Path("/etc/nginx/pixel/backends.json")
REBOOT_REQUIRED = Path("/run/reboot-required")
UNIT_PROPERTIES = ("Id", "LoadState", "ActiveState", "UnitFileState", "Result", "MainPID")


def run(*command: str) -> str:
    """Return the standard output of a command; empty if it is missing or fails without output."""
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def read(path: str | Path) -> str:
    """Return the text of a file; empty if it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def drained_hosts() -> list[str]:
    """Return the app hosts that this balancer sends no requests to, because an operator has drained them."""
    drains = json.loads(read(DRAINS) or "{}")
    return sorted(host for host, drain in drains.items() if drain["drained"])


def backends_hash() -> str:
    """Return a hash of the backends and weights of this balancer; empty if it is none."""
    facts = json.loads(read(BACKENDS) or "{}")
    common = {name: value for name, value in facts.items() if name not in ("balancer", "peers", "probe_url")}
    return hashlib.sha256(json.dumps(common).encode()).hexdigest()[:12] if facts else ""


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def connection_error(address: str, timeout: float) -> str:
    """Open and close a TCP connection; return its error, or an empty text."""
    try:
        socket.create_connection(split_address(address), timeout).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def clock(address: str, timeout: float) -> dict[str, Any]:
    """Compare this host's clock with a balancer's; the first request only opens the connection."""
    connection = http.client.HTTPConnection(*split_address(address), timeout=timeout)
    try:
        for _ in range(2):
            before = time.time()
            connection.request("GET", "/lb/clock")
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            after = time.time()
        if answer.status != 200 or not re.fullmatch(r"\d+[.]\d+", text):
            return {"error": f"GET /lb/clock was answered {answer.status}"}
        return {"offset": (before + after) / 2 - float(text), "uncertainty": (after - before) / 2}
    except (OSError, http.client.HTTPException) as error:
        return {"error": str(error) or type(error).__name__}
    finally:
        connection.close()


def synchronized() -> bool | None:
    """Tell whether the clock is synchronized; None in a container."""
    if run("systemd-detect-virt", "--container").strip() not in ("", "none"):
        return None
    return run("timedatectl", "show", "--property=NTPSynchronized", "--value").strip() == "yes"


def filesystems(
    mounts: str, statvfs: Callable[[str], os.statvfs_result] = os.statvfs
) -> dict[str, dict[str, float | None]]:
    """Return the free shares of writable file systems.

    Args:
        mounts: The text of /proc/mounts.
        statvfs: Measures a mount point.
    """
    found: dict[str, dict[str, float | None]] = {}
    seen = set()
    for line in mounts.splitlines():
        source, point, kind, options = line.split()[:4]
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        # A source is mounted in several places by bind mounts; each tmpfs is one of its own.
        identity = point if kind == "tmpfs" else source
        # A container runtime mounts single files, such as /etc/hosts.
        if kind not in SPACES or "ro" in options.split(",") or identity in seen or not os.path.isdir(point):
            continue
        try:
            measured = statvfs(point)
        except OSError:
            continue
        seen.add(identity)
        if measured.f_blocks:
            found[point] = {
                "bytes": measured.f_bavail / measured.f_blocks,
                "inodes": measured.f_favail / measured.f_files if measured.f_files else None,
            }
    return found


def cpu_times(text: str) -> tuple[int, int]:
    """Return stolen and total ticks of the first line of /proc/stat."""
    # user nice system idle iowait irq softirq steal; guest times are part of user and nice.
    ticks = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def steal_share(before: str, after: str) -> float:
    """Return the share of stolen CPU time between two texts of /proc/stat."""
    (stolen, total), (stolen_later, total_later) = cpu_times(before), cpu_times(after)
    return (stolen_later - stolen) / max(total_later - total, 1)


def memory_share(text: str) -> float:
    """Return the available share of the memory from /proc/meminfo."""
    sizes = dict(re.findall(r"(?m)^(MemTotal|MemAvailable): +(\d+)", text))
    return int(sizes["MemAvailable"]) / int(sizes["MemTotal"])


def unit_states(text: str) -> dict[str, dict[str, str]]:
    """Parse the output of `systemctl show`: one property a line, an empty line between units."""
    blocks = [block for block in text.strip().split("\n\n") if block]
    shown = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]
    return {
        unit["Id"]: {
            "loaded": unit["LoadState"],
            "active": unit["ActiveState"],
            "enabled": unit["UnitFileState"],
            "result": unit.get("Result", ""),
            "pid": unit.get("MainPID", "0"),
        }
        for unit in shown
    }


def unit_of(cgroups: str) -> str:
    """Return the service or scope from the text of /proc/PID/cgroup; empty if it is in none."""
    named: list[str] = re.findall(r"(?m)/([^/\n]+\.(?:service|scope))(?:/|$)", cgroups)
    return named[-1] if named else ""


def listeners(text: str, ports: Iterable[int]) -> dict[str, list[dict[str, str]]]:
    """Return the listening processes by port, from the output of `ss -Hltnp`."""
    found: dict[str, list[dict[str, str]]] = {str(port): [] for port in ports}
    for line in text.splitlines():
        port = line.split()[3].rpartition(":")[2]
        for name, pid in re.findall(r'"([^"]+)",pid=(\d+)', line):
            if port in found:
                found[port].append({"name": name, "pid": pid, "unit": unit_of(read(f"/proc/{pid}/cgroup"))})
    return found


def open_files(pid: str) -> tuple[int, int]:
    """Return the number of open files of a process and its soft limit."""
    limit = re.search(r"(?m)^Max open files +(\d+)", read(f"/proc/{pid}/limits"))
    try:
        return len(os.listdir(f"/proc/{pid}/fd")), int(limit[1]) if limit else 0
    except OSError:
        return 0, 0


def fullest(pid: str) -> dict[str, int] | None:
    """Return the open files of a process or of that of its children that is closest to its limit."""
    pids = [pid, *run("pgrep", "--parent", pid).split()]
    measured = [(used, limit) for used, limit in map(open_files, pids) if limit]
    if not measured:
        return None
    used, limit = max(measured, key=lambda each: each[0] / each[1])
    return {"used": used, "limit": limit}


def package_versions(text: str) -> dict[str, str]:
    """Return the versions of installed packages from lines `status name version` of dpkg-query."""
    lines = [line.split() for line in text.splitlines()]
    return {words[1]: words[2] for words in lines if len(words) == 3 and words[0] == "ii"}


def expiry(path: str) -> float | None:
    """Return when the first certificate of a file expires; None if the file has none."""
    matched = re.search(r"notAfter=(.+)", run("openssl", "x509", "-noout", "-enddate", "-in", path))
    return ssl.cert_time_to_seconds(matched[1].strip()) if matched else None


def backup_time(text: str) -> float | None:
    """Return the time of the last backup (in a repository, the last verified one) from the metrics."""
    found = dict(
        re.findall(r"(?m)^pixel_backup_((?:verified_)?timestamp)_seconds(?:{.*})? ([0-9.e+]+)$", text)
    )
    time_text = found.get("verified_timestamp", found.get("timestamp"))
    return float(time_text) if time_text else None


def gather(option: dict[str, Any]) -> dict[str, Any]:
    """Gather the facts.

    Args:
        option: The module's options.
    """
    before, started = read("/proc/stat"), time.monotonic()
    timeout = option["timeout"]
    errors = {address: connection_error(address, timeout) for address in option["connect"]}
    properties = f"--property={','.join(UNIT_PROPERTIES)}"
    units = (
        unit_states(run("systemctl", "show", properties, "--", *option["units"])) if option["units"] else {}
    )
    files = {name: fullest(unit["pid"]) for name, unit in units.items() if unit["pid"] != "0"}
    form = "-f=${db:Status-Abbrev} ${Package} ${Version}\n"
    expiries = {path: expiry(path) for path in option["certificates"] if os.path.exists(path)}
    result: dict[str, Any] = {
        "clocks": {address: clock(address, timeout) for address in option["clocks"]},
        "synchronized": synchronized(),
        "filesystems": filesystems(read("/proc/mounts")),
        "memory": memory_share(read("/proc/meminfo")),
        "units": units,
        "listeners": listeners(run("ss", "-Hltnp"), option["ports"]),
        "open_files": {name: each for name, each in files.items() if each is not None},
        "connection_errors": {address: error for address, error in errors.items() if error},
        "packages": package_versions(run("dpkg-query", "-W", form, *option["packages"])),
        "certificates": {path: when for path, when in expiries.items() if when is not None},
        "backup": backup_time(read(BACKUP)),
        "drained": drained_hosts(),
        "backends": backends_hash(),
        "reboot_required": REBOOT_REQUIRED.exists(),
    }
    time.sleep(max(0.0, started + SAMPLE - time.monotonic()))
    return result | {"steal": steal_share(before, read("/proc/stat")), "time": time.time()}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "units": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "connect": {"type": "list", "elements": "str", "default": []},
            "clocks": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "certificates": {"type": "list", "elements": "path", "default": []},
            "timeout": {"type": "float", "default": 3},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **gather(module.params))


if __name__ == "__main__":
    main()
