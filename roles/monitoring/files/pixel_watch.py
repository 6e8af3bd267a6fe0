#!/usr/bin/python3
"""What the node exporter can't know of a balancer, written for it as a text file.

    pixel_lb_backend_weight{backend}            its weight now
    pixel_lb_backend_share{backend}             the part of its usual weight that it gets, where weights adapt
    pixel_lb_backend_up{backend}                0 if an operator or the controller has taken it out
    pixel_lb_backend_cpu_credits{backend}       CPU credits left, where the controller knows them
    pixel_lb_loaded                             0 if Nginx runs with other files than there are
    pixel_certificate_not_after_seconds{path}   when a certificate ends

A timer runs it. If it fails, the file stays as it was, and its age is an alert.
Only the standard library is used: the host's own Python runs it.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("/var/lib/prometheus/node-exporter/pixel_balancer.prom")
NGINX = Path("/etc/nginx")
SHARES = Path("/var/lib/pixel-lb/shares.json")
THOUGHTS = Path("/run/pixel-lb/status.json")
# Seconds after which what the controller thinks is what a stopped one thought.
OLD = 60


def run(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=True, timeout=30).stdout


def credits_left() -> dict[str, float]:
    """CPU credits by backend, of those of which the controller knows."""
    if not THOUGHTS.exists() or time.time() - THOUGHTS.stat().st_mtime > OLD:
        return {}
    backends = json.loads(THOUGHTS.read_text())["backends"]
    return {each["name"]: each["cpu_credits"] for each in backends if each["cpu_credits"] is not None}


def balancer(status: dict[str, Any], shares: dict[str, Any], left: dict[str, float]) -> list[str]:
    """Lines from what `pixel-lb status` says, what its controller gives each backend, and credits."""
    lines = [f"pixel_lb_loaded {int(status['loaded'])}"]
    for name, backend in status["backends"].items():
        label = f'{{backend="{name}"}}'
        lines.append(f"pixel_lb_backend_weight{label} {backend['weight']}")
        lines.append(f"pixel_lb_backend_up{label} {int(backend['state'] == 'up')}")
        share, _ = shares.get(name, (1.0, False))
        lines.append(f"pixel_lb_backend_share{label} {share}")
        if name in left:
            lines.append(f"pixel_lb_backend_cpu_credits{label} {left[name]}")
    return lines


def certificate_paths(configuration: str) -> list[str]:
    """The certificates that a configuration of Nginx names; a relative one is beside the configuration."""
    named = re.findall(r"^\s*ssl_certificate\s+\"?([^;\"$]+)\"?;", configuration, re.M)
    return sorted({str(NGINX / path) for path in named})


def end_of(path: str) -> int:
    """When the first certificate of a file ends, in seconds since 1970."""
    said = run("openssl", "x509", "-noout", "-enddate", "-in", path)
    return int(ssl.cert_time_to_seconds(said.strip().removeprefix("notAfter=")))


def main() -> None:
    shares = json.loads(SHARES.read_text()) if SHARES.exists() else {}
    lines = balancer(json.loads(run("/usr/local/sbin/pixel-lb", "status")), shares, credits_left())
    for path in certificate_paths(run("/usr/sbin/nginx", "-T")):
        lines.append(f'pixel_certificate_not_after_seconds{{path="{path}"}} {end_of(path)}')
    half = OUTPUT.with_suffix(".half")
    half.write_text("".join(f"{line}\n" for line in sorted(lines)))
    half.chmod(0o644)
    half.replace(OUTPUT)


if __name__ == "__main__":
    main()
