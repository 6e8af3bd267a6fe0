"""The measurements of one round, and their lengths."""

from __future__ import annotations

from dataclasses import dataclass

from bench.compare.variants import VARIANTS

CONNECTIONS = (1, 16, 64, 256)
MAIN_CONNECTIONS = 64
MAIN_ONLY = {"nginx_lua_bare", "ours_keys", "ours_budgets"}
EVERYSEC = {"usual", "ours_tcp", "ours_unix"}
VIEWERS = 1000
VIEWERS_SECONDS = 8
START_AND_STOP_SECONDS = 4.0


@dataclass(frozen=True)
class Step:
    """One run of wrk, or of viewers."""

    workload: str
    script: str
    connections: int
    seconds: int


@dataclass(frozen=True)
class Job:
    """A variant that every round starts, and the steps measured on it."""

    variant: str
    fsync: str
    steps: tuple[Step, ...]
    workers: int = 1
    spread: bool = False  # may use all processors: measures scaling

    @property
    def seconds(self) -> float:
        return START_AND_STOP_SECONDS + sum(step.seconds for step in self.steps)

    def __str__(self) -> str:
        scale = f" {self.workers} workers, unpinned" if self.spread else ""
        return f"{self.variant} {self.fsync}{scale}"


def _write(connections: int, seconds: int) -> Step:
    return Step("write", "write", connections, seconds)


def jobs(only: set[str], main_seconds: int, quick: bool) -> list[Job]:
    """Returns the jobs of one round, in the order of the variants.

    The main comparison, at 64 connections, gets most of the time. Other steps are measured with
    `appendfsync always` only, and the variants of MAIN_ONLY have none. Those of EVERYSEC are also
    measured with `appendfsync everysec`.

    Args:
        only: names of the variants.
        main_seconds: length of a step of the main comparison.
        quick: measure only the main number of connections.
    """
    main = _write(MAIN_CONNECTIONS, main_seconds)
    browser = Step("browser", "browser", MAIN_CONNECTIONS, 2)
    batch, mix = Step("batch100", "batch", 16, 1), Step("mix90", "mix", MAIN_CONNECTIONS, 1)
    viewers = Step("viewers", "", VIEWERS, VIEWERS_SECONDS)
    rest = [_write(count, 1) for count in CONNECTIONS if count != MAIN_CONNECTIONS]
    planned = []
    for variant in VARIANTS.values():
        if variant.name not in only:
            continue
        steps = [main] if "write" in variant.workloads else []
        if steps and not quick and variant.name not in MAIN_ONLY:
            steps += rest
        steps += [step for step in (browser, batch, mix, viewers) if step.workload in variant.workloads]
        planned.append(Job(variant.name, "always" if variant.stores else "none", tuple(steps)))
        if variant.name in EVERYSEC:
            planned.append(Job(variant.name, "everysec", (main,)))
    if "ours_unix" in only:
        for workers in (1, 2):
            scaling = Step(f"scaling_{workers}w", "write", MAIN_CONNECTIONS, main_seconds)
            planned.append(Job("ours_unix", "always", (scaling,), workers, spread=True))
    return planned
