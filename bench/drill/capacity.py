"""Decides from the requests whether the fleet was at full capacity.

Requests are grouped by due time into slices of a quarter of a second. A slice is at full capacity if
every request was acknowledged, each host answered at least three quarters of its usual share, and
the 90th percentile is at most three times the usual 99th percentile, or `QUICK` if that is more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.load.figures import Spread, percentile
from bench.load.openloop import Sample

SLICE = 0.25
SHARE = 0.75
SLOWER = 3
QUICK = 0.1
STRANGER = 0.02  # an instance with a smaller share does not count as a host


@dataclass(frozen=True)
class Normal:
    """Shares and latency of the fleet before an event."""

    rate: float
    shares: dict[str, float]
    latency: Spread

    @classmethod
    def of(cls, samples: Sequence[Sample], rate: float) -> Normal:
        answers = Counter(sample.instance for sample in samples if sample.error is None)
        shares = {name: count / answers.total() for name, count in answers.items()}
        return cls(
            rate,
            {name: share for name, share in shares.items() if name and share >= STRANGER},
            Spread.of_seconds(sample.seconds for sample in samples),
        )

    @property
    def slowest(self) -> float:
        return max(QUICK, SLOWER * self.latency.p99 / 1000)

    def lack(self, samples: Sequence[Sample]) -> str | None:
        """Returns the reason why a slice is not at full capacity; None if it is."""
        if len(samples) < 0.9 * self.rate * SLICE:
            return "requests without an answer yet"
        failed = sum(sample.error is not None for sample in samples)
        if failed:
            return f"{failed} failed requests"
        answers = Counter(sample.instance for sample in samples)
        for name, share in self.shares.items():
            if answers[name] < SHARE * share * len(samples):
                return f"{name} answered {answers[name] / len(samples):.0%}, usual is {share:.0%}"
        late = percentile(sorted(sample.seconds for sample in samples), 90)
        if late > self.slowest:
            return f"the 90th percentile was {late * 1000:.0f} ms"
        return None


@dataclass(frozen=True)
class Shortage:
    """An interval of reduced capacity, and the reason in its last slice."""

    begin: float
    end: float
    lack: str


def shortage(samples: Iterable[Sample], normal: Normal, since: float, until: float) -> Shortage | None:
    """Returns the interval from the first reduced slice to the last one; None if there is none."""
    count = max(0, math.floor((until - since) / SLICE))
    slices: list[list[Sample]] = [[] for _ in range(count)]
    for sample in samples:
        index = math.floor((sample.due - since) / SLICE)
        if 0 <= index < count:
            slices[index].append(sample)
    short = [(index, lack) for index, each in enumerate(slices) if (lack := normal.lack(each))]
    if not short:
        return None
    (first, _), (last, lack) = short[0], short[-1]
    return Shortage(since + first * SLICE, since + (last + 1) * SLICE, lack)


def longest_outage(samples: Iterable[Sample], since: float, until: float) -> float:
    """Returns the longest time in seconds without an acknowledgement."""
    done = (sample.due + sample.seconds for sample in samples if sample.error is None)
    times = sorted(time for time in done if since < time < until)
    return max(later - earlier for earlier, later in pairwise([since, *times, until]))
