"""What an event of the drill is, and what events share."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.drill.hosts import ROOT, Fleet

AWAY = frozenset({"503"})
ANYTHING = frozenset(
    {"502", "503", "504", "cannot connect", "connection lost", "no answer in time"}
    | {"no free connection in time"}
)


class Scene:
    """The fleet under drill, and the state that events share.

    Attributes:
        blows: begin and end of each blow of the present event, on the clock of time.monotonic().
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.label = time.strftime("drill-%Y%m%d-%H%M%S")
        self.releases = 0
        self.may_roll_back = False
        self.end_writers: Callable[[], None] = lambda: None  # set by the drill for each run
        self.blows: list[tuple[float, float]] = []

    def next_release(self) -> str:
        self.releases += 1
        return f"{self.label}-{self.releases}"

    def host(self, turn: int) -> str:
        """Alternates between the hosts."""
        hosts = list(self.fleet.addresses)
        return hosts[turn % len(hosts)]

    @contextmanager
    def blow(self) -> Iterator[None]:
        """Marks a part of an act that may make requests fail; without any, it is the whole act."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.blows.append((begin, time.monotonic()))


Act = Callable[[Scene, int], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Event:
    """One event, and the failures that it excuses.

    Attributes:
        name: name on the command line.
        act: starts and ends the event.
        runs: number of runs in a full drill.
        planned: whether it is an operator's work: recovery is then measured from the first shortage
            of capacity, not from the command.
        excused: failures that are allowed until `grace` seconds after the end of each blow; all others
            are faults.
        outage: longest time in seconds without an acknowledged write.
        patience: seconds from the command until the fleet counts as not recovered.
        prepare: runs before the load begins.
        apart: host with clients of its own, whose failures don't count: it is cut off from the others.
    """

    name: str
    act: Act
    runs: int = 3
    planned: bool = False
    excused: frozenset[str] = frozenset()
    grace: float = 0.0
    outage: float = math.inf
    patience: float = 60.0
    prepare: Callable[[Scene], Awaitable[None]] | None = None
    apart: str = ""


def clear_cache(label: str) -> None:
    """Removes the drill's releases from the control node's cache."""
    for folder in (ROOT / ".cache" / "releases").glob(f"{label}-*"):
        shutil.rmtree(folder, ignore_errors=True)
