"""Runs wrk and reads its result."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).parent / "loads"


class LoadError(Exception):
    """wrk failed, or measured nothing."""


class Load(NamedTuple):
    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    socket_errors: int
    bad_statuses: int

    @property
    def errors(self) -> int:
        return self.socket_errors + self.bad_statuses


def run_wrk(
    port: int, script: str, connections: int, seconds: float, processors: Iterable[int], token: str = ""
) -> Load:
    """Runs one thread of wrk, a closed loop, against a local port; ``token`` is the clients' key."""
    command = [
        "taskset",
        "--cpu-list",
        ",".join(map(str, sorted(processors))),
        "wrk",
        "--threads=1",
        f"--connections={connections}",
        f"--duration={round(seconds)}s",
        "--timeout=10s",
        f"--script={SCRIPTS / script}.lua",
        f"http://127.0.0.1:{port}",
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "BENCH_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds + 30)
    except BaseException:
        process.kill()
        process.wait()
        raise
    last = output.strip().splitlines()[-1:]
    if process.returncode or not last or not last[0].startswith("{"):
        raise LoadError(f"wrk ended with {process.returncode}: {output[-500:]}")
    return Load(**json.loads(last[0]))
