"""Compares implementations of POST /pixel on this machine: requests, latency, CPU, memory.

    python -m bench.compare                # all variants, about 14 minutes
    python -m bench.compare --quick        # one short round, to test the bench itself

Every round starts every variant with its own Redis and Nginx on the same processors; the load runs on
another processor. bench/README.md explains the output.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bench.compare import contract, machine, tables
from bench.compare.plan import VIEWERS, Job, Step, jobs
from bench.compare.processes import StartError
from bench.compare.results import GROUPS, Key, Results, Sample
from bench.compare.variants import MODULES, VARIANTS, Place, Stack, Variant, running
from bench.compare.wrk import Load, LoadError, run_wrk
from bench.load.http1 import Target
from bench.load.ledger import Ledger
from bench.load.openloop import Plan, run
from bench.load.options import ImpossibleError, allow_files
from bench.load.readback import read_canvas
from bench.load.viewers import run as run_watching
from bench.load.viewers import watch

OUTPUT = Path(__file__).parents[1] / "out" / "bench.json"
TOOLS = {"nginx": "nginx", "redis-server": "redis-server", "wrk": "wrk", "taskset": "util-linux"}
LUA_FILES = {
    MODULES / "ngx_http_lua_module.so": "libnginx-mod-http-lua",
    Path("/usr/share/lua/5.1/cjson/util.lua"): "lua-cjson",
}
NCHAN = {MODULES / "ngx_nchan_module.so": "libnginx-mod-nchan"}
WARM_UP = Step("warm-up", "write", 16, 1)
VIEWED_RATE = 100  # changes a second that viewers see
VIEWED_TOGETHER = 10  # changes in a message of a peer to which messages are published
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELD = Plan(rate=500, seconds=10, connections=2000)


def processors(text: str) -> frozenset[int]:
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,1") from None


def variants(text: str) -> set[str]:
    names = set(text.split(","))
    if unknown := names - set(VARIANTS):
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(sorted(unknown))}; the variants are {', '.join(VARIANTS)}"
        )
    return names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    own = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description="Compares ways to serve POST /pixel."
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="number of rounds (default 5)")
    add("--seconds", type=int, default=4, help="of a step of the main comparison (4)")
    add("--quick", action="store_true", help="one round of one second each")
    add("--only", type=variants, default=set(VARIANTS), metavar="NAME,…")
    add("--service-cpus", type=processors, default=frozenset(own[:1]), metavar="0,…")
    add("--load-cpus", type=processors, default=frozenset(own[-1:]), metavar="1,…")
    add("--data-dir", type=Path, default=Path("/var/tmp"), help="default /var/tmp")
    add("--json", type=Path, default=OUTPUT, metavar="FILE", help="default bench/out/bench.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    if unavailable := (options.service_cpus | options.load_cpus) - set(own):
        parser.error(f"processor {min(unavailable)} is not available: {own}")
    if options.quick:
        options.rounds, options.seconds = 1, 1
    return options


def check_tools(only: set[str]) -> None:
    """Raises ImpossibleError with all missing programs and the packages to install."""
    packages = {"gunicorn", "uvicorn_worker", "uvloop", "httptools", "fastapi", "redis"}
    packages |= {"pixel"} if any(name.startswith("ours") for name in only) else set()
    if absent := {name for name in packages if importlib.util.find_spec(name) is None}:
        raise ImpossibleError(
            f"{sys.executable} has no {', '.join(sorted(absent))}:"
            " use the Python of an environment in which the app is installed"
        )
    os.environ["PATH"] += ":/usr/sbin"  # where Debian installs nginx
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if only & {"nginx_lua", "nginx_lua_bare"}:
        missing |= {package for file, package in LUA_FILES.items() if not file.exists()}
    if "nchan" in only:
        missing |= {package for file, package in NCHAN.items() if not file.exists()}
    if missing:
        raise ImpossibleError(
            f"not installed here: {', '.join(sorted(missing))}"
            f" (sudo apt-get install --no-install-recommends {' '.join(sorted(missing))})"
        )


class Progress:
    """Shows the current measurement and the time left."""

    def __init__(self, planned_seconds: float) -> None:
        self._left = planned_seconds
        self._live = sys.stderr.isatty()

    def say(self, text: str) -> None:
        line = f"{text}; about {self._left / 60:.0f} min left"
        if self._live:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def spent(self, seconds: float) -> None:
        self._left = max(0.0, self._left - seconds)

    def done(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def rotated(planned: list[Job], by: int) -> list[Job]:
    """Returns the jobs rotated, so that each round starts with another one."""
    first = by * len(planned) // 3 % max(len(planned), 1)
    return planned[first:] + planned[:first]


class Bench:
    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.results = Results()
        self.held: dict[str, Any] | None = None
        self._service: frozenset[int] = options.service_cpus
        self._load: frozenset[int] = options.load_cpus
        self._everything = frozenset(os.sched_getaffinity(0))
        self._directory = directory
        self._rounds: int = options.rounds
        self._jobs = jobs(options.only, options.seconds, options.quick)
        self._holds = "ours_unix" in options.only
        total = sum(job.seconds for job in self._jobs) * self._rounds
        self._progress = Progress(total + HELD.seconds * self._holds)

    def run(self) -> None:
        os.sched_setaffinity(0, self._load)
        try:
            for number in range(1, self._rounds + 1):
                for job in rotated(self._jobs, number - 1):
                    self._progress.say(f"round {number} of {self._rounds}: {job}")
                    self._do(number, job)
                    self._progress.spent(job.seconds)
            if self._holds:
                self._progress.say(f"{HELD.connections} connections")
                self.held = self._hold()
        finally:
            self._progress.done()

    @contextmanager
    def _stack(self, job: Job) -> Iterator[Stack]:
        spread = self._everything - self._load or self._everything
        if len(self._everything) < 3:
            spread = self._everything  # two workers need two processors
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        place = Place(directory / "run", spread if job.spread else self._service, job.fsync, job.workers)
        try:
            with running(VARIANTS[job.variant], place) as stack:
                contract.check(VARIANTS[job.variant], stack)
                yield stack
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _do(self, number: int, job: Job) -> None:
        with self._stack(job) as stack:
            variant = VARIANTS[job.variant]
            if "write" in variant.workloads:
                self._measure(variant, stack, WARM_UP)
            for step in job.steps:
                key = Key(job.variant, job.fsync, step.connections, step.workload)
                self.results.add(number, key, self._measure(variant, stack, step))

    def _measure(self, variant: Variant, stack: Stack, step: Step) -> Sample:
        own = os.times()
        interference = machine.Interference()
        before = {name: program.cpu_seconds() for name, program in stack.programs.items()}
        if step.workload == "viewers":
            load = run_viewers(stack.port, step.connections, step.seconds, variant.publish)
        else:
            load = run_wrk(stack.port, step.script, step.connections, step.seconds, self._load, stack.token)
        spent = {name: program.cpu_seconds() - before[name] for name, program in stack.programs.items()}
        now = os.times()
        load_cpu = sum(now[:4]) - sum(own[:4])
        if not load.requests:
            raise LoadError(f"no request of {step} was answered")
        cpu = {name: spent.get(name, 0.0) * 10_000 / load.requests for name in GROUPS}
        cpu["total"] = sum(spent.values()) * 10_000 / load.requests
        serving = stack.programs.get("app") or stack.programs["nginx"]
        memory = serving.memory()
        return Sample(
            rps=load.requests / load.seconds,
            p50_ms=load.p50_ms,
            p99_ms=load.p99_ms,
            cpu=cpu,
            rss_mb=max(worker.rss for worker in memory),
            pss_mb=max(worker.pss for worker in memory),
            errors=load.errors,
            interference=interference.share(sum(spent.values()) + load_cpu),
        )

    def _hold(self) -> dict[str, Any]:
        """Measures many connections with few requests each, like those of browsers."""
        with self._stack(Job("ours_unix", "always", ())) as stack:
            return asyncio.run(self._hold_connections(f"http://127.0.0.1:{stack.port}"))

    async def _hold_connections(self, url: str) -> dict[str, Any]:
        target = Target.parse(url)
        ledger = Ledger()
        cells = ledger.cells(range(HELD.total))
        ledger = Ledger(before=await read_canvas(target, ledger.width, ledger.height, cells))
        held = await run(target, HELD, ledger)
        verdict = ledger.check(await read_canvas(target, ledger.width, ledger.height, cells))
        seen = held.as_json()
        del seen["timeline"]
        return {**seen, "canvas": verdict.as_json()}


def run_viewers(port: int, viewers: int, seconds: float, publish: str) -> Load:
    """Holds streams open while changes are made, or published; counts messages as requests."""
    together = VIEWED_TOGETHER if publish else 1
    target = Target.parse(f"http://127.0.0.1:{port}")
    report = run_watching(watch(target, viewers, VIEWED_RATE, seconds, publish=publish, changes=together))
    faults = report.refused + report.lost + report.failed_writes + (not report.all_heard)
    return Load(report.messages, report.seconds, report.late.p50, report.late.p99, faults, 0)


def describe_held(held: dict[str, Any]) -> str:
    canvas = held["canvas"]
    return (
        f"{held['connections']} connections at {held['rate']:g} requests/s for"
        f" {held['seconds']:g} s: {held['failed']} failed,"
        f" {held['connections_closed_by_service']} connections closed,"
        f" {canvas['lost']} writes lost, {canvas['wrong']} wrong, p99"
        f" {held['latency_ms']['p99']} ms from the intended send time"
    )


def as_json(options: argparse.Namespace, bench: Bench, described: dict[str, Any]) -> dict[str, Any]:
    results = bench.results
    return {
        "machine": {
            **described,
            "service_processors": sorted(options.service_cpus),
            "load_processors": sorted(options.load_cpus),
            "rounds": options.rounds,
            "seconds": options.seconds,
            "quick": options.quick,
        },
        "results": results.as_json(),
        "ratios": [ratio.as_json() for ratio in results.ratios()],
        "bars": [bar.as_json() for bar in results.bars()],
        "concurrency": bench.held,
    }


def interrupt(number: int, frame: FrameType | None) -> None:
    """Stops the comparison; later signals are ignored while its programs are stopped."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def compare(options: argparse.Namespace) -> int:
    check_tools(options.only)
    allow_files(2 * VIEWERS)  # what is started inherits it
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pixel-bench-", dir=options.data_dir) as name:
        described = machine.describe(Path(name))
        bench = Bench(options, Path(name))
        bench.run()
    results = bench.results
    described["minutes"] = round((time.monotonic() - began) / 60, 1)
    others = [results.figure(key, "interference").median for key in results.measured()]
    parts = [tables.table(results), tables.ratios(results), tables.bars(results)]
    parts = [part for part in parts if part]
    if bench.held is not None:
        parts.append(describe_held(bench.held))
    parts.append(
        f"{options.rounds} rounds in {described['minutes']} minutes on {described['processors']}"
        f" processors ({described['processor']}); other programs used"
        f" {statistics.median(others):.0%} of their time (at most {max(others):.0%});"
        f" a flush takes {described['flush_ms']} ms on {described['data_filesystem']}."
    )
    print("\n\n".join(parts))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(as_json(options, bench, described), indent=1) + "\n")
    print(f"\nWritten to {options.json}")
    errors = sum(results.errors(key) for key in results.measured())
    if errors:
        print(f"bench.compare: {errors} requests failed: the figures are not valid.")
    return int(bool(errors))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    for number in ENDING:
        signal.signal(number, interrupt)
    try:
        return compare(options)
    except (ImpossibleError, StartError, LoadError, OSError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.compare: interrupted; all started programs are stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
