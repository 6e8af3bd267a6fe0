"""Prometheus metrics, summed over the workers of an instance.

Workers share files under ``PROMETHEUS_MULTIPROC_DIR``, which must be set before this module is
imported, and empty when the service starts; without it, each process has its own metrics. A file
belongs to a worker's slot (``METRICS_SLOT``, see ``gunicorn_conf``), not to its process: the next
worker in the slot continues its counters. So reloads of the service neither add files nor reset
counters.
"""

import asyncio
import os
import time
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from prometheus_client import REGISTRY as PROCESS
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    # prometheus_client would use the process ID, and ask the kernel for it at every count.
    slot = int(os.environ.get("METRICS_SLOT", os.getpid()))
    values.ValueClass = values.MultiProcessValue(partial(int, slot))  # type: ignore[no-untyped-call]

_STARTED = float(os.environ.get("SERVICE_STARTED", time.monotonic()))

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"}

WORKERS = Gauge("pixel_workers", "Workers alive.", multiprocess_mode="livesum")
STARTED = Gauge("pixel_start_time_seconds", "When the service started.", multiprocess_mode="min")
STARTED.set(time.time() - (time.monotonic() - _STARTED))
REQUEST_SECONDS = Histogram(
    "pixel_request_seconds",
    "Time to the end of the answer; the count is the number of answers.",
    ["method", "route", "status"],
    buckets=_SECONDS,
)
VIEWERS = Gauge("pixel_viewers", "Open event streams.", multiprocess_mode="livesum")
VIEWERS.set(0)
SLOW_VIEWERS = Counter("pixel_slow_viewers", "Times that a viewer had too much to take and had to catch up.")
VIEWER_FRAMES = Counter("pixel_viewer_frames", "Writes of changes or of the status to a viewer.")
FRAME_PAUSE = Gauge(
    "pixel_frame_pause_seconds",
    "Pause between two messages to a viewer, which grows with viewers and load.",
    multiprocess_mode="livemax",
)
WRITES = Counter("pixel_writes", "Channel writes that Redis has acknowledged.")
BATCH_WRITES = Histogram(
    "pixel_batch_writes",
    "Channel writes in a batch; 0 is a readiness probe.",
    buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
)
QUEUED_WRITES = Gauge(
    "pixel_queued_writes",
    "Channel writes that Redis has not acknowledged yet, up to a second ago.",
    multiprocess_mode="livesum",
)
LATE_WRITES = Counter("pixel_late_writes", "Writes that were refused because they came too late to begin.")
LAPSED_LEASES = Counter(
    "pixel_lapsed_leases", "Transactions that Redis did not execute because they came too late."
)
REFUSALS = Counter(
    "pixel_refusals",
    "Requests refused by reason: no_key, bad_key, scope (of the key), budget, blocked or protected.",
    ["reason"],
)
for reason in ("no_key", "bad_key", "scope", "budget", "blocked", "protected"):
    REFUSALS.labels(reason)
MAINTENANCE_WORKERS = Gauge(
    "pixel_maintenance_workers",
    "Workers that refuse requests because of maintenance, by its state.",
    ["state"],
    multiprocess_mode="livesum",
)
REPLICAS = Gauge(
    "pixel_replicas",
    "Replicas of Redis that can take over and have acknowledged the last write; 0 without a cluster.",
    # A worker that has had no write since knows only an earlier number, or none.
    multiprocess_mode="livemostrecent",
)
COMMIT_SECONDS = Histogram("pixel_commit_seconds", "Time until Redis acknowledged a batch.", buckets=_SECONDS)
READ_SECONDS = Histogram("pixel_read_seconds", "Time until Redis answered a read.", buckets=_SECONDS)
REDIS_ERRORS = Counter("pixel_redis_errors", "Operations that Redis refused or didn't answer.", ["operation"])
RECONNECTS = Counter("pixel_redis_reconnects", "Connections to Redis opened after one was lost.")

_CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class HostCpu(Collector):
    """CPU time of the host by mode, including steal; balancers use it for adaptive weights.

    ``HOST_PROC`` is the host's ``/proc``; in a sandbox, ``/proc`` may be another one.
    """

    def collect(self) -> Iterator[CounterMetricFamily]:
        path = Path(os.environ.get("HOST_PROC", "/proc"), "stat")
        family = CounterMetricFamily(
            "pixel_host_cpu_seconds",
            "CPU time of the host, all processors together.",
            labels=["mode"],
        )
        try:
            ticks = path.read_text().split("\n", 1)[0].split()[1:]
        except OSError:  # It may be unreadable in a sandbox; the other metrics still count.
            ticks = []
        for mode, count in zip(_CPU_MODES, ticks, strict=False):
            family.add_metric([mode], int(count) / os.sysconf("SC_CLK_TCK"))
        yield family


HOST_CPU = HostCpu()
PROCESS.register(HOST_CPU)


class Answers:
    """Answers with the same labels, counted together in the loop's next iteration.

    Counting each answer separately, in two places of a mapped file, would cost a twentieth of a
    write. A histogram has no public method for many observations.
    """

    def __init__(self, method: str, route: str, status: int) -> None:
        self._histogram = REQUEST_SECONDS.labels(method, route, status)
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """Count one; must be called inside the event loop."""
        if not self._seconds:
            asyncio.get_running_loop().call_soon(self._count)
        self._seconds.append(seconds)

    def _count(self) -> None:
        histogram = self._histogram
        histogram._sum.inc(sum(self._seconds))
        for bucket, count in Counts(map(partial(bisect_left, _SECONDS), self._seconds)).items():
            histogram._buckets[bucket].inc(count)
        self._seconds.clear()


answers = cache(Answers)


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answer. ``route`` is a path template, or empty if no route matched."""
    answers(method if method in _METHODS else "other", route, status).add(seconds)


def exposition() -> bytes:
    """The metrics of all workers of this instance, in the text format of Prometheus."""
    return generate_latest(_registry())


def totals() -> dict[str, float]:
    """The metrics that an instance reports to the others, by name."""
    registry = _registry()
    names = ("pixel_workers", "pixel_viewers", "pixel_writes_total")
    return {name: registry.get_sample_value(name) or 0.0 for name in names}


def uptime() -> float:
    """Seconds since the service started, by a clock that is never set."""
    return time.monotonic() - _STARTED


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return PROCESS
    registry = CollectorRegistry()
    registry.register(HOST_CPU)
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
