"""Writes that failed because Redis waited for its disk, which is a fault of the test machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.load.openloop import Sample

SLOW_FLUSH = 0.4  # seconds; the app waits 0.8 s for Redis, in which there may be two flushes


class Flush(NamedTuple):
    """A slow flush of Redis' log, for which every write waited."""

    end: float  # on the clock of time.monotonic(), at most a second late
    seconds: float


def behind_a_flush(failure: Sample, flushes: Iterable[Flush]) -> bool:
    """Returns whether a request was answered 503 because Redis waited for its disk.

    The disk of a shared test machine stalls for a second now and then, and a write that can't be
    flushed must not be acknowledged. No event of the drill causes that.
    """
    done = failure.due + failure.seconds
    return failure.error == "status 503" and any(
        failure.due <= flush.end and flush.end - 1 - flush.seconds <= done
        for flush in flushes
        if flush.seconds >= SLOW_FLUSH
    )
