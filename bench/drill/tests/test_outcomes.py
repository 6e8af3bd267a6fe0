from __future__ import annotations

import json
from typing import Any

import pytest

from bench.drill.outcomes import Outcome, Run, table, unexcused
from bench.load.disk import Flush, behind_a_flush
from bench.load.figures import Spread
from bench.load.openloop import Sample

CALM = Spread(1, 2, 3, 4, 5)


def a_run(**changes: Any) -> Run:
    usual: dict[str, Any] = {
        "event": "redis killed",
        "sent": 100,
        "acknowledged": 90,
        "failed": {"503": 10},
        "lost": 0,
        "undone": 0,
        "wrong": 0,
        "before": CALM,
        "during": Spread(2, 4, 6, 8, 10),
        "took": 1.5,
        "outage": 0.7,
        "gaps": 0,
        "phantoms": 0,
        "resyncs": 1,
        "recovery": 2.0,
    }
    return Run(**(usual | changes))


def test_the_file_has_the_agreed_shape() -> None:
    outcome = Outcome(
        "redis killed", [a_run(), a_run(recovery=3.0, failed={"503": 5}, outage=4.2), a_run(gaps=2)]
    )
    row = outcome.as_json()
    agreed = {
        "event": "redis killed",
        "runs": 3,
        "sent": 300,
        "acknowledged": 270,
        "failed": {"503": 25},
        "lost": 0,
        "undone": 0,
        "p99_ms": 6,
        "recovery_s": {"median": 2.0, "worst": 3.0},
        "outage_s": {"median": 0.7, "worst": 4.2},
        "viewers": {"gaps": 2, "phantoms": 0, "resyncs": 3},
    }
    assert agreed.items() <= row.items()
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_run_that_never_recovered_is_the_worst() -> None:
    outcome = Outcome("x", [a_run(), a_run(recovery=None), a_run()])
    assert outcome.recovery == {"median": 2.0, "worst": None}
    assert Outcome("x", [a_run(recovery=None)]).recovery == {"median": None, "worst": None}


def test_latencies_of_nothing_are_null() -> None:
    row = Outcome("x", [a_run(during=Spread.of_seconds([]))]).as_json()
    assert row["p99_ms"] is None


def failure(due: float, error: str) -> Sample:
    return Sample(due, 0.2, error, "")


@pytest.mark.parametrize(
    ("due", "error", "counts"),
    [
        (10.5, "status 503", False),
        (9.95, "status 503", False),  # it was in flight
        (9.5, "status 503", True),  # before the event
        (12.1, "status 503", True),  # after Redis had recovered
        (10.5, "status 502", True),  # not an excused status
        (10.5, "connection lost", True),
    ],
)
def test_failures_are_excused_by_their_kind_and_time(due: float, error: str, counts: bool) -> None:
    seen = unexcused([failure(due, error)], frozenset({"503"}), [(10, 12)])
    assert seen == ({error.removeprefix("status "): 1} if counts else {})


def test_between_two_blows_nothing_is_excused() -> None:
    failures = [failure(due, "status 503") for due in (10.5, 15.0, 20.5)]
    assert unexcused(failures, frozenset({"503"}), [(10, 12), (20, 22)]) == {"503": 1}


def test_where_nothing_is_excused_every_failure_counts() -> None:
    seen = unexcused([failure(10.5, "status 503")] * 3, frozenset(), [(10, 12)])
    assert seen == {"503": 3}


@pytest.mark.parametrize(
    ("due", "error", "waited"),
    [
        (8.0, "status 503", True),  # timed out while waiting for the disk
        (9.2, "status 503", True),
        (5.9, "status 503", False),  # answered before
        (10.1, "status 503", False),  # due after it
        (8.0, "status 502", False),
        (8.0, "connection lost", False),
    ],
)
def test_a_write_that_waited_for_the_disk_is_told_apart(due: float, error: str, waited: bool) -> None:
    flushes = [Flush(end=10.0, seconds=1.2), Flush(end=6.9, seconds=0.3)]  # the second has no effect
    assert behind_a_flush(Sample(due, 0.8, error, "c5"), flushes) is waited


def test_the_table_has_a_line_an_event_and_says_what_is_wrong() -> None:
    outcomes = [
        Outcome("redis killed", [a_run()]),
        Outcome("t2 frozen", [a_run(lost=2, undone=7, recovery=None, faults=["lost: (1, 2) R"])]),
        Outcome("deploy", [a_run(behind_flush=4), a_run(behind_flush=3)]),
    ]
    head, redis, frozen, _, *rest = table(outcomes).splitlines()
    assert (
        " ".join(redis.split())
        == "redis killed 1 100 90 10 x 503 0 0 0, 0 1.0/3.0 2.0/6.0 1.5 0.7 (0.7) 2.0 (2.0)"
    )
    assert frozen.endswith("never (never)")
    assert " 2       7 " in frozen
    assert len({len(head), len(redis), len(frozen)}) == 1
    assert rest == [
        "  deploy: 7 failed while Redis waited for its disk",
        *("", "Faults:", "  t2 frozen: lost: (1, 2) R"),
    ]
