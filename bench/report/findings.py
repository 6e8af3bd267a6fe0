"""Findings of a load test: rates from the hosts' samples, and sentences derived from them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report.loadtest import BUSY, knee, throughput

SATURATED = 0.85  # of a host's processors
FITTING = 0.15  # relative difference between shares and the clusters' own knees
WHOLE = "all"


@dataclass(frozen=True)
class Interval:
    """A host between two samples. CPU in processors, memory in bytes, the rest per second."""

    time: float
    seconds: float
    busy: float
    steal: float
    processors: int
    memory: float
    received: float
    sent: float
    services: dict[str, float]
    redis: dict[str, float]
    nginx: dict[str, float]


def intervals(samples: Sequence[dict[str, Any]]) -> list[Interval]:
    """Returns the rates between a host's samples; a counter that was reset has rate 0."""

    def per_second(old: dict[str, float], new: dict[str, float], seconds: float) -> dict[str, float]:
        return {
            name: value if name.endswith("_gauge") else max(0.0, value - old[name]) / seconds
            for name, value in new.items()
            if name in old
        }

    found = []
    for old, new in pairwise(samples):
        seconds = new["time"] - old["time"]
        if seconds <= 0:
            continue
        cpu = per_second(old["cpu"], new["cpu"], seconds)
        net = per_second(old["network"], new["network"], seconds)
        used = {
            name: per_second(old["services"][name], service, seconds)["cpu"]
            for name, service in new["services"].items()
            if name in old["services"]
        }
        found.append(
            Interval(
                time=new["time"],
                seconds=seconds,
                busy=cpu["busy"],
                steal=cpu["steal"],
                processors=int(new["cpu"]["processors"]),
                memory=new["bytes_gauge"],
                received=net["received"],
                sent=net["sent"],
                services=used,
                redis=per_second(old["redis"], new["redis"], seconds),
                nginx=per_second(old["nginx"], new["nginx"], seconds),
            )
        )
    return found


def mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


@dataclass(frozen=True)
class Run:
    """The directory of a load test: `load.json` and `hosts/<name>.jsonl`."""

    name: str
    targets: dict[str, list[dict[str, Any]]]
    hosts: dict[str, list[Interval]]
    meta: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads a directory; raises OSError or ValueError if it contains no run."""
        data = json.loads((folder / "load.json").read_text())
        hosts = {}
        for path in sorted((folder / "hosts").glob("*.jsonl")):
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            hosts[path.stem] = intervals([json.loads(line) for line in lines])
        targets = {name: target["stages"] for name, target in data["targets"].items() if target["stages"]}
        if not targets:
            raise ValueError(f"{folder} has no results")
        meta_path = folder / "meta.json"
        meta = json.loads(meta_path.read_text()) if meta_path.exists() else {}
        return cls(folder.resolve().name, targets, hosts, meta)

    def during(self, host: str, stage: dict[str, Any]) -> list[Interval]:
        """Returns a host's intervals in a stage, without its first second."""
        first, last = stage["began"] + 1, stage["began"] + stage["seconds"]
        return [each for each in self.hosts[host] if first < each.time <= last]

    def busy(self, host: str, stage: dict[str, Any]) -> float:
        """Returns the used share of a host's processors in a stage."""
        seen = self.during(host, stage)
        return mean(each.busy / each.processors for each in seen)

    def stolen(self, host: str, stage: dict[str, Any]) -> float:
        """Returns the share of steal in a stage; 0 for containers, whose counter is the machine's."""
        if self.meta.get("shared_processors"):
            return 0.0
        return mean(each.steal / each.processors for each in self.during(host, stage))

    def load(self, host: str, stage: dict[str, Any]) -> float:
        """Returns used share plus steal: a throttled host is saturated although its use is low."""
        return self.busy(host, stage) + self.stolen(host, stage)

    def steps(self, target: str) -> list[dict[str, Any]]:
        return [stage for stage in self.targets.get(target, []) if stage["kind"] == "step"]


def shares(stages: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns each instance's share of the answers."""
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(stage["instances"])
    return {name: count / total.total() for name, count in sorted(total.items())}


def rows(run: Run) -> list[dict[str, Any]]:
    """Returns a row for each target: its knee, latencies and CPU time."""
    table = []
    for target in run.targets:
        steps = run.steps(target)
        kept = [step for step in steps if not step["verdict"]]
        half = min(kept, key=lambda step: abs(step["rate"] - knee(steps) / 2), default=None)
        top = kept[-1] if kept else None
        cpu = {host: run.busy(host, top) for host in run.hosts} if top else {}
        spent = sum(mean(each.busy for each in run.during(host, top)) for host in run.hosts if top)
        first = {s["connections"]: s for s in run.targets[target] if s["kind"] == "requests"}
        table.append(
            {
                "target": target,
                "knee": knee(steps),
                "why": steps[-1]["verdict"] if steps else "",
                "p50_half": half["latency_ms"]["p50"] if half else None,
                "p99_half": half["latency_ms"]["p99"] if half else None,
                "p99_knee": top["latency_ms"]["p99"] if top else None,
                "cpu": cpu,
                "cpu_ms_a_write": 1000 * spent / top["rate"] if top and run.hosts else None,
                "at_once": {count: throughput(stage) for count, stage in first.items()},
                "failed": sum(s["sent"] - s["acknowledged"] for s in run.targets[target]),
            }
        )
    return table


def sentences(run: Run) -> list[str]:
    """Returns the findings as sentences."""
    found = []
    for row in rows(run):
        name = "The balancer as a whole" if row["target"] == WHOLE else f"Cluster {row['target']}"
        if not row["knee"]:
            found.append(f"{name} sustained no step: {row['why']}.")
            continue
        end = f"; the next step: {row['why']}" if row["why"] else ", which was the last step tried"
        found.append(
            f"{name} sustained {row['knee']:.0f} writes/s with a p99 of {row['p99_knee']:.1f} ms{end}."
        )
    found += [sentence for part in (_saturation, _costs, _steal, _weights, _errors) for sentence in part(run)]
    return found


def _saturation(run: Run) -> list[str]:
    steps = run.steps(WHOLE)
    if not steps or not run.hosts:
        return []
    found = []
    for step in steps:
        host = max(run.hosts, key=lambda name: run.load(name, step))
        if run.load(host, step) >= SATURATED:
            found.append(f"{host} is the first host to saturate: {_used(run, host, step)}.")
            break
    else:
        found.append(
            f"No host used {SATURATED:.0%} of its CPU. The busiest was {host} with {_used(run, host, step)}."
        )
    generator = max(step["generator"]["cpu_share"] for step in steps)
    if generator > BUSY or any("generator" in step["verdict"] for step in steps):
        found.append(
            f"The generator used {generator:.0%} of a processor: the fleet may sustain more"
            " than this machine can send."
        )
    if run.meta.get("shared_processors"):
        found.append(
            "Hosts and generator shared the processors of one machine, so a host may be slow"
            " before it reaches its own CPU limit."
        )
    return found


def _used(run: Run, host: str, step: dict[str, Any]) -> str:
    stolen = run.stolen(host, step)
    lost = f" and {stolen:.0%} steal" if stolen >= 0.005 else ""
    return (
        f"{run.busy(host, step):.0%} of its CPU{lost} at {step['rate']:.0f} writes/s;"
        f" {_most_used(run, host, step)}"
    )


def _most_used(run: Run, host: str, step: dict[str, Any]) -> str:
    used: Counter[str] = Counter()
    for each in run.during(host, step):
        used.update(each.services)
    if not used.total():
        return "its services used none"
    name, most = used.most_common(1)[0]
    return f"{name} used {most / used.total():.0%} of its services' CPU time"


def _costs(run: Run) -> list[str]:
    """Returns the CPU time of a write by host and service, at the highest sustained rate."""
    kept = [step for step in run.steps(WHOLE) if not step["verdict"]]
    if not kept or not run.hosts:
        return []
    costs: dict[str, float] = {}
    for host in run.hosts:
        seen = run.during(host, kept[-1])
        for service in sorted({name for each in seen for name in each.services}):
            used = mean(each.services.get(service, 0.0) for each in seen)
            costs[f"{host} {service}"] = 1e6 * used / kept[-1]["rate"]
    parts = ", ".join(f"{name} {cost:,.0f}" for name, cost in costs.items())
    return [
        f"A write takes {sum(costs.values()):,.0f} µs of the services' CPU time at"
        f" {kept[-1]['rate']:.0f} writes/s: {parts}."
    ]


def _steal(run: Run) -> list[str]:
    if run.meta.get("shared_processors"):
        return []  # a container's counter is the machine's
    stolen = {
        host: max((each.steal / each.processors for each in seen), default=0.0)
        for host, seen in run.hosts.items()
    }
    found = [
        f"Up to {share:.0%} of the CPU of {host} was steal: a burstable host out of credits, or"
        " a busy host machine."
        for host, share in stolen.items()
        if share > 0.05
    ]
    return found or (["No host had more than 5% steal."] if stolen else [])


def _weights(run: Run) -> list[str]:
    kept = [step for step in run.steps(WHOLE) if not step["verdict"]]
    if not kept:
        return []
    alone = {name: knee(run.steps(name)) for name in run.targets if name != WHOLE}
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for cluster in alone:
        for instance in shares(run.steps(cluster)):
            homes[instance].append(cluster)
    answered = shares(kept)
    if reason := _not_comparable(alone, homes, answered):
        return [f"The weights can't be checked: {reason}."]
    got = dict.fromkeys(alone, 0.0)
    for instance, share in answered.items():
        got[homes[instance][0]] += share
    total = sum(alone.values())
    fit = {name: most / total for name, most in alone.items()}
    by_share = ", ".join(f"{name} {share:.0%}" for name, share in got.items())
    by_knee = ", ".join(f"{name} {share:.0%}" for name, share in fit.items())
    if run.meta.get("shared_processors"):
        return [
            f"Shares were {by_share}; by each knee alone {by_knee}. Hosts that share one machine's"
            " processors do not show whether the weights fit."
        ]
    worst = max(got, key=lambda name: abs(got[name] / fit[name] - 1))
    if abs(got[worst] / fit[worst] - 1) <= FITTING:
        return [f"The weights fit: shares were {by_share}; by each knee alone {by_knee}."]
    way = "more" if got[worst] > fit[worst] else "less"
    return [
        f"The weights don't fit: {worst} gets {way} than its part"
        f" (shares {by_share}; by each knee alone {by_knee})."
    ]


def _not_comparable(alone: dict[str, float], homes: dict[str, list[str]], answered: Iterable[str]) -> str:
    """Returns why shares can't be compared with the clusters' knees; empty if they can."""
    if len(alone) < 2:
        return "at least two clusters must be tested separately"
    for cluster, most in alone.items():
        if not most:
            return f"cluster {cluster} alone sustained no step"
    for instance in answered:
        found = homes.get(instance, [])
        if len(found) != 1:
            name = instance or "an instance without a name"
            where = f"in the clusters {' and '.join(found)}" if found else "in no cluster"
            return f"{name} answers {where}"
    return ""


def _errors(run: Run) -> list[str]:
    below: Counter[str] = Counter()
    for stages in run.targets.values():
        limit = knee(stages)
        for stage in stages:
            if stage["kind"] == "requests" or stage.get("rate", float("inf")) <= limit:
                below.update(stage["errors"])
    found = []
    if any("429" in error for stages in run.targets.values() for s in stages for error in s["errors"]):
        found.append(
            "The balancer limited this client (429): add its address to nginx_lb_limit_exempt"
            " during measurements."
        )
    if below:
        listed = ", ".join(f"{error} ({count})" for error, count in below.most_common(3))
        found.append(f"{below.total()} requests failed at rates up to the knees: {listed}.")
    else:
        found.append("No request failed at rates up to the knees.")
    return found


def changes(before: Run, after: Run) -> list[str]:
    """Returns the differences between two runs, as a sentence for each target."""
    old = {row["target"]: row for row in rows(before)}
    new = {row["target"]: row for row in rows(after)}
    found = []
    for name, former in old.items():
        row = new.get(name)
        if row is None:
            found.append(f"{name}: knee {former['knee']:.0f}/s before, not tested now.")
        elif not row["knee"]:
            why = f" ({row['why']})" if row["why"] else ""
            found.append(f"{name}: knee {former['knee']:.0f}/s before, no step sustained now{why}.")
        elif not former["knee"]:
            found.append(f"{name}: no step sustained before, knee {row['knee']:.0f}/s now.")
        else:
            found.append(_change(name, former, row))
    return found


def _change(target: str, former: dict[str, Any], row: dict[str, Any]) -> str:
    parts = [f"knee {former['knee']:.0f} → {row['knee']:.0f}/s"]
    for name, title in (("p99_half", "p99 at half of it"), ("cpu_ms_a_write", "CPU per write")):
        if former[name] and row[name]:
            change = row[name] / former[name] - 1
            parts.append(f"{title} {former[name]:.2f} → {row[name]:.2f} ms ({change:+.0%})")
    return f"{target}: {', '.join(parts)}."
