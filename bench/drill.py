"""The fault drill: what users of the local fleet notice of deploys, crashes and power cuts.

    python bench/drill.py                      # everything, in the order of the table
    python bench/drill.py --quick              # five events, once each
    python bench/drill.py --events "t2 frozen,redis killed" --runs 5

Each event happens under a constant rate of writes, whose ledger is held against the canvas
afterwards. Exit status: 0 if users noticed no more than they may; 1 if a write was lost, a request
failed that must not, or the fleet did not come back by itself; 2 if it could not run.
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
from pathlib import Path
from typing import Any

from capacity import Normal, Shortage, shortage
from faults import EVENTS, QUICK, Event, Scene, clear_cache
from figures import Spread
from hosts import ROOT, Fleet, FleetError
from http1 import BadAnswerError
from ledger import CHANNELS
from load import (
    Ledger,
    Plan,
    Report,
    Sample,
    Target,
    UnreadableError,
    allow_files,
    count,
    positive,
    read_canvas,
    run,
)
from machine import describe
from outcomes import Outcome, Run, behind_a_flush, kind, table, unexcused

CANVAS = (1024, 1024)
CONNECTIONS = 512
TIMEOUT = 10.0
WARM_UP = 1.0
BEFORE = 5.0
SETTLED = 2.0  # seconds at full capacity, after which a run may end
PENDING = 0.5  # the latest requests may still be on their way
OUTPUT = ROOT / "bench" / "out" / "drill.json"
UNREADABLE = (OSError, TimeoutError, BadAnswerError, UnreadableError)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Breaks the local fleet in every way it must bear, under load.",
        epilog=f"Events: {', '.join(event.name for event in EVENTS)}.",
    )
    add = parser.add_argument
    add("--events", metavar="A,B", help="these only, in this order")
    add("--runs", type=count, help="of each event (default 10 or 3, see bench/README.md)")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)}: once each")
    add("--rate", type=positive, default=500.0, help="writes per second (default 500)")
    add("--json", type=Path, default=OUTPUT, metavar="FILE", help="default bench/out/drill.json")
    options = parser.parse_args(arguments)
    known = {event.name: event for event in EVENTS}
    names = list(QUICK) if options.quick else list(known)
    if options.events:
        names = [name.strip() for name in options.events.split(",")]
    for name in names:
        if name not in known:
            parser.error(f"there is no event {name!r}; there are {', '.join(known)}")
    options.events = [known[name] for name in names]
    options.runs = options.runs or (1 if options.quick else None)
    return options


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class Drill:
    """One event after another, each under a load of its own."""

    def __init__(self, scene: Scene, rate: float, size: tuple[int, int] = CANVAS) -> None:
        self._scene = scene
        self._rate = rate
        self._target = Target.parse(scene.fleet.url)
        self._size = size
        self._canvas = bytearray(size[0] * size[1] * len(CHANNELS))
        self._known = 0  # writes whose cells have been read

    async def happen(self, event: Event, turn: int) -> Run:
        if event.prepare is not None:
            await event.prepare(self._scene)
        plan = Plan(self._rate, event.patience + BEFORE + TIMEOUT, CONNECTIONS, TIMEOUT)
        await self._read(self._known, plan.total)
        ledger = Ledger(*self._size, bytes(self._canvas))
        samples: list[Sample] = []
        stop = asyncio.Event()
        loading = asyncio.create_task(
            run(self._target, plan, ledger, stop=stop, watch=samples.append)
        )
        faults: list[str] = []
        try:
            await asyncio.sleep(WARM_UP + BEFORE)
            if loading.done():
                loading.result()
            since = time.monotonic()
            calm = [each for each in samples if since - BEFORE <= each.due]
            normal = Normal.of(calm, self._rate)
            if set(normal.shares) != set(self._scene.fleet.addresses):
                raise FleetError(
                    f"before anything was done, only these answered: {', '.join(normal.shares)}"
                )
            try:
                async with asyncio.timeout(event.patience):
                    await event.act(self._scene, turn)
            except (FleetError, TimeoutError) as error:
                faults.append(str(error) or f"not done within {event.patience:.0f} s")
            acted = time.monotonic()
            settled = await self._settle(samples, normal, since + event.patience)
            until = time.monotonic() - PENDING
        finally:
            stop.set()
            report = await loading
        await self._scene.fleet.heal()
        return await self._judge(
            event, ledger, report, samples, normal, (since, acted, until), settled, faults
        )

    async def _settle(self, samples: Sequence[Sample], normal: Normal, deadline: float) -> bool:
        """Waits for some seconds at full capacity; False if they don't come in time."""
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
        report: Report,
        samples: Sequence[Sample],
        normal: Normal,
        times: tuple[float, float, float],
        settled: bool,
        faults: list[str],
    ) -> Run:
        since, acted, until = times
        failures = [sample for sample in samples if sample.error is not None]
        flushes = await self._scene.fleet.slow_flushes() if failures else []
        others = [sample for sample in failures if not behind_a_flush(sample, flushes)]
        seen = unexcused(others, event.excused, since, acted + event.grace)
        faults += [f"{number} x {name}" for name, number in seen.items()]
        short = shortage(samples, normal, since, until)
        if not settled:
            why = short.lack if short is not None else "it came and went"
            faults.append(f"not at full capacity after {until - since:.0f} s: {why}")
        await self._read(0, len(ledger))
        verdict = ledger.check(bytes(self._canvas))
        faults += [f"lost: {fault}" for fault in verdict.lost[:3]]
        faults += [f"wrong: {fault}" for fault in verdict.wrong[:3]]
        ended = max(acted, short.end) if short is not None else acted
        touched = [each.seconds for each in samples if since <= each.due <= ended]
        return Run(
            event=event.name,
            sent=report.sent,
            acknowledged=report.acknowledged,
            failed=Counter(kind(each.error) for each in failures if each.error is not None),
            lost=len(verdict.lost),
            wrong=len(verdict.wrong),
            before=normal.latency,
            during=Spread.of_seconds(touched),
            took=acted - since,
            recovery=recovery_of(short, since, event.planned) if settled else None,
            lack=short.lack if short is not None else "",
            faults=faults,
            behind_flush=len(failures) - len(others),
        )

    async def _read(self, first: int, last: int) -> None:
        """Reads the cells that these writes go to, as soon as they can be read.

        Every ledger begins with the same cells, so what the last run left there is known.
        """
        cells = Ledger(*self._size).cells(range(first, last))
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
    """Seconds until full capacity: of a fault since it struck, else since capacity was short."""
    if short is None:
        return 0.0
    return short.end - (short.begin if planned else since)


async def drill(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Fills in the outcomes as they come: what is there when it is interrupted still counts."""
    fleet = Fleet.load()
    scene = Scene(fleet)
    await fleet.heal()
    first = await fleet.releases()
    if set(first) != set(fleet.addresses):
        raise FleetError(f"{fleet.url}/ping is answered by {', '.join(first) or 'nobody'} only")
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
    """The release that was there when the drill began."""
    if await scene.fleet.releases() != first and len(set(first.values())) == 1:
        release = next(iter(first.values()))
        say(f"back to release {release}")
        status, _ = await scene.fleet.play("pixel_app.yml", {"pixel_app_release": release})
        if status != 0:
            raise FleetError(f"the fleet could not be brought back to release {release}")


def line(done: Run) -> str:
    recovery = "never at full capacity"
    if done.recovery is not None:
        recovery = f"full capacity after {done.recovery:.1f} s"
    waited = f" ({done.behind_flush} behind a slow flush)" if done.behind_flush else ""
    return (
        f"sent {done.sent}, failed {dict(done.failed) or 'none'}{waited}, lost {done.lost}, p99"
        f" {done.before.p99:.1f} then {done.during.p99:.1f} ms, took {done.took:.1f} s, {recovery}"
        + (f" (at last {done.lack})" if done.lack else "")
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
    """One drill at a time on a fleet."""
    path = ROOT / ".fleet" / f"{Fleet.load().name}.drill.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FleetError("another drill is on this fleet") from None
        yield


async def until_told(options: argparse.Namespace, outcomes: list[Outcome]) -> bool:
    """Runs the drill; a first Ctrl-C ends it in order, and further ones don't hurry that."""
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
            say("interrupted; the fleet is healed first")
            working.cancel()

    return interrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    outcomes: list[Outcome] = []
    status = 0
    try:
        allow_files(CONNECTIONS)
        with alone():
            if not asyncio.run(until_told(options, outcomes)):
                status = 130
    except (FleetError, *UNREADABLE) as error:
        print(f"drill.py: {error}", file=sys.stderr)
        status = 2
    if outcomes:
        print(table(outcomes))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(options, outcomes), indent=1) + "\n")
    return status or int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
