"""The results of the drill's events, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.load.figures import Spread
from bench.load.openloop import Sample


@dataclass(frozen=True)
class Run:
    """One run of an event.

    Attributes:
        sent, acknowledged: writes of both kinds.
        failed: requests of both kinds, reads included, by status or error.
        lost, undone, wrong: acknowledged writes that are missing, acknowledged writes that an older
            write has undone, cells with another wrong value.
        before, during: latencies of the open loop.
        took: duration in seconds of the act: a playbook or a fault.
        outage: longest time in seconds without an acknowledged write of the open loop.
        gaps, phantoms: channels of all viewers' copies that differ from the canvas at the end.
        resyncs: how often viewers had to fetch the canvas again.
        recovery: seconds until full capacity; None if it was not reached again.
        lack: reason of the last reduction of capacity.
        behind_flush: failed requests that waited for Redis's disk.
    """

    event: str
    sent: int
    acknowledged: int
    failed: Mapping[str, int]
    lost: int
    undone: int
    wrong: int
    before: Spread
    during: Spread
    took: float
    outage: float
    gaps: int
    phantoms: int
    resyncs: int
    recovery: float | None
    lack: str = ""
    faults: Sequence[str] = ()
    behind_flush: int = 0


@dataclass
class Outcome:
    """All runs of an event."""

    event: str
    runs: list[Run] = field(default_factory=list)

    @property
    def failed(self) -> Counter[str]:
        return sum((Counter(run.failed) for run in self.runs), Counter())

    @property
    def faults(self) -> list[str]:
        return [fault for run in self.runs for fault in run.faults]

    def total(self, figure: str) -> int:
        numbers: list[int] = [getattr(run, figure) for run in self.runs]
        return sum(numbers)

    def median(self, part: str, mark: str) -> float:
        """Returns the median of the runs' percentile, e.g. of `during` and `p99`."""
        spreads: list[Spread] = [getattr(run, part) for run in self.runs]
        return statistics.median(float(spread._asdict()[mark]) for spread in spreads)

    @property
    def outage(self) -> dict[str, float | None]:
        """Median and worst time in seconds without an acknowledged write."""
        seconds = [run.outage for run in self.runs]
        return {"median": _rounded(statistics.median(seconds)), "worst": _rounded(max(seconds))}

    @property
    def recovery(self) -> dict[str, float | None]:
        """Median and worst recovery in seconds; None, for a run that did not recover, is the worst."""
        seconds = [run.recovery for run in self.runs if run.recovery is not None]
        all_did = len(seconds) == len(self.runs)
        return {
            "median": _rounded(statistics.median(seconds)) if seconds else None,
            "worst": _rounded(max(seconds)) if seconds and all_did else None,
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "event": self.event,
            "runs": len(self.runs),
            "sent": self.total("sent"),
            "acknowledged": self.total("acknowledged"),
            "failed": dict(self.failed.most_common()),
            "behind_flush": self.total("behind_flush"),
            "lost": self.total("lost"),
            "undone": self.total("undone"),
            "wrong": self.total("wrong"),
            "p50_ms": _rounded(self.median("during", "p50")),
            "p99_ms": _rounded(self.median("during", "p99")),
            "p99_ms_worst": _rounded(max(run.during.p99 for run in self.runs)),
            "before_ms": {mark: _rounded(self.median("before", mark)) for mark in ("p50", "p99")},
            "took_s": _rounded(statistics.median(run.took for run in self.runs)),
            "outage_s": self.outage,
            "viewers": {figure: self.total(figure) for figure in ("gaps", "phantoms", "resyncs")},
            "recovery_s": self.recovery,
            "faults": self.faults,
        }


def unexcused(
    failures: Iterable[Sample], excused: frozenset[str], spans: Sequence[tuple[float, float]]
) -> Counter[str]:
    """Counts the failures that the event does not excuse, because of their kind or their time.

    Args:
        failures: requests that failed.
        excused: kinds of failures that the event excuses.
        spans: begin and end of the times in which it does: for requests that were in flight then.
    """
    return Counter(
        kind(sample.error)
        for sample in failures
        if sample.error is not None
        and not (
            kind(sample.error) in excused
            and any(sample.due <= until and sample.due + sample.seconds >= since for since, until in spans)
        )
    )


def kind(error: str) -> str:
    """Returns the status code, or the error if there was no answer."""
    return error.removeprefix("status ")


HEAD = (
    *("event", "runs", "sent", "acknowledged", "failed", "lost", "undone"),
    *("gaps, phantoms", "p50/p99 ms before", "during", "took s", "no write s", "full capacity s"),
)
LEFT = {"event", "failed"}


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns a table. Figures are medians of the runs, the last two with the worst of them."""
    rows = [HEAD, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(HEAD, row, widths, strict=True)
        )
        for row in rows
    ]
    lines += [
        f"  {outcome.event}: {waited} failed while Redis waited for its disk"
        for outcome in outcomes
        if (waited := outcome.total("behind_flush"))
    ]
    faults = [f"  {outcome.event}: {fault}" for outcome in outcomes for fault in outcome.faults]
    return "\n".join([*lines, *(["", "Faults:", *faults] if faults else [])])


def _row(outcome: Outcome) -> tuple[str, ...]:
    failed = ", ".join(f"{count} x {name}" for name, count in outcome.failed.most_common())
    recovery, outage = outcome.recovery, outcome.outage
    return (
        outcome.event,
        str(len(outcome.runs)),
        str(outcome.total("sent")),
        str(outcome.total("acknowledged")),
        failed or "-",
        str(outcome.total("lost") + outcome.total("wrong")),
        str(outcome.total("undone")),
        f"{outcome.total('gaps')}, {outcome.total('phantoms')}",
        "/".join(f"{outcome.median('before', mark):.1f}" for mark in ("p50", "p99")),
        "/".join(f"{outcome.median('during', mark):.1f}" for mark in ("p50", "p99")),
        f"{statistics.median(run.took for run in outcome.runs):.1f}",
        f"{_seconds(outage['median'])} ({_seconds(outage['worst'])})",
        f"{_seconds(recovery['median'])} ({_seconds(recovery['worst'])})",
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)
