"""The fault drill: the effect of deploys, faults and power cuts on users of the local fleet.

    python -m bench.drill                      # everything, in the order of the table
    python -m bench.drill --quick              # three events, once each
    python -m bench.drill --events "t2 frozen,redis killed" --runs 5

Each event happens during writes at a constant rate and by sequential writers. All acknowledged
writes are checked when the fleet is restored. Exit status: 0 only excused requests failed; 1 a write
was lost or undone, another request failed, or the fleet did not recover by itself; 2 the drill could
not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compare.machine import describe
from bench.drill.capacity import Normal, Shortage, shortage
from bench.drill.faults import EVENTS, QUICK, Event, Scene, clear_cache
from bench.drill.hosts import ROOT, Fleet, FleetError
from bench.drill.outcomes import Outcome, Run, kind, table, unexcused
from bench.load.disk import behind_a_flush
from bench.load.figures import Spread
from bench.load.http1 import Target
from bench.load.ledger import CHANNELS, Ledger
from bench.load.openloop import Plan, Report, Sample, run
from bench.load.options import allow_files, count, named, positive
from bench.load.readback import UNREACHABLE, UnreadableError, read_canvas
from bench.load.writers import SETTLE, Writers, pixels_of

CANVAS = (1024, 1024)
CONNECTIONS = 512
WRITERS = 32
TIMEOUT = 10.0
WARM_UP = 1.0
BEFORE = 5.0
SETTLED = 2.0  # seconds at full capacity before a run ends
PENDING = 0.5  # seconds; more recent requests may not be answered yet
OUTPUT = ROOT / "bench" / "out" / "drill.json"
UNREADABLE = (*UNREACHABLE, UnreadableError)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.drill",
        description="Causes faults on the local fleet under load, and counts what users notice.",
        epilog=f"Events: {', '.join(event.name for event in EVENTS)}.",
    )
    add = parser.add_argument
    add("--events", metavar="A,B", help="only these events, in this order")
    add("--runs", type=count, help="of each event (default 10 or 3, see bench/README.md)")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)}: once each")
    add("--rate", type=positive, default=500.0, help="writes per second (default 500)")
    add("--json", type=Path, default=OUTPUT, metavar="FILE", help="default bench/out/drill.json")
    options = parser.parse_args(arguments)
    known = {event.name: event for event in EVENTS}
    names = options.events or (",".join(QUICK) if options.quick else None)
    options.events = named(parser, "event", known, names)
    options.runs = options.runs or (1 if options.quick else None)
    return options


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@dataclass
class Seen:
    """The requests and times of one event; times are on the clock of time.monotonic().

    Attributes:
        samples: requests of the open loop.
        others: requests of the sequential writers.
        since, acted, until: times of the event's start, of its end, and of the run's end.
        settled: whether the fleet returned to full capacity.
        faults: errors of the event itself.
    """

    samples: list[Sample] = field(default_factory=list)
    others: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    since: float = 0.0
    acted: float = 0.0
    until: float = 0.0
    settled: bool = False


class Drill:
    """Causes the events one at a time, each with its own load."""

    def __init__(self, scene: Scene, rate: float, size: tuple[int, int] = CANVAS) -> None:
        self._scene = scene
        self._rate = rate
        self._target = Target.parse(scene.fleet.url)
        self._size = size
        self._pixels = pixels_of(*size, WRITERS)
        self._canvas = bytearray(size[0] * size[1] * len(CHANNELS))
        self._known = 0  # writes whose cells have been read

    def _ledger(self) -> Ledger:
        return Ledger(*self._size, bytes(self._canvas), reserved=len(self._pixels))

    async def happen(self, event: Event, turn: int) -> Run:
        if event.prepare is not None:
            await event.prepare(self._scene)
        plan = Plan(self._rate, event.patience + BEFORE + TIMEOUT, CONNECTIONS, TIMEOUT)
        await self._read(self._known, plan.total)
        seen = Seen()
        ledger = self._ledger()
        writers = Writers(
            *(self._target, self._size, bytes(self._canvas), WRITERS, TIMEOUT),
            watch=seen.others.append,
        )
        stop, end_writers = asyncio.Event(), asyncio.Event()
        self._scene.end_writers = end_writers.set
        loading = asyncio.create_task(run(self._target, plan, ledger, stop=stop, watch=seen.samples.append))
        writing = asyncio.create_task(writers.run(end_writers))
        try:
            await asyncio.sleep(WARM_UP + BEFORE)
            if loading.done():
                loading.result()
            seen.since = time.monotonic()
            calm = [each for each in seen.samples if seen.since - BEFORE <= each.due]
            normal = Normal.of(calm, self._rate)
            if set(normal.shares) != set(self._scene.fleet.addresses):
                raise FleetError(f"before the event, only these answered: {', '.join(normal.shares)}")
            try:
                async with asyncio.timeout(event.patience):
                    await event.act(self._scene, turn)
            except (FleetError, TimeoutError) as error:
                seen.faults.append(str(error) or f"not done within {event.patience:.0f} s")
            seen.acted = time.monotonic()
            seen.settled = await self._settle(seen.samples, normal, seen.since + event.patience)
            seen.until = time.monotonic() - PENDING
        finally:
            stop.set()
            end_writers.set()
            report = await loading
            await writing
        await self._scene.fleet.heal()
        await asyncio.sleep(SETTLE)
        return await self._judge(event, ledger, writers, report, seen, normal)

    async def _settle(self, samples: Sequence[Sample], normal: Normal, deadline: float) -> bool:
        """Waits for `SETTLED` seconds at full capacity; returns False at the deadline."""
        await asyncio.sleep(SETTLED + PENDING)
        while (now := time.monotonic() - PENDING) < deadline:
            recent = samples[-math.ceil(4 * (SETTLED + 1) * self._rate) :]
            if shortage(recent, normal, now - SETTLED, now) is None:
                return True
            await asyncio.sleep(0.25)
        return False

    async def _judge(
        self,
        event: Event,
        ledger: Ledger,
        writers: Writers,
        report: Report,
        seen: Seen,
        normal: Normal,
    ) -> Run:
        failures = [each for each in (*seen.samples, *seen.others) if each.error is not None]
        flushes = await self._scene.fleet.slow_flushes() if failures else []
        others = [sample for sample in failures if not behind_a_flush(sample, flushes)]
        faults = list(seen.faults)
        counted = unexcused(others, event.excused, seen.since, seen.acted + event.grace)
        faults += [f"{number} x {name}" for name, number in counted.items()]
        short = shortage(seen.samples, normal, seen.since, seen.until)
        if not seen.settled:
            why = short.lack if short is not None else "capacity was full only for moments"
            faults.append(f"not at full capacity after {seen.until - seen.since:.0f} s: {why}")
        await self._read(0, len(ledger))
        verdict, sequential = ledger.check(bytes(self._canvas)), writers.check(bytes(self._canvas))
        faults += [f"lost: {fault}" for fault in verdict.lost[:3]]
        faults += [f"undone: {fault}" for fault in sequential.undone[:3]]
        faults += [f"wrong: {fault}" for fault in (*verdict.wrong[:3], *sequential.wrong[:3])]
        ended = max(seen.acted, short.end) if short is not None else seen.acted
        touched = [each.seconds for each in seen.samples if seen.since <= each.due <= ended]
        return Run(
            event=event.name,
            sent=report.sent + sequential.sent,
            acknowledged=report.acknowledged + sequential.acknowledged,
            failed=Counter(kind(each.error) for each in failures if each.error is not None),
            lost=len(verdict.lost),
            undone=len(sequential.undone),
            wrong=len(verdict.wrong) + len(sequential.wrong),
            before=normal.latency,
            during=Spread.of_seconds(touched),
            took=seen.acted - seen.since,
            recovery=recovery_of(short, seen.since, event.planned) if seen.settled else None,
            lack=short.lack if short is not None else "",
            faults=faults,
            behind_flush=len(failures) - len(others),
        )

    async def _read(self, first: int, last: int) -> None:
        """Reads the writers' pixels and those of the ledger's writes `first` to `last`.

        Every ledger starts with the same cells, so the next run has to know their current values.
        """
        cells = {*self._pixels, *self._ledger().cells(range(first, last))}
        deadline = time.monotonic() + 60
        while True:
            try:
                canvas = await read_canvas(self._target, *self._size, cells)
                break
            except UNREADABLE as error:
                if time.monotonic() > deadline:
                    raise FleetError(f"the canvas can't be read: {error!r}") from None
                await asyncio.sleep(1)
        for x, y in cells:
            at = (y * self._size[0] + x) * len(CHANNELS)
            self._canvas[at : at + len(CHANNELS)] = canvas[at : at + len(CHANNELS)]
        self._known = max(self._known, last)


def recovery_of(short: Shortage | None, since: float, planned: bool) -> float:
    """Seconds until full capacity, from the fault; for planned work, from the first shortage."""
    if short is None:
        return 0.0
    return short.end - (short.begin if planned else since)


async def drill(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Causes the events; adds to `outcomes` after each run, so that results survive an interrupt."""
    fleet = Fleet.load()
    scene = Scene(fleet)
    await fleet.heal()
    first = await fleet.releases()
    if set(first) != set(fleet.addresses):
        raise FleetError(f"{fleet.url}/ping is answered only by {', '.join(first) or 'no host'}")
    try:
        say(f"fleet {fleet.name}: {first}, {options.rate:g} writes/s to {fleet.url}")
        work = Drill(scene, options.rate)
        for event in options.events:
            outcome = Outcome(event.name)
            runs = options.runs or event.runs
            for turn in range(runs):
                say(f"{event.name}, {turn + 1} of {runs}")
                done = await work.happen(event, turn)
                if not outcome.runs:
                    outcomes.append(outcome)
                outcome.runs.append(done)
                say(f"  {line(done)}")
                for fault in done.faults:
                    say(f"  FAULT {fault}")
    finally:
        say("healing")
        await fleet.heal()
        await back_to(scene, first)
        clear_cache(scene.label)


async def back_to(scene: Scene, first: dict[str, str]) -> None:
    """Deploys the release that was running when the drill began."""
    if await scene.fleet.releases() != first and len(set(first.values())) == 1:
        release = next(iter(first.values()))
        say(f"returning to release {release}")
        status, _ = await scene.fleet.play("pixel_app.yml", {"pixel_app_release": release})
        if status != 0:
            raise FleetError(f"the fleet could not be returned to release {release}")


def line(done: Run) -> str:
    recovery = "not at full capacity"
    if done.recovery is not None:
        recovery = f"full capacity after {done.recovery:.1f} s"
    waited = f" ({done.behind_flush} behind a slow flush)" if done.behind_flush else ""
    return (
        f"sent {done.sent}, failed {dict(done.failed) or 'none'}{waited},"
        f" lost {done.lost}, undone {done.undone}, wrong {done.wrong}, p99"
        f" {done.before.p99:.1f} then {done.during.p99:.1f} ms, took {done.took:.1f} s, {recovery}"
        + (f" (last shortage: {done.lack})" if done.lack else "")
    )


def as_json(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": describe(options.json.parent),
        "rate": options.rate,
        "quick": options.quick,
        "events": [outcome.as_json() for outcome in outcomes],
    }


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the lock that allows one drill at a time on a fleet."""
    path = ROOT / ".fleet" / f"{Fleet.load().name}.drill.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FleetError("another drill is running on this fleet") from None
        yield


async def until_interrupted(options: argparse.Namespace, outcomes: list[Outcome]) -> bool:
    """Runs the drill. The first Ctrl-C stops it and restores the fleet, later ones are ignored."""
    working = asyncio.create_task(drill(options, outcomes))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, once(working))
    try:
        await working
    except asyncio.CancelledError:
        return False
    return True


def once(working: asyncio.Task[None]) -> Any:
    def interrupt() -> None:
        if not working.cancelling():
            say("interrupted: healing the fleet first")
            working.cancel()

    return interrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    outcomes: list[Outcome] = []
    status = 0
    try:
        allow_files(CONNECTIONS + WRITERS)
        with alone():
            if not asyncio.run(until_interrupted(options, outcomes)):
                status = 130
    except (FleetError, *UNREADABLE) as error:
        print(f"bench.drill: {error}", file=sys.stderr)
        status = 2
    if outcomes:
        print(table(outcomes))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(options, outcomes), indent=1) + "\n")
    return status or int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
