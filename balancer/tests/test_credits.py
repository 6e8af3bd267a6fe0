"""Baselines of CPU credits. tests/test_ec2.py tests the queries to CloudWatch."""

from __future__ import annotations

import pytest
from pixel_lb.credits import baseline


@pytest.mark.parametrize(
    ("instance_type", "part"),
    [
        ("t2.xlarge", 0.225),
        ("t3.xlarge", 0.4),
        ("t4g.nano", 0.05),
        ("t2.2xlarge", 0.17),
        ("t9.huge", 1.0),
        ("", 1.0),
    ],
)
def test_baselines_are_by_type_or_by_size(instance_type: str, part: float) -> None:
    assert baseline(instance_type) == part
