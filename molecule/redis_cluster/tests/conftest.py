"""Fixtures of scenario redis_cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "roles/redis/files"), str(ROOT / "molecule/redis_cluster/files")]


@pytest.fixture(scope="session")
def inventory() -> str:
    return "molecule/redis_cluster/inventory"


@pytest.fixture(scope="session")
def addresses(fleet: dict[str, Any]) -> list[str]:
    """The data processes, the preferred one first."""
    return [f"{host['address']}:6379" for host in fleet["hosts"].values()]


@pytest.fixture(scope="session")
def ca(state: Path) -> str:
    """The authority of Redis's certificates."""
    return (state / "credentials/redis_tls/ca.pem").read_text()


@pytest.fixture(scope="session")
def connect(password: Any, ca: str) -> Callable[[str], Any]:
    """Connect to a process as the app, and with its timeout."""
    from redis_cluster import Process

    return lambda address: Process(address, "pixel", password("app"), ca, timeout=1.0)


@pytest.fixture(scope="session")
def run(state: Path) -> Callable[..., str]:
    """Run a script as root on a host; returns its output. Raises OSError if it fails, as during a boot."""

    def run_on(host: str, script: str) -> str:
        command = ["ssh", "-F", str(state / "ssh_config"), host, "sudo sh -s"]
        done = subprocess.run(command, input=script, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise OSError(done.stdout + done.stderr)
        return done.stdout

    return run_on


@pytest.fixture(scope="session")
def power() -> Callable[[str, str], None]:
    """Cut or restore the power of a host."""

    def switch(host: str, action: str) -> None:
        program = [sys.executable, str(ROOT / "fleet/fleet.py"), "power", host, action]
        subprocess.run(program, check=True, capture_output=True, env=os.environ)

    return switch


@pytest.fixture(scope="session")
def status(run: Callable[..., str]) -> Callable[[str], dict[str, dict[str, Any]]]:
    """The processes by address, as a host sees them."""
    return lambda host: {row["address"]: row for row in json.loads(run(host, "redis-cluster status"))}
