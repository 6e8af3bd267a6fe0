"""Base weights from the inventory."""

from __future__ import annotations

from typing import Any

import pytest


def weights(fleet: Any) -> list[int]:
    return [server.weight for server in fleet.servers]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([(3, 1), (2, 1)], [3, 2]),
        ([(12, 1), (8, 1)], [3, 2]),
        ([(0, 1), (0, 1)], [1, 1]),
        ([(3, 2), (2, 1)], [3, 3, 4]),
        ([(3, 2), (2, 2)], [3, 3, 2, 2]),
        ([(4, 2), (2, 1)], [1, 1, 1]),
        ([(1, 3), (1, 2)], [2, 2, 2, 3, 3]),
        ([(1000, 1), (1, 16), (7, 11)], [176000, *[11] * 16, *[112] * 11]),
    ],
)
def test_instances_share_a_hosts_weight_in_the_smallest_integers(
    make_fleet: Any, hosts: list[tuple[int, int]], expected: list[int]
) -> None:
    facts = [
        {"name": name, "weight": weight, "instances": instances}
        for name, (weight, instances) in zip("abc", hosts, strict=False)
    ]
    assert weights(make_fleet(*facts)) == expected


def test_measured_weights_have_the_ratio_of_the_measured_rates(make_fleet: Any) -> None:
    fleet = make_fleet(
        {"name": "a", "weight": 7, "measured": 3000},
        {"name": "b", "measured": 1290, "instances": 2},
        {"name": "c", "measured": 3},
        weights="measured",
    )
    assert weights(fleet) == [200, 43, 43, 2]


@pytest.mark.parametrize("source", ["capacity", "adaptive"])
def test_capacity_is_vcpus_times_the_factor_of_type_or_family(make_fleet: Any, source: str) -> None:
    fleet = make_fleet(
        {"name": "a", "instance_type": "c5.xlarge"},
        {"name": "b", "instance_type": "t2.xlarge", "vcpus": 8},
        {"name": "c", "instance_type": "c5.metal"},
        {"name": "d", "instance_type": "m7.large"},
        {"name": "e"},
        {"name": "f", "instance_type": "c5.xlarge", "weight": 5},
        weights=source,
        factors={"c5": 3, "t2": 2, "c5.metal": 3.5},
        factor_default=1,
    )
    assert weights(fleet) == [12, 16, 14, 4, 4, 5]
