#!/usr/bin/python3
"""Samples a host's counters every second, one line of JSON each.

It runs on the host and needs only the standard library; playbooks/loadtest.yml copies it there. Figures
are counters, or gauges whose names end in `_gauge`; the report computes the differences.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

# Requests to the fleet never go through a proxy of the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TICKS = os.sysconf("SC_CLK_TCK")
SERVICES = {"pixel.service": "app", "nginx.service": "nginx", "redis-server.service": "redis"}
REDIS = {
    "redis_commands_processed_total": "commands",
    "redis_connected_clients": "clients_gauge",
    "redis_memory_used_bytes": "bytes_gauge",
}


def cpu() -> dict[str, float]:
    """Return the CPU seconds of all processors, and steal."""
    numbers = [int(field) / TICKS for field in Path("/proc/stat").read_text().split()[1:9]]
    idle = numbers[3] + numbers[4]
    busy = own_cpu()
    return {
        "processors": len(os.sched_getaffinity(0)),
        "busy": sum(numbers[:7]) - idle if busy is None else busy,
        "steal": numbers[7],
    }


def own_cpu() -> float | None:
    """Return the CPU seconds of a container, whose /proc/stat is the machine's; None on a real host."""
    own = Path("/proc/1/cgroup").read_text()
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        path = path.removesuffix("/init.scope")
        if "cpuacct" in controllers.split(",") and path != "/":
            usage = Path(f"/sys/fs/cgroup/{controllers}{path}/cpuacct.usage")
            return int(usage.read_text()) / 1e9
        if controllers == "":
            found = re.search(r"usage_usec (\d+)", read(f"/sys/fs/cgroup{path}/cpu.stat"))
            inside = path != "" or Path("/run/systemd/container").exists()
            if found and inside:
                return int(found[1]) / 1e6
    return None


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def services() -> dict[str, dict[str, float]]:
    """Return CPU seconds and resident bytes of each service's processes."""
    seconds: defaultdict[str, float] = defaultdict(float)
    resident: defaultdict[str, int] = defaultdict(int)
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        unit = re.search(r"/([^/]+\.service)$", read(f"/proc/{entry}/cgroup"), re.M)
        # Other instances of the app have units such as pixel@8001.service.
        name = SERVICES.get(re.sub("@.*[.]", ".", unit[1])) if unit else None
        fields = read(f"/proc/{entry}/stat").rpartition(")")[2].split()
        if name and fields:
            seconds[name] += sum(map(int, fields[11:13])) / TICKS
            resident[name] += int(fields[21]) * page
    return {name: {"cpu": seconds[name], "bytes_gauge": resident[name]} for name in seconds}


def memory() -> int:
    """Return the bytes used by the services of a container, or by a real host as a whole."""
    if own_cpu() is not None:
        return int(sum(service["bytes_gauge"] for service in services().values()))
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.M))
    return (int(sizes["MemTotal"]) - int(sizes["MemAvailable"])) * 1024


def network() -> dict[str, int]:
    """Return the bytes received and sent on all interfaces except loopback."""
    lines = [line.split(":", 1) for line in read("/proc/net/dev").splitlines()[2:]]
    counters = [rest.split() for name, rest in lines if name.strip() != "lo"]
    return {
        "received": sum(int(fields[0]) for fields in counters),
        "sent": sum(int(fields[8]) for fields in counters),
    }


def fetch(url: str) -> str:
    try:
        with DIRECT.open(url, timeout=0.5) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def redis(url: str) -> dict[str, float]:
    """Return figures from the Redis exporter."""
    found = re.findall(r"^(\w+) ([0-9.e+]+)$", fetch(url), re.M)
    return {REDIS[name]: float(value) for name, value in found if name in REDIS}


def nginx(url: str) -> dict[str, float]:
    """Return figures from Nginx's stub_status."""
    found = re.search(r"Active connections: (\d+).*?\n\s*\d+ \d+ (\d+)", fetch(url), re.S)
    return {"connections_gauge": int(found[1]), "requests": int(found[2])} if found else {}


def sample(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "time": time.time(),
        "cpu": cpu(),
        "bytes_gauge": memory(),
        "network": network(),
        "services": services(),
        "redis": redis(options.redis) if options.redis else {},
        "nginx": nginx(options.nginx) if options.nginx else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples of this host as lines of JSON.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--redis", help="address of its exporter's metrics")
    parser.add_argument("--nginx", help="address of its stub_status")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        print(json.dumps(sample(options), separators=(",", ":")), flush=True)
        time.sleep(1 - time.time() % 1)


if __name__ == "__main__":
    main()
