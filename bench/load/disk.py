"""Failed writes that are due to a stalled disk of the test machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.load.openloop import Sample

SLOW_FLUSH = 0.4  # seconds; two of them reach the 0.8 s that the app waits for Redis


class Flush(NamedTuple):
    """A slow flush of Redis's log, which delayed every write."""

    end: float  # on the clock of time.monotonic(), at most a second late
    seconds: float


def behind_a_flush(failure: Sample, flushes: Iterable[Flush]) -> bool:
    """Returns whether a request was answered 503 because Redis waited for its disk.

    The disk of a shared test machine sometimes stalls for a second, and a write that can't be
    flushed must not be acknowledged. No event of the drill causes such a stall.
    """
    done = failure.due + failure.seconds
    return failure.error == "status 503" and any(
        failure.due <= flush.end and flush.end - 1 - flush.seconds <= done
        for flush in flushes
        if flush.seconds >= SLOW_FLUSH
    )
