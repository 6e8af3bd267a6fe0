#!/usr/bin/python3
"""Write metrics of a balancer to a text file for the node exporter.

    pixel_lb_backend_weight{backend}            weight in force
    pixel_lb_backend_share{backend}             factor of its base weight, set by the controller
    pixel_lb_backend_up{backend}                0 if an operator drained it or the controller marked it down
    pixel_lb_backend_cpu_credits{backend}       CPU credit balance, if the controller knows it
    pixel_lb_loaded                             0 if Nginx has not loaded the files on disk
    pixel_certificate_not_after_seconds{path}   expiry time of a certificate, in seconds since 1970

A timer runs this program. If it fails, the file is not changed, and its age raises an alert.
It uses only the standard library and runs with the host's Python.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
from pathlib import Path
from typing import Any

# A directory that only root can change.
OUTPUT = Path("/var/lib/pixel-metrics/pixel_balancer.prom")
NGINX = Path("/etc/nginx")


def run(*command: str) -> str:
    """Run a command and return its output."""
    return subprocess.run(command, text=True, capture_output=True, check=True, timeout=30).stdout


def balancer(status: dict[str, Any]) -> list[str]:
    """Convert the output of `pixel-lb status` to metrics."""
    lines = [f"pixel_lb_loaded {int(status['loaded'])}"]
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


def main() -> None:
    """Write the metrics."""
    lines = balancer(json.loads(run("/usr/local/sbin/pixel-lb", "status")))
    for path in certificate_paths(run("/usr/sbin/nginx", "-T")):
        lines.append(f'pixel_certificate_not_after_seconds{{path="{path}"}} {expiry(path)}')
    write(OUTPUT, "".join(f"{line}\n" for line in sorted(lines)))


if __name__ == "__main__":
    main()
