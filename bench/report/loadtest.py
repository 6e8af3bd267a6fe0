"""Measures a target: requests one at a time and 50 at a time, a staircase and a spike.

    python -m bench.report.loadtest --url http://127.0.0.1:8080/cluster/c5 --target c5 --out DIR

A target is a part of the fleet with its own URL, or the whole fleet. Results are added to `load.json`
in the directory; playbooks/loadtest.yml runs this for each target and stage, and `loadreport.py`
draws the results. Exit status: 0, or 2 if the target can't be reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.load.figures import Spread
from bench.load.http1 import Client, Target
from bench.load.ledger import Ledger
from bench.load.openloop import Plan, Report, Sample, body_of, run
from bench.load.readback import UNREACHABLE

STAGES = ("requests", "staircase", "spike")
REQUESTS = 1000
FIRST_RATE, GROWTH, STEPS = 100, 1.5, 12
STEP_SECONDS = 5.0
CONNECTIONS = 128
TIMEOUT = 5.0
CANVAS = 1024
# The knee is the last step that was sustained: within these limits.
FEW_FAILED, SLOW_MS = 0.01, 250.0
LATE_MS, BUSY = 50.0, 0.85  # of this program itself
SPIKE_SECONDS, SPIKE_FROM, SPIKE_TO = 16.0, 5.0, 8.0


def seconds_of(samples: Sequence[Sample], began: float, offset: float) -> list[dict[str, Any]]:
    """Returns a row for each second; `offset` converts the samples' clock to the time of day."""
    rows: defaultdict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        rows[int(sample.due + offset - began)].append(sample)
    return [
        {
            "time": round(began + number, 3),
            "due": len(rows[number]),
            "failed": sum(sample.error is not None for sample in rows[number]),
            "latency_ms": Spread.of_seconds(
                sample.seconds for sample in rows[number] if sample.error is None
            ).as_json(),
            "instances": Counter(s.instance for s in rows[number] if s.error is None),
        }
        for number in sorted(rows)
    ]


def stage_of(
    kind: str, samples: Sequence[Sample], began: float, seconds: float, **others: Any
) -> dict[str, Any]:
    """Returns a stage for the file; times are Unix times, latencies count from the due time."""
    done = [sample for sample in samples if sample.error is None]
    offset = time.time() - time.monotonic()
    last = max((sample.due + sample.seconds for sample in done), default=0.0)
    first = min((sample.due for sample in samples), default=last)
    return {
        "kind": kind,
        "began": round(began, 3),
        "seconds": round(seconds, 3),
        "answered_within": round(max(0.0, last - first), 3),
        "sent": len(samples),
        "acknowledged": len(done),
        "errors": Counter(sample.error for sample in samples if sample.error is not None),
        "latency_ms": Spread.of_seconds(sample.seconds for sample in done).as_json(),
        "instances": Counter(sample.instance for sample in done),
        "timeline": seconds_of(samples, began, offset),
        **others,
    }


def throughput(stage: dict[str, Any]) -> float:
    """Returns acknowledged writes per second until the last answer, whose time old files lack."""
    within: float = max(stage["seconds"], stage.get("answered_within", 0.0))
    return float(stage["acknowledged"] / within)


class ClosedLoop:
    """Sends a number of writes over concurrent connections; each waits for its answer."""

    def __init__(self, target: Target, requests: int, at_once: int) -> None:
        self._target = target
        self._left = requests
        self._at_once = at_once
        self._ledger = Ledger(CANVAS, CANVAS)
        self.samples: list[Sample] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._at_once):
                group.create_task(self._lane())

    async def _lane(self) -> None:
        with closing(Client(self._target, TIMEOUT)) as client:
            while self._left > 0:
                self._left -= 1
                body = body_of(self._ledger.write(self._ledger.open()))
                due = time.monotonic()
                error: str | None = None
                instance = ""
                try:
                    answer = await client.request("POST", "/pixel", body)
                    instance = answer.instance
                    if answer.status != 200:
                        error = f"status {answer.status}"
                except UNREACHABLE as reason:
                    error = str(reason) or "no answer in time"
                self.samples.append(Sample(due, time.monotonic() - due, error, instance))


async def closed(target: Target, at_once: int) -> dict[str, Any]:
    loop = ClosedLoop(target, REQUESTS, at_once)
    began, clock = time.time(), time.monotonic()
    await loop.run()
    wall = time.monotonic() - clock
    return stage_of("requests", loop.samples, began, wall, connections=at_once)


async def constant(target: Target, rate: float, seconds: float) -> dict[str, Any]:
    samples: list[Sample] = []
    plan = Plan(rate, seconds, CONNECTIONS, TIMEOUT)
    began = time.time()
    report = await run(target, plan, Ledger(CANVAS, CANVAS), watch=samples.append)
    return stage_of(
        "step", samples, report.started_at or began, seconds, rate=rate, generator=effort([report])
    )


async def spike(target: Target, calm: float, high: float) -> dict[str, Any]:
    """Sends at a constant rate, and at a higher one for some seconds."""
    samples: list[Sample] = []

    async def sending(rate: float, seconds: float) -> Report:
        plan = Plan(rate, seconds, CONNECTIONS, TIMEOUT)
        return await run(target, plan, Ledger(CANVAS, CANVAS), watch=samples.append)

    async def on_top() -> Report:
        await asyncio.sleep(SPIKE_FROM)
        return await sending(high - calm, SPIKE_TO - SPIKE_FROM)

    began = time.time()
    reports = await asyncio.gather(sending(calm, SPIKE_SECONDS), on_top())
    return stage_of("spike", samples, began, SPIKE_SECONDS, calm=calm, high=high, generator=effort(reports))


def effort(reports: Sequence[Report]) -> dict[str, float]:
    """Returns the generator's share of a processor, and its lateness."""
    return {
        # All reports are of this process, and each includes its whole CPU time.
        "cpu_share": round(max(report.cpu_share for report in reports), 3),
        "late_ms": round(max(report.lag.p99 for report in reports), 3),
    }


def verdict(step: dict[str, Any]) -> str:
    """Returns the reason why a step was not sustained; empty if it was."""
    latency = step["latency_ms"]["p99"]
    failed = step["sent"] - step["acknowledged"]
    if failed > FEW_FAILED * step["sent"]:
        [(error, _)] = Counter(step["errors"]).most_common(1)
        return f"{failed / step['sent']:.0%} failed ({error})"
    # Checked before the latency, which includes the generator's lateness.
    if step["generator"]["cpu_share"] > BUSY or step["generator"]["late_ms"] > LATE_MS:
        return "the generator can't send faster from here"
    if latency is None or latency > SLOW_MS:
        return f"p99 {latency or math.inf:.0f} ms"
    return ""


async def staircase(target: Target, first: float = FIRST_RATE) -> list[dict[str, Any]]:
    """Sends at rising rates up to the first that is not sustained."""
    steps = []
    for number in range(STEPS):
        step = await constant(target, round(first * GROWTH**number), STEP_SECONDS)
        step["verdict"] = verdict(step)
        steps.append(step)
        say(step)
        if step["verdict"]:
            break
        await asyncio.sleep(1)  # let requests of this step end before the next
    return steps


def knee(stages: Sequence[dict[str, Any]]) -> float:
    """Returns the highest sustained rate; 0 if there is none."""
    kept = [stage["rate"] for stage in stages if stage["kind"] == "step" and not stage["verdict"]]
    return max(kept, default=0.0)


def say(stage: dict[str, Any]) -> None:
    """Prints a line of progress."""
    latency = stage["latency_ms"]
    what = {
        "requests": lambda: f"{REQUESTS} requests, {stage['connections']} at once",
        "step": lambda: f"{stage['rate']:.0f}/s",
        "spike": lambda: f"{stage['calm']:.0f}/s, and {stage['high']:.0f}/s for 3 s",
    }[stage["kind"]]()
    shares = ", ".join(
        f"{name} {count / stage['acknowledged']:.0%}" for name, count in sorted(stage["instances"].items())
    )
    percentiles = " ".join(f"{name} {latency[name] or math.nan:.1f}" for name in ("p50", "p99"))
    print(
        f"{what:<28} {throughput(stage):7.0f}/s  {percentiles} ms"
        f"  failed {stage['sent'] - stage['acknowledged']}  {shares}"
        f"{'  <- ' + stage['verdict'] if stage.get('verdict') else ''}",
        flush=True,
    )


async def drive(target: Target, stage: str, before: Sequence[dict[str, Any]]) -> list[Any]:
    """Runs one stage of a target; `before` contains the earlier stages."""
    if stage == "requests":
        stages = [await closed(target, at_once) for at_once in (1, 50)]
    elif stage == "staircase":
        return await staircase(target)
    else:
        kept = knee(before) or FIRST_RATE
        stages = [await spike(target, kept / 2, kept * GROWTH)]
    for each in stages:
        say(each)
    return stages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.loadtest", description="Measures a target under load."
    )
    parser.add_argument("--url", required=True, help="root URL, e.g. http://127.0.0.1:8080")
    parser.add_argument("--target", required=True, help="name in the report")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="directory of the report")
    parser.add_argument("--insecure", action="store_true", help="accept any TLS certificate")
    options = parser.parse_args(arguments)
    try:
        target = Target.parse(options.url, insecure=options.insecure)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "load.json"
    data = json.loads(path.read_text()) if path.exists() else {"targets": {}}
    mine = data["targets"].setdefault(options.target, {"url": target.url, "stages": []})
    for stage in options.stage or STAGES:
        try:
            mine["stages"] += asyncio.run(drive(target, stage, mine["stages"]))
        except UNREACHABLE as error:
            print(f"bench.report.loadtest: cannot reach {target.url}: {error}", file=sys.stderr)
            return 2
        path.write_text(json.dumps(data) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
