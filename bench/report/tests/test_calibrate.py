"""The search for the highest rate within the limits, with a simulated service."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from bench.load.http1 import Target
from bench.load.openloop import Plan, Report, Second, run_together
from bench.load.tests.standin import StandIn
from bench.report import calibrate
from bench.report.calibrate import ImpreciseError, Limits, Measure, Step, search

pytestmark = pytest.mark.timing

LIMITS = Limits(50, 0.001)


def found(measure: Measure, most: float = 20_000) -> tuple[Step, list[Step]]:
    return asyncio.run(search(measure, LIMITS, 100, most))


class Service:
    """A simulated service whose p99 grows above a rate."""

    def __init__(self, capacity: float, lag_ms: float = 0.1) -> None:
        self.capacity = capacity
        self.lag_ms = lag_ms

    async def __call__(self, rate: float) -> Step:
        over = max(0.0, rate - self.capacity)
        return Step(rate, 5 + over, 0.0, self.lag_ms)


@pytest.mark.parametrize("capacity", [120.0, 333.0, 1000.0, 4321.0])
def test_the_result_is_close_to_the_capacity(capacity: float) -> None:
    best, steps = found(Service(capacity))
    assert 0.9 * capacity < best.rate <= capacity + 45
    assert len(steps) < 16


def test_failures_limit_the_rate_too() -> None:
    async def service(rate: float) -> Step:
        return Step(rate, 1, 0.0 if rate < 500 else 0.01, 0.1)

    best, _ = found(service)
    assert 450 < best.rate < 500


def test_a_host_within_the_limits_at_the_highest_rate_has_no_result() -> None:
    with pytest.raises(ImpreciseError, match=r"1000 requests/s, is within the limits.*-e most="):
        found(Service(1e9), 1000)


def test_the_highest_rate_may_be_over_the_limits() -> None:
    best, steps = found(Service(900), 1000)
    assert 850 < best.rate <= 945
    assert max(step.rate for step in steps) == 1000


def test_a_host_over_the_limits_at_the_first_rate_is_reported() -> None:
    with pytest.raises(ImpreciseError, match="100 requests/s, is over the limits: p99 55 ms"):
        found(Service(50))


def test_a_generator_that_is_the_limit_is_reported() -> None:
    with pytest.raises(ImpreciseError, match="the generator itself was 40 ms late"):
        found(Service(1000, lag_ms=40))


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_a_plan(processes: int) -> None:
    one, other = StandIn(), StandIn()
    one.canvas = other.canvas = bytearray(1024 * 1024 * 3)
    with one.serving(), other.serving():
        plan = Plan(200, 1, connections=4, reads=True)
        reports = asyncio.run(run_together([one.url, other.url], plan, processes))
    for report in reports:
        assert report.plan == plan
        assert (report.sent, report.acknowledged, len(report.lags)) == (200, 200, 200)
        assert report.connections_opened == 4
        assert report.latency.p99 > 0


def test_an_unreachable_service_is_reported_by_several_processes_too() -> None:
    plan = Plan(100, 1, connections=4, reads=True)
    with pytest.raises(ConnectionError, match="0 of 2 connections opened"):
        asyncio.run(run_together(["http://127.0.0.1:1"], plan, 2))


@pytest.mark.parametrize(
    ("rate", "cpus", "processes"), [(1999, 8, 1), (4500, 1, 1), (4500, 8, 4), (1e5, 8, 8)]
)
def test_high_rates_take_more_processes(
    rate: float, cpus: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    async def together(urls: list[str], plan: Plan, processes: int) -> list[Report]:
        seen.append((urls, processes))
        return [Report(plan)]

    monkeypatch.setattr(calibrate, "run_together", together)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    target = Target.parse("http://127.0.0.1:1")
    asyncio.run(calibrate.measure([target], rate, 5, 64, 2))
    assert seen == [(["http://127.0.0.1:1"], processes)]


def test_reports_of_several_processes_are_merged_by_second() -> None:
    plan = Plan(20, 2)
    fast = Report(plan, lags=array("d", [0.1]), wall_seconds=2, cpu_seconds=1.8, started_at=7)
    fast.timeline = [Second(10, 10, 0, array("d", [0.001] * 10))]
    slow = Report(plan, lags=array("d", [0.2]), wall_seconds=2, cpu_seconds=1.2, started_at=8)
    slow.timeline = [Second(10, 9, 1, array("d", [0.5] * 9)), Second(1, 1, 0, array("d", [0.5]))]
    slow.errors["status 503"] += 1
    whole = Report.of_parts(plan, [fast, slow])
    assert [second.due for second in whole.timeline] == [20, 1]
    assert (whole.acknowledged, whole.failed, whole.errors) == (20, 1, {"status 503": 1})
    assert (whole.latency.p50, whole.latency.p90) == (1, 500)
    assert list(whole.lags) == [0.1, 0.2]
    assert whole.cpu_share == pytest.approx(1.5)
    assert whole.started_at == 7
