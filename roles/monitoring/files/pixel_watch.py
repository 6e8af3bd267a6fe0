#!/usr/bin/python3
"""Write metrics of a balancer to text files for the node exporter.

    pixel_lb_backend_weight{backend}            weight in force
    pixel_lb_backend_share{backend}             factor of its base weight, set by the controller
    pixel_lb_backend_up{backend}                0 if an operator drained it or the controller marked it down
    pixel_lb_backend_cpu_credits{backend}       CPU credit balance, if the controller knows it
    pixel_lb_address_held                       1 on the holder of the address that moves, if there is one
    pixel_lb_loaded                             0 if Nginx has not loaded the files on disk
    pixel_certificate_not_after_seconds{path}   expiry time of a certificate, in seconds since 1970

and, from the access log, what clients saw (event streams have no latency):

    pixel_edge_requests_total{route,status,by}  requests; `by` tells whether an app host or Nginx answered
    pixel_edge_seconds{route}                   histogram of the time until the answer, of statuses below 400

A timer runs this program. If it fails, the files are not changed, and their age raises an alert.
It uses only the standard library and runs with the host's Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import subprocess
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# A directory that only root can change.
OUTPUT = Path("/var/lib/pixel-metrics/pixel_balancer.prom")
EDGE = Path("/var/lib/pixel-metrics/pixel_edge.prom")
# The counters of EDGE, and the position in the log up to which they count.
EDGE_STATE = Path("/var/lib/pixel-metrics/pixel_edge.json")
ACCESS_LOG = Path("/var/log/nginx/access.log")
NGINX = Path("/etc/nginx")

ACCESS_LINE = re.compile(
    rb'"uri":"(?:/cluster/[^/"]+)?(/(?:[^"?\\]|\\.)*)[^\n]*?"status":(\d+),"bytes":\d+,"seconds":([0-9.]+),'
    rb'"upstream":"[^"]*","upstream_status":"([^"]*)"'
)
PIXEL = "/pixel/{x}/{y}"
STREAM = "/events"
# Routes by path. All other paths are counted together, so that clients can't create metrics.
ROUTES = {
    path: path for path in ("/", "/pixel", "/pixels", "/canvas.png", "/canvas.rgb", STREAM)
} | dict.fromkeys(
    ("/healthz", "/readyz", "/metrics", "/ping", "/fleet/all", "/fleet/first", "/docs", "/openapi.json"),
    "operations",
)
OTHER = "other"
# Upper bounds of the histogram in seconds; monitoring_slo_latency_seconds is one of them.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# Counters that exist from the start: `rate` doesn't see the value with which a counter appears.
FIRST = [
    ("app", "200"),
    ("app", "500"),
    ("app", "503"),
    *(("balancer", status) for status in ("429", "502", "503", "504")),
]


def run(*command: str) -> str:
    """Run a command and return its output."""
    return subprocess.run(command, text=True, capture_output=True, check=True, timeout=30).stdout


def balancer(status: dict[str, Any]) -> list[str]:
    """Convert the output of `pixel-lb status` to metrics."""
    lines = [f"pixel_lb_loaded {int(status['loaded'])}"]
    if status["address"]:
        lines.append(f"pixel_lb_address_held {int(status['address']['held'])}")
    for name, backend in status["backends"].items():
        label = f'{{backend="{name}"}}'
        lines.append(f"pixel_lb_backend_weight{label} {backend['weight']}")
        lines.append(f"pixel_lb_backend_up{label} {int(backend['state'] == 'up')}")
        lines.append(f"pixel_lb_backend_share{label} {backend['share']}")
        if backend["cpu_credits"] is not None:
            lines.append(f"pixel_lb_backend_cpu_credits{label} {backend['cpu_credits']}")
    return lines


def certificate_paths(configuration: str) -> list[str]:
    """Return the paths of certificates in Nginx's configuration; relative ones start at its directory."""
    named = re.findall(r"^\s*ssl_certificate\s+\"?([^;\"$]+)\"?;", configuration, re.M)
    return sorted({str(NGINX / path) for path in named})


def expiry(path: str) -> int:
    """Return the expiry time of the first certificate in a file, in seconds since 1970."""
    output = run("openssl", "x509", "-noout", "-enddate", "-in", path)
    return int(ssl.cert_time_to_seconds(output.strip().removeprefix("notAfter=")))


def write(path: Path, text: str) -> None:
    """Replace a file atomically with its final mode. Links at its path or temporary path are not followed."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o644)
        file.write(text)
    new.replace(path)


def route(path: str) -> str:
    """Return the route of a path."""
    if path in ROUTES:
        return ROUTES[path]
    return PIXEL if re.fullmatch(r"/pixel/\d+/\d+", path) else OTHER


def answered_by(status: str, upstream_status: str) -> str:
    """Tell who gave an answer. Nginx records 502 and 504 for attempts that no app host has answered."""
    last = re.split(", | : ", upstream_status)[-1]
    return "app" if last == status and status not in ("502", "504") else "balancer"


class Edge:
    """Counters of the requests in the access log.

    Args:
        state: The counters and the position of an earlier run, as `state()` returns them; empty at first.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.position: dict[str, int] = state.get("position", {})
        names = sorted({*ROUTES.values(), PIXEL} - {"operations"})
        first = {f"{name} {status} {by}": 0 for name in names for by, status in FIRST}
        self.requests: dict[str, int] = first | state.get("requests", {})
        # By route: counts of the buckets, the last of them unbounded, and the sum of seconds.
        self.buckets: dict[str, list[int]] = {
            name: [0] * (len(BOUNDS) + 1) for name in names if name != STREAM
        } | state.get("buckets", {})
        self.seconds: dict[str, float] = dict.fromkeys(self.buckets, 0.0) | state.get("seconds", {})

    def state(self) -> dict[str, Any]:
        return vars(self)

    def count(self, lines: Iterable[bytes]) -> None:
        """Count requests."""
        for line in lines:
            if matched := ACCESS_LINE.search(line):
                path, status, seconds, upstream_status = (
                    each.decode(errors="replace") for each in matched.groups()
                )
                name = route(path)
                key = f"{name} {status} {answered_by(status, upstream_status)}"
                self.requests[key] = self.requests.get(key, 0) + 1
                if name in self.buckets and status < "400":
                    self.buckets[name][bisect_left(BOUNDS, float(seconds))] += 1
                    self.seconds[name] += float(seconds)

    def metrics(self) -> list[str]:
        lines = []
        for key, number in self.requests.items():
            name, status, by = key.split(" ")
            lines.append(f'pixel_edge_requests_total{{route="{name}",status="{status}",by="{by}"}} {number}')
        for name, counts in self.buckets.items():
            total = 0
            for bound, number in zip([*map("{:g}".format, BOUNDS), "+Inf"], counts, strict=True):
                total += number
                lines.append(f'pixel_edge_seconds_bucket{{route="{name}",le="{bound}"}} {total}')
            lines.append(f'pixel_edge_seconds_count{{route="{name}"}} {total}')
            lines.append(f'pixel_edge_seconds_sum{{route="{name}"}} {self.seconds[name]:.3f}')
        return lines

    def follow(self, log: Path) -> Iterator[bytes]:
        """Yield the log's complete lines since the last call, also across a rotation.

        The first call yields none.
        """
        try:
            now = log.stat()
        except FileNotFoundError:
            return
        inode, offset = self.position.get("inode", now.st_ino), self.position.get("offset", now.st_size)
        if inode != now.st_ino:
            # The former file; the next rotation compresses it.
            for former in log.parent.glob(f"{log.name}.*"):
                if former.stat().st_ino == inode:
                    with former.open("rb") as file:
                        file.seek(offset)
                        yield from file
            offset = 0
        elif offset > now.st_size:
            offset = 0
        with log.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                yield line
        self.position = {"inode": now.st_ino, "offset": offset}


def watch_edge() -> None:
    """Count the requests since the last run, and write the counters."""
    state = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        state = json.loads(EDGE_STATE.read_text())
    edge = Edge(state)
    edge.count(edge.follow(ACCESS_LOG))
    write(EDGE_STATE, json.dumps(edge.state()))
    write(EDGE, "# TYPE pixel_edge_seconds histogram\n" + "".join(f"{line}\n" for line in edge.metrics()))


def main() -> None:
    """Write the metrics."""
    watch_edge()
    lines = balancer(json.loads(run("/usr/local/sbin/pixel-lb", "status")))
    for path in certificate_paths(run("/usr/sbin/nginx", "-T")):
        lines.append(f'pixel_certificate_not_after_seconds{{path="{path}"}} {expiry(path)}')
    write(OUTPUT, "".join(f"{line}\n" for line in sorted(lines)))


if __name__ == "__main__":
    main()
