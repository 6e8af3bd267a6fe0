"""What each way to balance makes of a host that has lost most of its CPU.

    python bench/throttle.py --runs 1          # all ways once, on the fleet that `make up` has made
    python bench/throttle.py --table           # what all runs so far have shown

Under a constant rate of writes, t2 is throttled to a quarter of the CPU that it had. A line a run
is added to `bench/out/throttle.jsonl`; the table is of the runs of one rate and one CPU together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, Spread
from hosts import OTHER, ROOT, Fleet, FleetError
from http1 import BadAnswerError
from load import Ledger, Plan, Sample, Target, allow_files, count, positive, run

CALM = 10.0
LAST = 30.0
CONNECTIONS = 256
OUTPUT = ROOT / "bench" / "out" / "throttle.jsonl"
ROUND_ROBIN = {"nginx_lb_method": "round_robin"}
FIXED = ROUND_ROBIN | {
    "nginx_lb_weights": "explicit",
    "nginx_lb_weight": "{{ 3 if inventory_hostname == 'c5' else 2 }}",
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "explicit weights 3:2": FIXED,
    "least_conn": FIXED | {"nginx_lb_method": "least_conn"},
    "adaptive": ROUND_ROBIN | {"nginx_lb_weights": "adaptive"},
    "adaptive and least_conn": {"nginx_lb_weights": "adaptive", "nginx_lb_method": "least_conn"},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=count, default=1, help="of each way (default 1)")
    add("--rate", type=positive, default=1000.0, help="writes per second (default 1000)")
    add("--cpus", type=positive, default=0.2, help="what t2 has before (default 0.2 processors)")
    add("--seconds", type=positive, default=90.0, help="throttled, in each run (default 90)")
    add("--ways", help=f"some of: {', '.join(WAYS)}")
    add("--json", type=Path, default=OUTPUT, help="default bench/out/throttle.jsonl")
    add("--table", action="store_true", help="run nothing, show the table")
    options = parser.parse_args(arguments)
    options.ways = (
        [name.strip() for name in options.ways.split(",")] if options.ways else list(WAYS)
    )
    for name in options.ways:
        if name not in WAYS:
            parser.error(f"there is no way {name!r}; there are {', '.join(WAYS)}")
    return options


def part(samples: Sequence[Sample], since: float, until: float) -> dict[str, Any]:
    """What users saw of the requests that were due in some time, and t2's share of them."""
    due = [sample for sample in samples if since <= sample.due < until]
    answered = [sample for sample in due if sample.error is None]
    by_other = sum(sample.instance == OTHER for sample in answered)
    spread = Spread.of_seconds(sample.seconds for sample in due)
    return {
        "requests": len(due),
        "failed": len(due) - len(answered),
        "share": round(by_other / max(1, len(answered)), 4),
        **spread.as_json(),
    }


async def one_run(fleet: Fleet, way: str, options: argparse.Namespace) -> dict[str, Any]:
    await fleet.must_play("nginx_lb.yml", **WAYS[way])
    await fleet.throttle(OTHER, options.cpus)
    samples: list[Sample] = []
    plan = Plan(options.rate, CALM + options.seconds, CONNECTIONS)
    loading = asyncio.create_task(
        run(Target.parse(fleet.url), plan, Ledger(), watch=samples.append)
    )
    try:
        await asyncio.sleep(CALM)
        await fleet.throttle(OTHER, options.cpus / 4)
        throttled = time.monotonic()
        report = await loading
    finally:
        loading.cancel()
        await fleet.throttle(OTHER, None)
    end = max(sample.due for sample in samples)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "way": way,
        "rate": options.rate,
        "cpus": options.cpus,
        "seconds": options.seconds,
        "before": part(samples, 0, throttled - 2),
        "throttled": part(samples, throttled, end),
        "at last": part(samples, end - LAST, end),
        "generator_lag_p99_ms": round(report.lag.p99, 3),
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Medians of the runs with the lowest and highest, a line a way."""
    lines = []
    for rate, cpus in sorted({(each["rate"], each["cpus"]) for each in runs}):
        lines.append(f"{rate:g} writes/s; t2 has {cpus:g} processors, then a quarter of that")
        lines.append(
            f"{'way':<25} runs  {'share of t2 before':>18} {'throttled':>18} {'at last':>18}"
            f"  {'p99 ms before':>18} {'throttled':>20} {'at last':>20}  failed"
        )
        for way in WAYS:
            mine = [
                each
                for each in runs
                if (each["way"], each["rate"], each["cpus"]) == (way, rate, cpus)
            ]
            if not mine:
                continue
            shares, delays = (
                [
                    Figure.of(each[when][what] for each in mine)
                    for when in ("before", "throttled", "at last")
                ]
                for what in ("share", "p99")
            )
            failed = sum(each["throttled"]["failed"] for each in mine)
            cells = [f"{f.median:.1%} ({f.min:.1%} to {f.max:.1%})" for f in shares]
            cells += [f"{f.median:.1f} ({f.min:.1f} to {f.max:.1f})" for f in delays]
            lines.append(
                f"{way:<25} {len(mine):>4}  {cells[0]:>18} {cells[1]:>18} {cells[2]:>18}"
                f"  {cells[3]:>18} {cells[4]:>20} {cells[5]:>20}  {failed}"
            )
    return "\n".join(lines)


async def compare(options: argparse.Namespace) -> None:
    fleet = Fleet.load()
    try:
        for _ in range(options.runs):
            for way in options.ways:
                seen = await one_run(fleet, way, options)
                print(json.dumps(seen), file=sys.stderr, flush=True)
                with options.json.open("a") as file:
                    file.write(json.dumps(seen) + "\n")
    finally:
        await fleet.throttle(OTHER, None)
        await fleet.play("nginx_lb.yml")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if not options.table:
            allow_files(CONNECTIONS)
            asyncio.run(compare(options))
        print(table([json.loads(line) for line in options.json.read_text().splitlines()]))
    except (FleetError, BadAnswerError, OSError) as error:
        print(f"throttle.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
