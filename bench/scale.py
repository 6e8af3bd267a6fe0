"""What a second worker, or a second host, adds: writes a second through the local balancer.

    python bench/scale.py          # on the fleet that `make up` has made; needs wrk

The app of each host is given `--cpus` processors for each of its workers, so that it is the
app that is full, and neither this machine nor the load. In each round each size of fleet is loaded
in turn by 64 connections in a closed loop, and ratios are taken within a round. The controller
rests meanwhile: hosts so full are late with their `/readyz`. Afterwards the fleet is as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import NamedTuple

from figures import Figure, paired_ratio
from hosts import BALANCER, OTHER, ROOT, Fleet, FleetError
from http1 import BadAnswerError
from load import count, positive
from wrk import LoadError, run_wrk

CONNECTIONS = 64
WARM_UP = 1.0
OUTPUT = ROOT / "bench" / "out" / "scale.json"
PERIOD = 10_000  # microseconds in which the kernel gives out a quota


class Size(NamedTuple):
    hosts: int
    workers: int

    def __str__(self) -> str:
        return f"{self.hosts} x {self.workers}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cpus", type=positive, default=0.15, help="processors for each worker (default 0.15)")
    add("--workers", type=count, default=2, help="on a host, at most (default 2)")
    add("--rounds", type=count, default=5, help="default 5")
    add("--seconds", type=positive, default=5.0, help="of load in each (default 5)")
    add("--json", type=Path, default=OUTPUT, help="default bench/out/scale.json")
    return parser.parse_args(arguments)


async def have(fleet: Fleet, size: Size, cpus: float) -> None:
    """Makes the fleet so large: hosts that take requests, and workers that each has."""
    for host in (BALANCER, OTHER):
        await fleet.ssh(
            host,
            f"systemctl set-property --runtime pixel.service CPUQuota={cpus * size.workers:.0%}"
            f" CPUQuotaPeriodSec={PERIOD}us",
        )
    await fleet.ssh(
        BALANCER, f"pixel-lb {'undrain' if size.hosts == 2 else 'drain'} {OTHER} || true"
    )


async def rates(fleet: Fleet, options: argparse.Namespace) -> dict[Size, list[float]]:
    """Requests a second of each round, by size."""
    port = int(fleet.url.rpartition(":")[2])
    seen: dict[Size, list[float]] = {}
    try:
        for workers in range(1, options.workers + 1):
            await fleet.must_play("pixel_app.yml", pixel_app_workers=workers)
            await fleet.ssh(BALANCER, "systemctl stop pixel-lb")
            for number in range(options.rounds):
                for hosts in (1, 2):
                    size = Size(hosts, workers)
                    await have(fleet, size, options.cpus)
                    await asyncio.to_thread(run_wrk, port, "write", CONNECTIONS, WARM_UP, {0, 1})
                    load = await asyncio.to_thread(
                        run_wrk, port, "write", CONNECTIONS, options.seconds, {0, 1}
                    )
                    if load.errors:
                        raise FleetError(f"{size}: {load.errors} requests failed")
                    seen.setdefault(size, []).append(load.requests / load.seconds)
                    print(f"round {number + 1}, {size}: {seen[size][-1]:.0f}/s", file=sys.stderr)
    finally:
        for host in (BALANCER, OTHER):
            await fleet.ssh(host, "systemctl revert pixel.service")
        await fleet.ssh(BALANCER, "systemctl start pixel-lb")
        await fleet.heal()
        await fleet.must_play("pixel_app.yml")
    return seen


def describe(seen: dict[Size, list[float]]) -> str:
    lines = ["hosts x workers   writes/s                    beside 1 x 1"]
    for size, found in sorted(seen.items()):
        figure, ratio = Figure.of(found), paired_ratio(found, seen[Size(1, 1)])
        lines.append(
            f"{size!s:<16}  {figure.median:.0f} ({figure.min:.0f}-{figure.max:.0f})"
            f"   {ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        seen = asyncio.run(rates(Fleet.load(), options))
    except (FleetError, LoadError, BadAnswerError, OSError) as error:
        print(f"scale.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(describe(seen))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = {str(size): [round(rate) for rate in rates] for size, rates in seen.items()}
    options.json.write_text(json.dumps({"cpus": options.cpus, "writes_per_second": found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
