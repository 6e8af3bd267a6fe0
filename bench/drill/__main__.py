"""The fault drill: the effect of deploys, faults and power cuts on users of the local fleet.

    python -m bench.drill                      # everything, in the order of the table
    python -m bench.drill --quick              # two or three events, once each
    python -m bench.drill --events "t2 frozen,redis killed" --runs 5
    python -m bench.drill --commands --rate 200     # an operator's commands

The events depend on the fleet: `make up` has two hosts, `make up FLEET=ha` three, any one of which may
die. Each event happens during writes at a constant rate and by sequential writers, with a few viewers.
When the fleet is restored, all acknowledged writes and the viewers' copies of the canvas are checked.
Exit status: 0 only excused requests failed; 1 a write was lost or undone, a viewer's copy was wrong,
another request failed, writes failed for too long, or the fleet did not recover by itself; 2 the drill
could not be run.
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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compare.machine import describe
from bench.drill.capacity import Normal, Shortage, longest_outage, shortage
from bench.drill.cluster_faults import EVENTS as CLUSTER_EVENTS
from bench.drill.cluster_faults import QUICK as CLUSTER_QUICK
from bench.drill.commands import COMMANDS
from bench.drill.events import Event, Scene, clear_cache
from bench.drill.faults import EVENTS, QUICK
from bench.drill.hosts import ROOT, Fleet, FleetError
from bench.drill.outcomes import Outcome, Run, kind, table, unexcused
from bench.load.disk import behind_a_flush
from bench.load.figures import Spread
from bench.load.follower import Differences, Follower
from bench.load.http1 import Target
from bench.load.ledger import CHANNELS, Ledger
from bench.load.openloop import Plan, Report, Sample, run
from bench.load.options import allow_files, count, named, positive
from bench.load.readback import UNREACHABLE, UnreadableError, read_canvas
from bench.load.writers import SETTLE, Writers, pixels_of

CANVAS = (1024, 1024)
CONNECTIONS = 512  # at most, and no more than writes a second: each is used about once a second
WRITERS = 32
APART_WRITERS = 4  # clients of a host that is cut off
FOLLOWERS = 3
TIMEOUT = 10.0
WARM_UP = 1.0
BEFORE = 5.0
SETTLED = 2.0  # seconds at full capacity before a run ends
CAUGHT_UP = 10.0  # seconds until viewers have the last event
PENDING = 0.5  # seconds; more recent requests may not be answered yet
OUTPUT = ROOT / "bench" / "out" / "drill.json"
UNREADABLE = (*UNREACHABLE, UnreadableError)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; the fleet decides which events there are. Raises FleetError."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.drill",
        description="Causes faults on the local fleet under load, and counts what users notice.",
        epilog="bench/README.md describes the events.",
    )
    add = parser.add_argument
    add("--events", metavar="A,B", help="only these events, in this order")
    add("--runs", type=count, help="of each event (default 10 or 3, see bench/README.md)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quick", action="store_true", help="two or three short events, once each")
    kinds.add_argument("--commands", action="store_true", help="an operator's commands, once each")
    add("--rate", type=positive, default=500.0, help="writes per second (default 500)")
    add("--json", type=Path, default=OUTPUT, metavar="FILE", help="default bench/out/drill.json")
    options = parser.parse_args(arguments)
    options.fleet = Fleet.load()
    is_cluster = options.fleet.is_cluster
    events = COMMANDS if options.commands else CLUSTER_EVENTS if is_cluster else EVENTS
    quick = ",".join(CLUSTER_QUICK if is_cluster else QUICK)
    names = options.events or (quick if options.quick else None)
    options.events = named(parser, "event", {event.name: event for event in events}, names)
    options.runs = options.runs or (1 if options.quick or options.commands else None)
    return options


def spare_connections(fleet: Fleet, rate: float) -> int:
    """Further connections of other users, whom requests that wait in a frozen balancer don't affect."""
    return math.ceil(rate * TIMEOUT) if fleet.is_cluster else 0


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
        views: differences between the viewers' copies and the canvas.
        resyncs: how often viewers had to fetch the canvas again.
    """

    samples: list[Sample] = field(default_factory=list)
    others: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    since: float = 0.0
    acted: float = 0.0
    until: float = 0.0
    settled: bool = False
    views: list[Differences] = field(default_factory=list)
    resyncs: int = 0


class Drill:
    """Causes the events one at a time, each with its own load."""

    def __init__(self, scene: Scene, rate: float, size: tuple[int, int] = CANVAS) -> None:
        self._scene = scene
        self._rate = rate
        self._target = Target.parse(scene.fleet.url)
        self._size = size
        self._pixels = pixels_of(*size, WRITERS + APART_WRITERS)
        self._canvas = bytearray(size[0] * size[1] * len(CHANNELS))
        self._known = 0  # writes whose cells have been read

    def _ledger(self) -> Ledger:
        return Ledger(*self._size, bytes(self._canvas), reserved=len(self._pixels))

    async def happen(self, event: Event, turn: int) -> Run:
        if event.prepare is not None:
            await event.prepare(self._scene)
        connections = min(CONNECTIONS, math.ceil(self._rate))
        seconds = event.patience + BEFORE + TIMEOUT
        spare = spare_connections(self._scene.fleet, self._rate)
        plan = Plan(self._rate, seconds, connections, TIMEOUT, spare=spare)
        await self._read(self._known, plan.total)
        seen = Seen()
        ledger = self._ledger()
        several = [self._writers(self._target, WRITERS, seen.others.append)]
        urls = [self._scene.fleet.url] * FOLLOWERS
        if event.apart:
            urls.append(f"http://{self._scene.fleet.addresses[event.apart]}")
            several.append(self._writers(Target.parse(urls[-1]), APART_WRITERS, others=WRITERS))
        stop, end_writers = asyncio.Event(), asyncio.Event()
        self._scene.end_writers = end_writers.set
        self._scene.blows = []
        async with following(urls) as followers:
            loading = asyncio.create_task(
                run(self._target, plan, ledger, stop=stop, watch=seen.samples.append)
            )
            writing = asyncio.gather(*(writers.run(end_writers) for writers in several))
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
            await self._read(0, len(ledger))
            seen.views = await self._compare(followers)
            seen.resyncs = sum(fault.startswith("resync") for each in followers for fault in each.faults)
        return await self._judge(event, ledger, several, report, seen, normal)

    def _writers(
        self, target: Target, number: int, watch: Callable[[Sample], None] | None = None, others: int = 0
    ) -> Writers:
        return Writers(target, self._size, bytes(self._canvas), number, TIMEOUT, watch, others)

    async def _compare(self, followers: Sequence[Follower]) -> list[Differences]:
        """Compares the viewers' copies with the canvas, when they have received its last event."""
        if not followers:
            return []
        true = await asyncio.to_thread(Follower, self._scene.fleet.url)
        deadline = time.monotonic() + CAUGHT_UP
        while any(each.event != true.event for each in followers) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return [each.differences(bytes(true.canvas)) for each in followers]

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
        several: Sequence[Writers],
        report: Report,
        seen: Seen,
        normal: Normal,
    ) -> Run:
        failures = [each for each in (*seen.samples, *seen.others) if each.error is not None]
        flushes = await self._scene.fleet.slow_flushes() if failures else []
        others = [sample for sample in failures if not behind_a_flush(sample, flushes)]
        faults = list(seen.faults)
        blows = self._scene.blows or [(seen.since, seen.acted)]
        counted = unexcused(others, event.excused, [(begin, end + event.grace) for begin, end in blows])
        faults += [f"{number} x {name}" for name, number in counted.items()]
        short = shortage(seen.samples, normal, seen.since, seen.until)
        if not seen.settled:
            why = short.lack if short is not None else "capacity was full only for moments"
            faults.append(f"not at full capacity after {seen.until - seen.since:.0f} s: {why}")
        outage = longest_outage(seen.samples, seen.since, seen.until)
        if outage > event.outage:
            faults.append(f"no write was acknowledged for {outage:.1f} s, the limit is {event.outage:.1f} s")
        verdict = ledger.check(bytes(self._canvas))
        sequential = [writers.check(bytes(self._canvas)) for writers in several]
        undone = [fault for each in sequential for fault in each.undone]
        wrong = [*verdict.wrong, *(fault for each in sequential for fault in each.wrong)]
        faults += [f"lost: {fault}" for fault in verdict.lost[:3]]
        faults += [f"undone: {fault}" for fault in undone[:3]]
        faults += [f"wrong: {fault}" for fault in wrong[:3]]
        faults += [
            f"viewer {number}: {view.gaps} gaps, {view.phantoms} phantoms"
            for number, view in enumerate(seen.views, start=1)
            if any(view)
        ]
        ended = max(seen.acted, short.end) if short is not None else seen.acted
        touched = [each.seconds for each in seen.samples if seen.since <= each.due <= ended]
        return Run(
            event=event.name,
            sent=report.sent + sequential[0].sent,
            acknowledged=report.acknowledged + sequential[0].acknowledged,
            failed=Counter(kind(each.error) for each in failures if each.error is not None),
            lost=len(verdict.lost),
            undone=len(undone),
            wrong=len(wrong),
            before=normal.latency,
            during=Spread.of_seconds(touched),
            took=seen.acted - seen.since,
            outage=outage,
            gaps=sum(view.gaps for view in seen.views),
            phantoms=sum(view.phantoms for view in seen.views),
            resyncs=seen.resyncs,
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


@contextlib.asynccontextmanager
async def following(urls: Sequence[str]) -> AsyncIterator[list[Follower]]:
    """Yields viewers of these addresses."""
    async with contextlib.AsyncExitStack() as stack:
        followers = []
        for url in urls:
            follower = await asyncio.to_thread(Follower, url)
            stack.push_async_callback(asyncio.to_thread, follower.__exit__)
            followers.append(await asyncio.to_thread(follower.__enter__))
        yield followers


def recovery_of(short: Shortage | None, since: float, planned: bool) -> float:
    """Seconds until full capacity, from the fault; for planned work, from the first shortage."""
    if short is None:
        return 0.0
    return short.end - (short.begin if planned else since)


async def drill(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Causes the events; adds to `outcomes` after each run, so that results survive an interrupt."""
    fleet: Fleet = options.fleet
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
        f" lost {done.lost}, undone {done.undone}, wrong {done.wrong}, viewers' gaps {done.gaps},"
        f" phantoms {done.phantoms}, resyncs {done.resyncs}, no write for {done.outage:.1f} s, p99"
        f" {done.before.p99:.1f} then {done.during.p99:.1f} ms, took {done.took:.1f} s, {recovery}"
        + (f" (last shortage: {done.lack})" if done.lack else "")
    )


def as_json(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": describe(options.json.parent),
        "fleet": options.fleet.inventory,
        "rate": options.rate,
        "quick": options.quick,
        "events": [outcome.as_json() for outcome in outcomes],
    }


@contextlib.contextmanager
def alone(fleet: Fleet) -> Iterator[None]:
    """Holds the lock that allows one drill at a time on a fleet."""
    path = ROOT / ".fleet" / f"{fleet.name}.drill.lock"
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
    outcomes: list[Outcome] = []
    status = 0
    try:
        options = parse_arguments(arguments)
        spare = spare_connections(options.fleet, options.rate)
        allow_files(CONNECTIONS + spare + WRITERS + APART_WRITERS + FOLLOWERS)
        with alone(options.fleet):
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
