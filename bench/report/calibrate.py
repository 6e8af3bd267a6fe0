"""Measures how many requests per second one host serves within the limits, by reads at rising rates.

    python -m bench.report.calibrate --url http://10.0.0.12:8000

Several addresses are the instances of one host; the rate is divided among them. Each rate is 1.5
times the one before, until the 99th percentile is over the limit or too many requests fail. Then
the interval between the last passing and the first failing rate is halved a few times. Several
processes send high rates, at most one for each available processor. Pixels are only read. The
result is one line of JSON. Only the standard library is needed; `playbooks/calibrate.yml` runs
this on a host.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from bench.load.http1 import BadAnswerError, Target
from bench.load.openloop import Plan, run_together

GROWTH = 1.5
HALVINGS = 3
A_PROCESS = 1000  # requests/s for each process of the generator
SETTLE = 1.0  # seconds at the start of a step that are not counted


class Step(NamedTuple):
    """The result at one rate."""

    rate: float
    p99_ms: float
    failed: float  # of all requests, 0 to 1
    lag_ms: float  # the 99th percentile of how late the generator itself was


class Limits(NamedTuple):
    p99_ms: float
    failed: float

    def met_by(self, step: Step) -> bool:
        return step.p99_ms <= self.p99_ms and step.failed <= self.failed


class ImpreciseError(Exception):
    """No usable figure was measured; the message contains the reason."""


Measure = Callable[[float], Awaitable[Step]]


async def search(measure: Measure, limits: Limits, first: float, most: float) -> tuple[Step, list[Step]]:
    """Returns the highest rate within the limits, and all rates tried."""
    steps: list[Step] = []

    async def is_good(rate: float) -> bool:
        steps.append(await measure(rate))
        return limits.met_by(steps[-1])

    rate = first
    while await is_good(rate) and rate < most:
        rate = min(rate * GROWTH, most)
    good = max((step.rate for step in steps if limits.met_by(step)), default=0.0)
    if not good:
        raise ImpreciseError(
            f"the first rate, {first:g} requests/s, is over the limits: p99 {steps[0].p99_ms:.0f} ms,"
            f" {steps[0].failed:.1%} failed"
        )
    if good == rate:
        raise ImpreciseError(
            f"the highest rate, {rate:g} requests/s, is within the limits, so the capacity is not known:"
            " raise --most (-e most=)"
        )
    bad = rate
    for _ in range(HALVINGS):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if await is_good(middle) else (good, middle)
    first_bad = next((step for step in steps if not limits.met_by(step)), None)
    if first_bad is not None and first_bad.lag_ms > limits.p99_ms / 2:
        raise ImpreciseError(
            f"at {first_bad.rate:.0f} requests/s the generator itself was {first_bad.lag_ms:.0f} ms"
            " late, so it is the limit, not the host: run it on a machine with more free CPU"
        )
    return next(step for step in steps if step.rate == good), steps


async def measure(
    targets: list[Target], rate: float, seconds: float, connections: int, patience: float
) -> Step:
    parts = len(targets)
    plan = Plan(rate / parts, SETTLE + seconds, max(1, connections // parts), patience, reads=True)
    processes = min(len(os.sched_getaffinity(0)), int(rate // A_PROCESS), plan.connections)
    reports = await run_together([each.url for each in targets], plan, max(1, processes))
    for report in reports:
        report.timeline = report.timeline[round(SETTLE) :]
    failed, sent = (sum(getattr(each, what) for each in reports) for what in ("failed", "sent"))
    # Use the slowest instance's figures.
    p99, lag = (max(getattr(each, what).p99 for each in reports) for what in ("latency", "lag"))
    return Step(rate, p99, failed / max(1, sent), lag)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.calibrate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--url",
        nargs="+",
        required=True,
        dest="urls",
        metavar="URL",
        help="the host's instances, e.g. http://10.0.0.12:8000",
    )
    add(
        "--p99",
        type=float,
        default=50.0,
        help="limit of the 99th percentile in milliseconds (50)",
    )
    add("--failed", type=float, default=0.1, help="limit of failed requests in percent (0.1)")
    add("--first", type=float, default=100.0, help="lowest rate, requests/s (100)")
    add("--most", type=float, default=20_000.0, help="highest rate, requests/s (20000)")
    add("--seconds", type=float, default=5.0, help="seconds at each rate (5)")
    add("--connections", type=int, default=64, help="number of connections (64)")
    options = parser.parse_args(arguments)
    try:
        options.targets = [Target.parse(url) for url in options.urls]
    except ValueError as error:
        parser.error(str(error))
    return options


async def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(options.p99, options.failed / 100)
    patience = max(2.0, 4 * options.p99 / 1000)

    def at(rate: float) -> Awaitable[Step]:
        return measure(options.targets, rate, options.seconds, options.connections, patience)

    best, steps = await search(at, limits, options.first, options.most)
    return {
        "requests_per_second": round(best.rate),
        "p99_ms": round(best.p99_ms, 1),
        "steps": [{name: round(value, 4) for name, value in step._asdict().items()} for step in steps],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        print(json.dumps(asyncio.run(calibrate(options))))
    except (ImpreciseError, BadAnswerError, OSError) as error:
        print(f"bench.report.calibrate: {error or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
