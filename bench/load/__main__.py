"""Sends an open-loop load to POST /pixel, then checks every acknowledged write.

    python -m bench.load --url http://127.0.0.1:8080 --rate 1000 --seconds 60 --writers 16

There are two kinds of writes: at a constant rate, one per cell (`ledger.py`), and by sequential
writers, which write to the same cells repeatedly (`writers.py`).
Exit status: 0 success; 1 lost, undone or wrong writes (with --strict: any failed request);
2 the load could not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.drill.hosts import Fleet, FleetError
from bench.load.disk import behind_a_flush
from bench.load.figures import Spread
from bench.load.http1 import Target
from bench.load.ledger import Fate, Ledger, Verdict
from bench.load.openloop import Plan, Report, Sample, run
from bench.load.options import ImpossibleError, allow_files, count, count_or_zero, positive, size
from bench.load.readback import UNREACHABLE, UnreadableError, read_canvas
from bench.load.writers import PIXELS_EACH, SETTLE, Writers, WritersVerdict, pixels_of

LATE_GENERATOR_MS = 2.0
BUSY_GENERATOR = 0.8


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        report: requests and latencies of the open loop.
        behind_flush: number of requests of both kinds that failed while Redis waited for its disk.
        verdict, writers: both kinds of writes checked against the canvas; None if it was not read.
        note: why the canvas was not read.
        unreadable: whether reading the canvas failed.
    """

    report: Report
    behind_flush: int = 0
    verdict: Verdict | None = None
    writers: WritersVerdict | None = None
    note: str = ""
    unreadable: bool = False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description="Writes pixels at a constant rate, then reads the canvas and reports every"
        " acknowledged write that is missing.",
        epilog="Exit status: 0 success; 1 lost, undone or wrong writes, nothing acknowledged,"
        " or with --strict any failed request; 2 the run was not possible.",
    )
    add = parser.add_argument
    add("--url", required=True, help="the service's root, e.g. http://127.0.0.1:8080")
    add("--rate", type=positive, default=1000.0, help="requests per second (default 1000)")
    add("--seconds", type=positive, default=60.0, help="for how long (default 60)")
    add("--connections", type=count, default=64, help="kept open all the time (default 64)")
    add(
        "--writers",
        type=count_or_zero,
        default=0,
        metavar="N",
        help="sequential writers beside the rate, some 20 requests/s each; the canvas is checked"
        f" {SETTLE:g} s after the end (default none)",
    )
    add("--timeout", type=positive, default=10.0, help="of a request, in seconds (default 10)")
    add("--canvas", type=size, default=(1024, 1024), metavar="WxH", help="default 1024x1024")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="may be repeated")
    add("--insecure", action="store_true", help="accept any TLS certificate")
    add("--no-verify", action="store_true", help="do not read the canvas before and after")
    add("--strict", action="store_true", help="exit 1 if any request failed")
    add(
        "--forgive-disk",
        action="store_true",
        help="with --strict, on the local fleet: except those that a slow flush of Redis delayed",
    )
    add("--json", type=Path, metavar="FILE", help="write all results to FILE")
    options = parser.parse_args(arguments)
    try:
        options.target = Target.parse(options.url, options.header, options.insecure)
    except ValueError as error:
        parser.error(str(error))
    options.plan = Plan(options.rate, options.seconds, options.connections, options.timeout)
    width, height = options.canvas
    cells = (width * height - options.writers * PIXELS_EACH) * 3
    if options.writers and options.no_verify:
        parser.error("--writers are checked by reading the canvas: leave out --no-verify")
    if cells <= 0:
        parser.error(f"{options.writers} writers need {PIXELS_EACH} pixels each")
    if options.plan.total < 1:
        parser.error("at this rate not one request is due in the time given")
    if options.plan.total > cells:
        parser.error(
            f"{options.plan.total} writes need as many cells and channels of their own, and the"
            f" canvas has {cells}: at this rate at most {int(cells / options.rate)} seconds"
        )
    return options


def show_progress(report: Report) -> None:
    if not report.timeline:
        return
    last = report.timeline[-2 if len(report.timeline) > 1 else -1]
    print(
        f"\r{len(report.timeline):5d} s  sent {report.sent}  acknowledged {report.acknowledged}"
        f"  failed {report.failed}  p99 {Spread.of_seconds(last.latencies).p99:.1f} ms ",
        end="",
        file=sys.stderr,
        flush=True,
    )


async def load(options: argparse.Namespace) -> Outcome:
    target: Target = options.target
    plan: Plan = options.plan
    width, height = options.canvas
    allow_files(plan.connections + options.writers)
    pixels = pixels_of(width, height, options.writers)
    ledger = Ledger(width, height, reserved=len(pixels))
    cells = {*pixels, *ledger.cells(range(plan.total))} if not options.no_verify else set()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    failures: list[Sample] = []

    def watch(sample: Sample) -> None:
        if sample.error is not None:
            failures.append(sample)

    try:
        before = bytes(ledger.size)
        if not options.no_verify:
            before = await read_canvas(target, width, height, cells)
        ledger = Ledger(width, height, before, reserved=len(pixels))
        size = (width, height)
        writers = Writers(target, size, before, options.writers, plan.timeout, watch)
        progress = show_progress if sys.stderr.isatty() else None
        report = await _run_both(target, plan, ledger, writers, stop, progress, watch)
    except UNREACHABLE as error:
        raise ImpossibleError(f"cannot reach {target.url}: {error or 'no answer in time'}") from error
    if sys.stderr.isatty():
        print(file=sys.stderr)
    flushes = await Fleet.load().slow_flushes() if options.forgive_disk and failures else []
    waited = sum(behind_a_flush(failure, flushes) for failure in failures)
    outcome = Outcome(report, waited)
    if options.no_verify:
        return outcome._replace(note="not read (--no-verify)")
    if options.writers:
        await asyncio.sleep(SETTLE)
    try:
        after = await read_canvas(target, width, height, cells)
    except (UnreadableError, *UNREACHABLE) as error:
        note = f"could not be read after the run: {error!r}"
        return outcome._replace(note=note, unreadable=True)
    return outcome._replace(
        verdict=ledger.check(after), writers=writers.check(after) if options.writers else None
    )


async def _run_both(
    target: Target,
    plan: Plan,
    ledger: Ledger,
    writers: Writers,
    stop: asyncio.Event,
    progress: Callable[[Report], None] | None,
    watch: Callable[[Sample], None],
) -> Report:
    """Runs the open loop and the writers concurrently; the writers stop when the loop has sent all."""
    ended = asyncio.Event()
    writing = asyncio.create_task(writers.run(ended))
    try:
        return await run(target, plan, ledger, progress, stop, watch)
    finally:
        ended.set()
        await writing


def describe(outcome: Outcome) -> str:
    report, verdict = outcome.report, outcome.verdict
    latency, lag = report.latency, report.lag
    lines = [
        f"{report.plan.rate:g} requests/s for {len(report.timeline)} s on"
        f" {report.plan.connections} connections{', interrupted' if report.interrupted else ''}",
        f"  sent          {report.sent}",
        f"  acknowledged  {report.acknowledged}",
        f"  failed        {report.failed}",
    ]
    lines += [f"    {error}: {number}" for error, number in report.errors.most_common()]
    if outcome.behind_flush:
        lines.append(f"  slow disk     {outcome.behind_flush} failed while Redis waited for its disk")
    lines += [
        "  latency from the intended send time, ms:"
        f" p50 {latency.p50:.2f}  p90 {latency.p90:.2f}  p99 {latency.p99:.2f}"
        f"  p99.9 {latency.p999:.2f}  max {latency.max:.2f}",
        f"  connections   {report.connections_opened} opened,"
        f" {report.connections_closed_by_service} closed by the service",
        f"  generator     {report.cpu_share:.0%} of a core, late by p50 {lag.p50:.2f}"
        f" p99 {lag.p99:.2f} max {lag.max:.2f} ms",
    ]
    if lag.p99 > LATE_GENERATOR_MS or report.cpu_share > BUSY_GENERATOR:
        lines.append("  NOTE: the generator did not keep its pace; part of the latency is its own.")
    if verdict is None:
        lines.append(f"  canvas        {outcome.note}")
    else:
        lines.append(
            f"  canvas        {len(verdict.lost)} lost, {len(verdict.wrong)} wrong;"
            f" of {verdict.fates[Fate.UNKNOWN]} without a clear answer"
            f" {verdict.unknown_written} are written"
        )
        lines += [f"    lost: {fault}" for fault in verdict.lost[:10]]
        lines += [f"    wrong: {fault}" for fault in verdict.wrong[:10]]
    if outcome.writers is not None:
        lines += _describe_writers(outcome.writers)
    return "\n".join(lines)


def _describe_writers(verdict: WritersVerdict) -> list[str]:
    return [
        f"  writers       {verdict.writers}: {verdict.sent} writes sent, {verdict.acknowledged}"
        f" acknowledged, {verdict.reads} reads; {verdict.failed.total()} requests failed;"
        f" {len(verdict.undone)} undone, {len(verdict.wrong)} wrong",
        *(f"    {error}: {number}" for error, number in verdict.failed.most_common()),
        *(f"    undone: {fault}" for fault in verdict.undone[:10]),
        *(f"    wrong: {fault}" for fault in verdict.wrong[:10]),
    ]


def as_json(options: argparse.Namespace, outcome: Outcome) -> dict[str, Any]:
    return {
        "url": options.target.url,
        **outcome.report.as_json(),
        "behind_flush": outcome.behind_flush,
        "canvas": outcome.verdict.as_json() if outcome.verdict is not None else None,
        "writers": outcome.writers.as_json() if outcome.writers is not None else None,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        outcome = asyncio.run(load(options))
    except (ImpossibleError, UnreadableError, FleetError) as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 2
    print(describe(outcome))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(options, outcome), indent=1) + "\n")
    if outcome.unreadable:
        return 2
    verdicts = (outcome.verdict, outcome.writers)
    faulty = any(verdict is not None and not verdict.clean for verdict in verdicts)
    failed = outcome.report.failed - outcome.behind_flush
    if outcome.writers is not None:
        failed += outcome.writers.failed.total()
    return int(faulty or not outcome.report.acknowledged or (options.strict and failed > 0))


if __name__ == "__main__":
    sys.exit(main())
