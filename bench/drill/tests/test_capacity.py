from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.drill.capacity import SLICE, Normal, longest_outage, shortage
from bench.load.openloop import Sample

RATE = 200
START = 1000.0

Change = Callable[[Sample], Sample]


def load(seconds: float, change: Change = lambda sample: sample) -> list[Sample]:
    """Answers of c5 and t2 in the ratio 3 to 2, after 2 ms; `change` is applied to each."""
    return [
        change(Sample(START + number / RATE, 0.002, None, ("c5", "t2", "c5", "t2", "c5")[number % 5]))
        for number in range(round(seconds * RATE))
    ]


def between(begin: float, end: float, **changes: object) -> Change:
    """Returns a change of the requests that were due in these seconds."""

    def change(sample: Sample) -> Sample:
        if begin <= sample.due - START < end:
            return sample._replace(**changes)  # type: ignore[arg-type]
        return sample

    return change


@pytest.fixture
def normal() -> Normal:
    return Normal.of(load(5), RATE)


def spell(samples: list[Sample], normal: Normal) -> tuple[float, float] | None:
    short = shortage(samples, normal, START, START + 10)
    return (short.begin - START, short.end - START) if short else None


def test_normal_is_each_hosts_share_and_the_latency(normal: Normal) -> None:
    assert normal.shares == {"c5": 0.6, "t2": 0.4}
    assert normal.latency.p99 == pytest.approx(2)


def test_a_host_that_hardly_answers_is_not_normal() -> None:
    samples = load(5, lambda sample: sample._replace(instance="c5"))
    samples[0] = samples[0]._replace(instance="t2")
    assert set(Normal.of(samples, RATE).shares) == {"c5"}


def test_nothing_is_short_when_nothing_happens(normal: Normal) -> None:
    assert spell(load(10), normal) is None


def test_other_weights_are_no_shortage(normal: Normal) -> None:
    even = [sample._replace(instance=("c5", "t2")[number % 2]) for number, sample in enumerate(load(10))]
    assert spell(even, normal) is None


@pytest.mark.parametrize(
    ("changes", "lack"),
    [
        ({"error": "status 503", "instance": ""}, "failed requests"),
        ({"instance": "c5"}, "t2 answered 0%, usual is 40%"),
        ({"seconds": 0.8}, "the 90th percentile was 800 ms"),
    ],
)
def test_each_kind_of_shortage(normal: Normal, changes: dict[str, object], lack: str) -> None:
    samples = load(10, between(2, 4.5, **changes))
    short = shortage(samples, normal, START, START + 10)
    assert short is not None
    assert spell(samples, normal) == (2, 4.5)
    assert lack in short.lack


def test_one_failure_is_a_short_slice(normal: Normal) -> None:
    samples = load(10)
    samples[3 * RATE] = samples[3 * RATE]._replace(error="connection lost")
    assert spell(samples, normal) == (3, 3 + SLICE)


def test_two_dips_are_one_shortage(normal: Normal) -> None:
    dips = between(1, 2, instance="c5"), between(7, 8, instance="t2")
    assert spell(load(10, lambda sample: dips[1](dips[0](sample))), normal) == (1, 8)


def test_one_slow_request_in_fifty_is_none(normal: Normal) -> None:
    samples = load(10)
    samples[::50] = [sample._replace(seconds=1.0) for sample in samples[::50]]
    assert spell(samples, normal) is None


def test_what_is_not_answered_yet_is_short(normal: Normal) -> None:
    short = shortage(load(9), normal, START, START + 10)
    assert short is not None
    assert (short.begin - START, short.end - START) == (9, 10)
    assert "without an answer yet" in short.lack


def test_the_limit_of_latency_follows_a_slow_machine() -> None:
    slow = Normal.of(load(5, lambda sample: sample._replace(seconds=0.2)), RATE)
    assert spell(load(10, lambda sample: sample._replace(seconds=0.5)), slow) is None
    assert spell(load(10, lambda sample: sample._replace(seconds=0.7)), slow) == (0, 10)


def test_the_longest_outage_is_between_two_acknowledgements() -> None:
    samples = load(10, between(4, 6, error="status 503"))
    assert longest_outage(samples, START, START + 9) == pytest.approx(2, abs=0.01)
    assert longest_outage(samples, START + 5, START + 9) == pytest.approx(1, abs=0.01)


def test_writes_that_wait_and_are_acknowledged_late_are_an_outage() -> None:
    waiting = [
        sample._replace(seconds=START + 6 - sample.due) if 4 <= sample.due - START < 6 else sample
        for sample in load(10)
    ]
    assert longest_outage(waiting, START, START + 9) == pytest.approx(2, abs=0.01)


def test_an_outage_that_does_not_end_lasts_until_the_end() -> None:
    failing = load(10, between(4, 10, error="cannot connect"))
    assert longest_outage(failing, START, START + 9) == pytest.approx(5, abs=0.01)
