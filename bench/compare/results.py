"""Samples of all rounds, and their figures, ratios and limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.compare.plan import MAIN_CONNECTIONS
from bench.load.figures import Figure, paired_ratio

GROUPS = ("app", "nginx", "redis", "total")
RATIO_FIGURES = ("cpu_total", "cpu_app", "p99_ms", "rps")
PAIRS = [
    ("ours_tcp", "usual"),
    ("ours_unix", "usual"),
    ("ours_tcp", "nginx_lua"),
    ("ours_unix", "nginx_lua"),
    ("ours_tcp", "nginx_lua_bare"),
    ("ours_unix", "nginx_lua_bare"),
    ("ours_unix", "nchan"),
    ("ours_unix", "ours_tcp"),
    ("ours_keys", "ours_unix"),
    ("ours_budgets", "ours_unix"),
    ("ours_direct", "floor_asgi"),
    ("ours_tcp", "literal"),
    ("ours_unix", "literal"),
    ("usual", "literal"),
    ("nginx_lua", "floor_nginx"),
]


class Key(NamedTuple):
    """The setting of a measurement."""

    variant: str
    fsync: str
    connections: int
    workload: str = "write"


class Sample(NamedTuple):
    """One run of wrk, or of viewers, against one stack in one round."""

    rps: float
    p50_ms: float
    p99_ms: float
    cpu: dict[str, float]  # by group, in seconds per 10,000 requests, or messages to viewers
    rss_mb: float
    pss_mb: float
    errors: int
    interference: float

    def figure(self, name: str) -> float:
        if name.startswith("cpu_"):
            return self.cpu[name.removeprefix("cpu_")]
        return float(getattr(self, name))


class Ratio(NamedTuple):
    """A figure of one variant divided by another's; `fsync` is `a/b` if they differ."""

    a: str
    b: str
    figure: str
    fsync: str
    connections: int
    workload: str
    of: Figure

    def as_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "figure": self.figure,
            "fsync": self.fsync,
            "connections": self.connections,
            "workload": self.workload,
            **self.of.as_json(),
        }


class Bar(NamedTuple):
    """The limit of a ratio or a figure."""

    what: str
    limit: float
    of: Figure

    @property
    def met(self) -> bool:
        return self.of.median <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {"bar": self.what, "limit": self.limit, "met": self.met, **self.of.as_json()}


class Results:
    def __init__(self) -> None:
        self._rounds: defaultdict[Key, dict[int, Sample]] = defaultdict(dict)

    def add(self, number: int, key: Key, sample: Sample) -> None:
        self._rounds[key][number] = sample

    def measured(self) -> list[Key]:
        return list(self._rounds)

    def rounds(self, key: Key) -> int:
        return len(self._rounds[key])

    def figure(self, key: Key, name: str) -> Figure:
        return Figure.of(sample.figure(name) for sample in self._rounds[key].values())

    def errors(self, key: Key) -> int:
        return sum(sample.errors for sample in self._rounds[key].values())

    def ratio(self, a: Key, b: Key, name: str) -> Figure | None:
        """Returns the ratio over the rounds in which both were measured; None if there are none."""
        ours, theirs = self._rounds.get(a, {}), self._rounds.get(b, {})
        both = [number for number in ours if number in theirs]
        numerators = [ours[number].figure(name) for number in both]
        denominators = [theirs[number].figure(name) for number in both]
        if not both or not all(denominators):
            return None
        return paired_ratio(numerators, denominators)

    def ratios(self) -> Iterator[Ratio]:
        for key in self.measured():
            for a, b in PAIRS:
                if key.variant != a:
                    continue
                for other in (key._replace(variant=b), key._replace(variant=b, fsync="none")):
                    yield from self._all_figures(key, other, key.fsync)
            if key.fsync == "always":
                lazier = key._replace(fsync="everysec")
                yield from self._all_figures(key, lazier, "always/everysec")
            former = {"scaling_2w": "scaling_1w", "browser": "write"}.get(key.workload)
            if former is not None:
                yield from self._all_figures(key, key._replace(workload=former), key.fsync)

    def _all_figures(self, a: Key, b: Key, fsync: str) -> Iterator[Ratio]:
        for name in RATIO_FIGURES:
            of = self.ratio(a, b, name)
            if of is not None:
                workload = a.workload if a.workload == b.workload else f"{a.workload}/{b.workload}"
                yield Ratio(a.variant, b.variant, name, fsync, a.connections, workload, of)

    def bars(self) -> Iterator[Bar]:
        """Yields the project's limits, at 64 connections with `appendfsync always`."""

        def at(variant: str, fsync: str = "always") -> Key:
            return Key(variant, fsync, MAIN_CONNECTIONS)

        for ours in ("ours_tcp", "ours_unix"):
            promises = [
                ("usual", "cpu_total", 1 / 5),
                ("usual", "p99_ms", 1 / 5),
                ("nginx_lua", "cpu_total", 1.5),
            ]
            for other, name, limit in promises:
                of = self.ratio(at(ours), at(other), name)
                if of is not None:
                    yield Bar(f"{ours} / {other}, {name}", limit, of)
            of = self.ratio(at(ours), at(ours, "everysec"), "cpu_total")
            if of is not None:
                yield Bar(f"{ours} always / everysec, cpu_total", 1.15, of)
        of = self.ratio(at("ours_keys"), at("ours_unix"), "cpu_total")
        if of is not None:
            yield Bar("ours_keys / ours_unix, cpu_total", 1.1, of)
        of = self.ratio(at("ours_unix")._replace(workload="browser"), at("ours_unix"), "cpu_total")
        if of is not None:
            yield Bar("ours_unix, a browser's headers / without", 1.15, of)
        mix = at("ours_unix")._replace(workload="mix90")
        of = self.ratio(mix, mix._replace(variant="nginx_lua"), "cpu_total")
        if of is not None:
            yield Bar("ours_unix / nginx_lua, nine reads per write, cpu_total", 2, of)
        of = self.ratio(at("ours_direct"), at("floor_asgi", "none"), "cpu_total")
        if of is not None:
            yield Bar("ours_direct / floor_asgi, cpu_total", 1.6, of)
        if at("ours_unix") in self._rounds:
            yield Bar("ours_unix, RSS of a worker in MB", 70, self.figure(at("ours_unix"), "rss_mb"))

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                **key._asdict(),
                "rounds": self.rounds(key),
                **{
                    name: self.figure(key, name).as_json()
                    for name in ("rps", "p50_ms", "p99_ms", "rss_mb", "pss_mb", "interference")
                },
                "cpu_s_per_10k": {group: self.figure(key, f"cpu_{group}").as_json() for group in GROUPS},
                "errors": self.errors(key),
            }
            for key in self.measured()
        ]
