"""The search for what an instance serves well; the service is a formula."""

from __future__ import annotations

import asyncio

import pytest

from calibrate import ImpreciseError, Limits, Measure, Step, search

LIMITS = Limits(50, 0.001)


def found(measure: Measure, most: float = 20_000) -> tuple[Step, list[Step]]:
    return asyncio.run(search(measure, LIMITS, 100, most))


class Service:
    """Serves well up to a rate, and then with a p99 that grows."""

    def __init__(self, capacity: float, lag_ms: float = 0.1) -> None:
        self.capacity = capacity
        self.lag_ms = lag_ms

    async def __call__(self, rate: float) -> Step:
        over = max(0.0, rate - self.capacity)
        return Step(rate, 5 + over, 0.0, self.lag_ms)


@pytest.mark.parametrize("capacity", [120.0, 333.0, 1000.0, 4321.0])
def test_it_comes_near_the_capacity_from_below(capacity: float) -> None:
    best, steps = found(Service(capacity))
    assert 0.9 * capacity < best.rate <= capacity + 45
    assert len(steps) < 16


def test_failures_are_too_much_as_well() -> None:
    async def service(rate: float) -> Step:
        return Step(rate, 1, 0.0 if rate < 500 else 0.01, 0.1)

    best, _ = found(service)
    assert 450 < best.rate < 500


def test_it_ends_at_the_most_that_was_asked_for() -> None:
    best, steps = found(Service(1e9), 1000)
    assert best.rate == steps[-1].rate == 1000


def test_a_host_that_bears_nothing_is_told() -> None:
    with pytest.raises(ImpreciseError, match="even 100 requests/s are too many: p99 55 ms"):
        found(Service(50))


def test_a_generator_that_is_the_limit_is_told() -> None:
    with pytest.raises(ImpreciseError, match="the generator itself was 40 ms late"):
        found(Service(1000, lag_ms=40))
