"""Prometheus metrics, summed over the workers of an instance.

The workers meet in the files under ``PROMETHEUS_MULTIPROC_DIR``, which has to be set before this
is imported, and empty when the service starts; without it a process counts for itself alone.
"""

import asyncio
import os
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
    # A worker imports this after the fork: it need not ask for its process id at every count,
    # which would be three system calls a request.
    values.ValueClass = values.MultiProcessValue(partial(int, os.getpid()))  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_METHODS = {"GET", "HEAD", "OPTIONS", "POST", "PUT"}

WORKERS = Gauge("pixel_workers", "Workers alive.", multiprocess_mode="livesum")
STARTED = Gauge(
    "pixel_start_time_seconds", "When the first worker started.", multiprocess_mode="min"
)
STARTED.set_to_current_time()
REQUEST_SECONDS = Histogram(
    "pixel_request_seconds",
    "Time to the end of the answer; its count is the number of answers.",
    ["method", "route", "status"],
    buckets=_SECONDS,
)
VIEWERS = Gauge("pixel_viewers", "Open streams of events.", multiprocess_mode="livesum")
WRITES = Counter("pixel_writes", "Channel writes that Redis has acknowledged.")
BATCH_WRITES = Histogram(
    "pixel_batch_writes",
    "Channel writes that went to Redis together; none is a readiness probe.",
    buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
)
QUEUED_WRITES = Gauge(
    "pixel_queued_writes",
    "Channel writes that Redis has not acknowledged yet, up to a second ago.",
    multiprocess_mode="livesum",
)
LATE_WRITES = Counter(
    "pixel_late_writes", "Writes that were refused because they came too late to begin."
)
LAPSED_LEASES = Counter(
    "pixel_lapsed_leases", "Transactions that Redis did not execute because they came too late."
)
COMMIT_SECONDS = Histogram(
    "pixel_commit_seconds", "Time until Redis acknowledged a batch.", buckets=_SECONDS
)
READ_SECONDS = Histogram(
    "pixel_read_seconds", "Time until Redis answered a question.", buckets=_SECONDS
)
REDIS_ERRORS = Counter(
    "pixel_redis_errors", "Times that Redis didn't do what it was asked for.", ["operation"]
)
RECONNECTS = Counter("pixel_redis_reconnects", "Connections to Redis opened after one was lost.")

_CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class HostCpu(Collector):
    """What the host's processors did, steal included, which is what a balancer has to know.

    ``HOST_PROC`` is where the host's ``/proc`` is, for a sandbox may show another one.
    """

    def collect(self) -> Iterator[CounterMetricFamily]:
        path = Path(os.environ.get("HOST_PROC", "/proc"), "stat")
        family = CounterMetricFamily(
            "pixel_host_cpu_seconds", "Time of all processors of the host.", labels=["mode"]
        )
        try:
            ticks = path.read_text().split("\n", 1)[0].split()[1:]
        except OSError:  # Not everybody may read it, and it isn't worth more than its absence.
            ticks = []
        for mode, count in zip(_CPU_MODES, ticks, strict=False):
            family.add_metric([mode], int(count) / os.sysconf("SC_CLK_TCK"))
        yield family


HOST_CPU = HostCpu()
PROCESS.register(HOST_CPU)


class _Answers:
    """Answers of one kind, counted together at the loop's next turn.

    Counted one by one they would be a twentieth of all that a write costs, as each is written to
    two places of a mapped file; but a histogram has no public method for many.
    """

    def __init__(self, method: str, route: str, status: int) -> None:
        self._histogram = REQUEST_SECONDS.labels(method, route, status)
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """Count one, given inside the event loop."""
        if not self._seconds:
            asyncio.get_running_loop().call_soon(self._count)
        self._seconds.append(seconds)

    def _count(self) -> None:
        histogram = self._histogram
        histogram._sum.inc(sum(self._seconds))
        for bucket, count in Counts(map(partial(bisect_left, _SECONDS), self._seconds)).items():
            histogram._buckets[bucket].inc(count)
        self._seconds.clear()


_answers = cache(_Answers)


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answer. ``route`` is a template, or empty if there is none."""
    _answers(method if method in _METHODS else "other", route, status).add(seconds)


def exposition() -> bytes:
    """The metrics of all workers of this instance, in Prometheus' text format."""
    return generate_latest(_registry())


def totals() -> dict[str, float]:
    """What an instance tells the others, by name of the metric."""
    registry = _registry()
    names = ("pixel_start_time_seconds", "pixel_workers", "pixel_viewers", "pixel_writes_total")
    return {name: registry.get_sample_value(name) or 0.0 for name in names}


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return PROCESS
    registry = CollectorRegistry()
    registry.register(HOST_CPU)
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
