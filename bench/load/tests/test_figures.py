from __future__ import annotations

import math

import pytest

from bench.load.figures import Figure, Spread, paired_ratio, percentile


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0, 1), (1, 1), (50, 50), (50.1, 51), (99, 99), (99.9, 100), (100, 100)],
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile(range(1, 101), percent) == expected


def test_percentile_of_one_sample_is_that_sample() -> None:
    assert {percentile([7.0], mark) for mark in (1, 50, 99.9)} == {7.0}


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 50))


def test_spread_is_in_milliseconds_and_needs_no_order() -> None:
    assert Spread.of_seconds([0.003, 0.001, 0.002]) == pytest.approx((2, 3, 3, 3, 3))


def test_spread_of_nothing_is_null_in_json() -> None:
    assert set(Spread.of_seconds([]).as_json().values()) == {None}


def test_figure_keeps_the_spread_of_the_rounds() -> None:
    assert Figure.of([3, 1, 8]) == (3, 1, 8)


def test_ratios_are_paired_before_the_median_is_taken() -> None:
    # Noise in round two affects both variants, so the ratio is the same in each round.
    assert paired_ratio([1, 10, 2], [2, 20, 4]) == (0.5, 0.5, 0.5)


def test_unpaired_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1, 2], [1])
