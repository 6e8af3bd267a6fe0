"""Describes the machine: hardware, kernel, versions, and the CPU use of other programs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = [
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "uvicorn-worker",
    "gunicorn",
    "uvloop",
    "httptools",
    "h11",
    "msgspec",
    "redis",
    "hiredis",
]
TOOLS = {
    "nginx": ["nginx", "-v"],
    "redis-server": ["redis-server", "--version"],
    "wrk": ["wrk", "-v"],
}
FLUSHES = 100


def describe(data: Path) -> dict[str, Any]:
    """Returns hardware, kernel and versions; `data` is a directory on the disk to measure."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
        "data_filesystem": _filesystem(data),
        "flush_ms": round(_flush_ms(data), 3),
        "versions": {**_tool_versions(), **_package_versions()},
    }


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name, command in TOOLS.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
            versions[name] = found[0] if found else "unknown"
    return versions


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _filesystem(directory: Path) -> str:
    """Returns the type of the directory's filesystem."""
    above = {str(parent) for parent in [directory.resolve(), *directory.resolve().parents]}
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _, kind = max((len(point), kind) for point, kind in mounts if point in above)
    return kind


def _flush_ms(directory: Path) -> float:
    """Returns the milliseconds of a small write and its fdatasync."""
    probe = directory / "flush"
    with probe.open("wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(FLUSHES):
            file.write(b"x" * 512)
            os.fdatasync(file.fileno())
        took = time.perf_counter() - began
    probe.unlink()
    return took / FLUSHES * 1000


class Interference:
    """Measures the CPU time that other programs used."""

    def __init__(self) -> None:
        self._began = _busy_seconds()
        self._wall = time.monotonic()

    def share(self, own_cpu_seconds: float) -> float:
        """Returns the other programs' share of all processors' time since the start, including steal."""
        available = (time.monotonic() - self._wall) * (os.cpu_count() or 1)
        return max(0.0, (_busy_seconds() - self._began - own_cpu_seconds) / available)


def _busy_seconds() -> float:
    numbers = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    idle, waiting = numbers[3], numbers[4]
    return (sum(numbers) - idle - waiting) / os.sysconf("SC_CLK_TCK")
