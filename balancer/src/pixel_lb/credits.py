"""CPU credits of burstable instances, queried every five minutes without blocking the control loop.

A separate process (`python -m pixel_lb.cloudwatch`) queries CloudWatch, because boto3 would cost the
controller start time and memory.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path

from pixel_lb.controller import Credits
from pixel_lb.fleet import CreditQuery

# Interval and timeout of queries.
INTERVAL_SECONDS = 300.0
TIMEOUT_SECONDS = 60.0
# Baselines as AWS documents them: the fraction of its CPU that a host may use without credits. By size for T3
# and later, by type where T2 differs.
BASELINES = {
    "nano": 0.05,
    "micro": 0.1,
    "small": 0.2,
    "medium": 0.2,
    "large": 0.3,
    "xlarge": 0.4,
    "2xlarge": 0.4,
    "t2.xlarge": 0.225,
    "t2.2xlarge": 0.17,
}
# The zipapp, or the parent directory of the package.
PROGRAM = Path(__file__).resolve().parents[1]


def baseline(instance_type: str) -> float:
    """Return an instance type's baseline; 1.0, which has no effect, if it is unknown."""
    return BASELINES.get(instance_type, BASELINES.get(instance_type.split(".")[-1], 1.0))


class CreditMonitor:
    """Queries the credits of hosts from CloudWatch."""

    def __init__(self, region: str, hosts: Mapping[str, CreditQuery], log: Callable[[str], None]) -> None:
        """Set up the monitor without a query.

        Args:
            region: AWS region.
            hosts: The instances to query, by host; may be empty.
            log: Receives a message if a query fails.
        """
        self._region = region
        self._hosts = hosts
        self._log = log
        self._asking: Future[subprocess.CompletedProcess[str]] | None = None
        self._asked_at = -math.inf

    def poll(self, pool: Executor, now: float) -> dict[str, Credits] | None:
        """Start a query if one is due, and collect the answer of the last one.

        Args:
            pool: Runs the query's process.
            now: The time on the monotonic clock.

        Returns:
            The credits by host if an answer has arrived since the last call; otherwise None.
        """
        if self._asking and self._asking.done():
            asking, self._asking = self._asking, None
            try:
                done = asking.result()
                if done.returncode != 0:
                    raise OSError((done.stderr.strip() or str(done.returncode)).splitlines()[-1])
                balances = json.loads(done.stdout)
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                self._log(f"CPU credits are unknown: {error}")
                return None
            return self._credits(balances, now)
        if self._hosts and not self._asking and now - self._asked_at >= INTERVAL_SECONDS:
            self._asked_at = now
            self._asking = pool.submit(self._ask)
        return None

    def _ask(self) -> subprocess.CompletedProcess[str]:
        instances = [host.instance_id for host in self._hosts.values()]
        return subprocess.run(
            [sys.executable, "-m", "pixel_lb.cloudwatch", self._region, *instances],
            env=os.environ | {"PYTHONPATH": str(PROGRAM)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def _credits(self, balances: dict[str, tuple[float, float]], now: float) -> dict[str, Credits]:
        known = {}
        for name, host in self._hosts.items():
            if host.instance_id in balances:
                until, balance = balances[host.instance_id]
                at = now - max(0.0, time.time() - until)
                known[name] = Credits(at, balance, host.vcpus, baseline(host.instance_type))
        return known
