"""Attacks: the effect of one client on other clients, and on the app's workers.

    python -m bench.attack                                   # the local fleet, about half an hour
    python -m bench.attack --quick                           # some attacks, for a few seconds each
    python -m bench.attack --url http://127.0.0.1:8000 --master 4711     # one instance, by Gunicorn's PID

One client makes the attacks one at a time, slightly below the balancer's default limits. A second
client sends ten `POST /pixel` per second. `ordinary`, the first one, is none: as many requests of a
usual kind, for comparison. Exit status: 0 success; 1 a request of the second client failed, its p99
was more than twice that without an attack and beside ordinary requests, or a worker was killed; 2 an
attack could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.attack import attacks
from bench.attack.attacks import ATTACKS, HALF_SENT, ORDINARY, QUICK, Attack
from bench.attack.workers import LocalFleet, Memory, OneInstance, Service
from bench.compare.machine import describe
from bench.drill.hosts import BALANCER, ROOT, Fleet, FleetError
from bench.load.disk import behind_a_flush
from bench.load.figures import Spread
from bench.load.http1 import Target
from bench.load.ledger import Ledger
from bench.load.openloop import Plan, Report, Sample, run
from bench.load.options import ImpossibleError, allow_files, count, named, positive

CANVAS = (1024, 1024)
RATE = 10.0
CONNECTIONS = 32
TIMEOUT = 10.0
SECONDS, QUICK_SECONDS = 20.0, 3.0
AFTER, QUICK_AFTER = 60.0, 1.0
PREPARING = 0.25  # duration as a share of the attack's, at least 2 s
SETTLE = 2.0  # seconds between an attack's preparation and the first measurement
SAMPLING = 2.0  # seconds between two samples of the workers' memory
FACTOR = 2.0
LEAST = 0.05
OUTPUT = ROOT / "bench" / "out" / "attack.json"


@dataclass
class Result:
    """The effect of an attack on the second client and the workers.

    Attributes:
        failed: failed requests of the second client, except those that waited for a slow disk.
        memory: bytes of the largest worker before, during and after the attack.
        beside: p99 in ms of the second client beside ordinary requests; 0 if that was not measured.
    """

    attack: Attack
    answers: Counter[str]
    before: Report
    during: Report
    failed: Counter[str]
    memory: tuple[int, int, int]
    killed: int
    beside: float = 0

    def faults(self, least: float) -> list[str]:
        """Returns the violated bounds; a p99 below `least` seconds is always accepted."""
        limit = max(FACTOR * self.before.latency.p99, FACTOR * self.beside, 1000 * least)
        found = []
        if not self.attack.reaches & self.answers.keys():
            found.append(f"the attack was answered {dict(self.answers)} only")
        if self.failed:
            found.append(f"failed: {dict(self.failed)}")
        if self.during.latency.p99 > limit:
            found.append(f"p99 {self.during.latency.p99:.0f} ms; the limit is {limit:.0f} ms")
        if self.killed:
            found.append(f"{self.killed} workers are gone")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "attack": self.attack.name,
            "answers": dict(self.answers),
            "sent": self.during.sent,
            "failed": dict(self.failed),
            "before_ms": self.before.latency.as_json(),
            "during_ms": self.during.latency.as_json(),
            "memory_mb": [round(size / 1e6) for size in self.memory],
            "killed": self.killed,
        }


class Bench:
    """Runs attacks; measures the second client's requests and the workers' memory."""

    def __init__(self, url: str, service: Service, options: argparse.Namespace) -> None:
        self._url = url
        self._target = Target.parse(url, insecure=True)
        self._service = service
        self._options = options

    async def make(self, attack: Attack) -> Result:
        seconds = self._options.seconds
        loop = asyncio.get_running_loop()
        # Its own process, of the lowest priority: a client elsewhere takes no processor time from the hosts.
        with ProcessPoolExecutor(1, get_context("spawn"), os.nice, (19,)) as pool:
            await loop.run_in_executor(
                pool,
                attacks.prepare,
                attack.name,
                self._url,
                max(2.0, PREPARING * seconds),
                self._options.source,
            )
            await asyncio.sleep(SETTLE)
            first = await self._service.memory()
            before = await self._write(seconds)
            attacking = loop.run_in_executor(pool, attacks.attack, attack.name, seconds + 1)
            seen: list[Memory] = []
            watching = asyncio.create_task(self._watch(seen))
            failures: list[Sample] = []
            during = await self._write(seconds, failures)
            answers = await attacking
            watching.cancel()
        await asyncio.sleep(self._options.after)
        last = await self._service.memory()
        sizes = [size for memory in seen for size in memory.values()]
        flushes = await self._service.slow_flushes() if failures else ()
        failed = Counter(each.error or "" for each in failures if not behind_a_flush(each, flushes))
        memory = (max(first.values()), max(sizes, default=0), max(last.values()))
        return Result(attack, answers, before, during, failed, memory, len(first.keys() - last.keys()))

    async def _write(self, seconds: float, failures: list[Sample] | None = None) -> Report:
        def watch(sample: Sample) -> None:
            if failures is not None and sample.error is not None:
                failures.append(sample)

        return await run(
            self._target, Plan(RATE, seconds, CONNECTIONS, TIMEOUT), Ledger(*CANVAS), watch=watch
        )

    async def _watch(self, most: list[Memory]) -> None:
        while True:
            most.append(await self._service.memory())
            await asyncio.sleep(SAMPLING)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attack",
        description="Attacks the local fleet, and measures what a second client notices.",
        epilog=f"Attacks: {', '.join(attack.name for attack in ATTACKS)}.",
    )
    add = parser.add_argument
    add("--attacks", metavar="A,B", help="only these attacks, in this order")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)}: {QUICK_SECONDS:g} s each")
    add("--url", help="default: the balancer of the local fleet; loopback and this fleet only")
    add("--master", type=count, metavar="PID", help="of the Gunicorn at --url, if it isn't the fleet")
    add("--source", default="", metavar="ADDRESS", help="of this machine, from which the attacker connects")
    add("--seconds", type=positive, help=f"of each attack (default {SECONDS:g})")
    add("--after", type=positive, help=f"seconds until memory is looked at again (default {AFTER:g})")
    add("--least", type=positive, default=LEAST, help=f"a p99 that is always allowed (default {LEAST} s)")
    add("--json", type=Path, default=OUTPUT, metavar="FILE", help="default bench/out/attack.json")
    options = parser.parse_args(arguments)
    known = {attack.name: attack for attack in ATTACKS}
    names = options.attacks or (",".join(QUICK) if options.quick else None)
    options.chosen = bool(options.attacks)
    options.attacks = named(parser, "attack", known, names)
    if bool(options.master) and not options.url:
        parser.error("--master needs --url")
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    options.after = options.after or (QUICK_AFTER if options.quick else AFTER)
    return options


def must_be_ours(url: str, ours: Sequence[str]) -> None:
    """Raises ImpossibleError unless the URL's address is loopback or one of the local fleet."""
    host = Target.parse(url).host
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and host not in ours:
        raise ImpossibleError(f"{host} is neither a loopback address nor the local fleet's")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


async def attack_all(options: argparse.Namespace, results: list[Result]) -> None:
    """Makes the attacks that are possible on the target; adds to `results` after each."""
    service: Service
    ours: tuple[str, ...] = ()
    if options.master:
        service, url = OneInstance(options.master), options.url
    else:
        fleet = Fleet.load()
        # Docker's published port hides the client's address.
        own = f"http://{fleet.addresses[BALANCER]}" if options.source else fleet.url
        service, ours, url = LocalFleet(fleet), tuple(fleet.addresses.values()), options.url or own
    must_be_ours(url, ours)
    bench = Bench(url, service, options)
    beside = 0.0
    for attack in options.attacks:
        missing = "TLS" if attack.tls and not url.startswith("https:") else ""
        missing = missing or ("a balancer" if attack.balancer and options.master else "")
        if missing:
            if options.chosen:
                raise ImpossibleError(f"{attack.name} needs {missing}")
            say(f"{attack.name}: left out, as it needs {missing}")
            continue
        result = await bench.make(attack)
        if attack.name == ORDINARY:
            beside = result.during.latency.p99
        result.beside = beside
        results.append(result)
        say(line(result))
        for fault in result.faults(options.least):
            say(f"  FAULT {fault}")


def line(result: Result) -> str:
    answers = ", ".join(f"{count} x {answer}" for answer, count in result.answers.most_common())
    return (
        f"{result.attack.name}: failed {result.failed.total()} of {result.during.sent}, p50/p99/max"
        f" {marks(result.before.latency)} then {marks(result.during.latency)} ms, memory"
        f" {'/'.join(f'{size / 1e6:.0f}' for size in result.memory)} MB, killed {result.killed};"
        f" answers to the attack: {answers}"
    )


def marks(latency: Spread) -> str:
    return f"{latency.p50:.0f}/{latency.p99:.0f}/{latency.max:.0f}"


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| attack | sent | failed | before: p50/p99/max (ms) | during | memory of the largest worker:"
        " before/during/after (MB) | workers killed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.attack.name} | {each.during.sent} | {each.failed.total()} | {marks(each.before.latency)}"
        f" | {marks(each.during.latency)} | {'/'.join(f'{size / 1e6:.0f}' for size in each.memory)}"
        f" | {each.killed} |"
        for each in results
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    results: list[Result] = []
    try:
        allow_files(HALF_SENT + CONNECTIONS)
        asyncio.run(attack_all(options, results))
    except (FleetError, ImpossibleError, OSError, ValueError) as error:
        print(f"bench.attack: {error}", file=sys.stderr)
        return 2
    print(table(results))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": describe(options.json.parent),
        "results": [result.as_json() for result in results],
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(result.faults(options.least) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
