"""Percentiles of samples, and summaries of several rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of samples that are already in ascending order."""
    if not ordered:
        return math.nan
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


class Figure(NamedTuple):
    """A figure of several rounds: median, lowest and highest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Figure:
        values = list(samples)
        return cls(statistics.median(values), min(values), max(values))

    def as_json(self, digits: int = 4) -> dict[str, float]:
        return {name: round(value, digits) for name, value in self._asdict().items()}


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Figure:
    """The ratio of two variants, computed per round: noise in a round affects both variants."""
    return Figure.of(a / b for a, b in zip(numerators, denominators, strict=True))


class Spread(NamedTuple):
    """A distribution of latencies, in milliseconds."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of_seconds(cls, samples: Iterable[float]) -> Spread:
        ordered = sorted(samples)
        marks = [percentile(ordered, mark) * 1000 for mark in (50, 90, 99, 99.9, 100)]
        return cls(*marks)

    def as_json(self) -> dict[str, float | None]:
        return {
            name: None if math.isnan(value) else round(value, 3) for name, value in self._asdict().items()
        }
