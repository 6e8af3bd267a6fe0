"""Draws a load test's results: a self-contained page, and its pictures as files.

    python -m bench.report.loadreport DIR [--before DIR] [--table]

`index.html` and the PNGs are written to the directory; `--table` prints a table for documents.
Exit status: 0, or 2 if there is nothing to draw.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from bench.report import loadtest
from bench.report.findings import WHOLE, Run, changes, rows, sentences

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("loadreport.html.j2")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def new(rows: int = 1, columns: int = 1, height: float = 3.2, **others: Any) -> tuple[Figure, Any]:
    return pyplot.subplots(
        rows, columns, figsize=(9.5, height), layout="constrained", squeeze=False, **others
    )


def by_rate(steps: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    known = [step for step in steps if step["latency_ms"][name] is not None]
    return [step["rate"] for step in known], [step["latency_ms"][name] for step in known]


def throughput(run: Run, before: Run | None) -> Figure:
    """Acknowledged writes and latency, by rate."""
    figure, [[left, right]] = new(1, 2, 3.6)
    most = 0.0
    for run_drawn, line in ((before, ":"), (run, "-")):
        if run_drawn is None:
            continue
        for number, target in enumerate(run_drawn.targets):
            steps = run_drawn.steps(target)
            name = f"{target}, before" if line == ":" else target
            colour = COLOURS[number % len(COLOURS)]
            rates = [step["rate"] for step in steps]
            done = [loadtest.throughput(step) for step in steps]
            left.plot(rates, done, line, marker=".", color=colour, label=name)
            most = max([most, *rates])
            right.plot(*by_rate(steps, "p50"), line, marker=".", color=colour, alpha=0.4)
            right.plot(*by_rate(steps, "p99"), line, marker=".", color=colour, label=name)
    left.plot([0, most], [0, most], color="#999999", linewidth=0.8, zorder=0)
    left.set(title="Acknowledged", xlabel="due per second", ylabel="acknowledged per second")
    right.set(title="Latency: p99 (p50 lighter)", xlabel="due per second", ylabel="ms")
    right.set_yscale("log")
    left.legend()
    return figure


def over_time(run: Run, _: Run | None) -> Figure:
    """Due and failed requests and latency of each target, by second."""
    figure, axes = new(2, len(run.targets), 5, sharey="row", sharex="col")
    for column, (target, stages) in enumerate(run.targets.items()):
        seconds = [second for stage in stages for second in stage["timeline"]]
        clock = [second["time"] - stages[0]["began"] for second in seconds]
        upper, lower = axes[0][column], axes[1][column]
        for name, colour in (("p50", COLOURS[5]), ("p90", COLOURS[0]), ("p99", COLOURS[1])):
            upper.plot(
                clock,
                [second["latency_ms"][name] or float("nan") for second in seconds],
                ".-",
                markersize=3,
                linewidth=0.8,
                color=colour,
                label=name,
            )
        upper.set(title=target, yscale="log")
        failed = [second["failed"] for second in seconds]
        lower.bar(clock, [second["due"] for second in seconds], 1, color=COLOURS[2], label="due")
        lower.bar(clock, failed, 1, color=COLOURS[1], label="failed")
        lower.set(xlabel="seconds")
    axes[0][0].set_ylabel("latency, ms")
    axes[1][0].set_ylabel("requests per second")
    axes[0][0].legend()
    axes[1][0].legend()
    return figure


def shade(axes: Axes, run: Run, start: float) -> None:
    """Marks the time in which each target was tested."""
    for number, (target, stages) in enumerate(run.targets.items()):
        first = stages[0]["began"] - start
        last = stages[-1]["began"] + stages[-1]["seconds"] - start
        axes.axvspan(first, last, color=COLOURS[number % len(COLOURS)], alpha=0.06, linewidth=0)
        axes.annotate(target, (first, 1), xycoords=("data", "axes fraction"), fontsize=8)


def hosts_over_time(run: Run, _: Run | None) -> Figure | None:
    """CPU of each host by service, and steal."""
    if not run.hosts:
        return None
    figure, axes = new(len(run.hosts), 1, 0.6 + 2.2 * len(run.hosts), sharex=True)
    start = min(stages[0]["began"] for stages in run.targets.values())
    for [plot], (host, seen) in zip(axes, run.hosts.items(), strict=True):
        clock = [each.time - start for each in seen]
        services = sorted({name for each in seen for name in each.services})
        layers = [[each.services.get(name, 0) for each in seen] for name in services]
        if layers:
            plot.stackplot(clock, layers, labels=services, alpha=0.6, colors=COLOURS)
        plot.plot(clock, [each.busy for each in seen], color="#333333", label="total")
        plot.plot(clock, [each.steal for each in seen], "--", color=COLOURS[1], label="steal")
        shade(plot, run, start)
        most = max((each.processors for each in seen), default=1)
        plot.set(ylabel=f"{host}: processors of {most}", ylim=(0, None))
    axes[0][0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1][0].set_xlabel("seconds")
    return figure


def shares_over_time(run: Run, _: Run | None) -> Figure | None:
    """Share of each instance's answers through the balancer, by second."""
    stages = run.targets.get(WHOLE, [])
    seconds = [second for stage in stages for second in stage["timeline"]]
    names = sorted({name for second in seconds for name in second["instances"]})
    if not names:
        return None
    figure, [[plot]] = new(height=2.6)
    clock = [second["time"] - stages[0]["began"] for second in seconds]
    base = [0.0] * len(seconds)
    for name in names:
        part = [
            second["instances"].get(name, 0) / max(1, sum(second["instances"].values())) for second in seconds
        ]
        plot.bar(clock, part, 1, bottom=base, label=name, alpha=0.8)
        base = [one + other for one, other in zip(base, part, strict=True)]
    plot.set(xlabel="seconds", ylabel="share of answers", ylim=(0, 1))
    plot.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def others_over_time(run: Run, _: Run | None) -> Figure | None:
    """Memory and network of each host, commands of Redis, requests of Nginx."""
    if not run.hosts:
        return None
    figure, [[memory, net], [redis, nginx]] = new(2, 2, 5, sharex=True)
    start = min(stages[0]["began"] for stages in run.targets.values())

    def draw(plot: Axes, host: str, label: str, value: Callable[[Any], float | None]) -> None:
        points = [
            (each.time - start, found) for each in run.hosts[host] if (found := value(each)) is not None
        ]
        if points:
            plot.plot(*zip(*points, strict=True), label=label, linewidth=1)

    for host in run.hosts:
        draw(memory, host, host, lambda each: each.memory / 1e6)
        draw(net, host, f"{host} sent", lambda each: each.sent / 1e6)
        draw(net, host, f"{host} received", lambda each: each.received / 1e6)
        draw(redis, host, f"{host}", lambda each: each.redis.get("commands"))
        draw(nginx, host, f"{host} requests", lambda each: each.nginx.get("requests"))
    memory.set(title="Memory, MB", ylim=(0, None))
    net.set(title="Network, MB/s", ylim=(0, None))
    redis.set(title="Redis: commands/s", xlabel="seconds", ylim=(0, None))
    nginx.set(title="Nginx: requests/s", xlabel="seconds", ylim=(0, None))
    for plot in (memory, net, redis, nginx):
        if plot.lines:
            plot.legend(fontsize=7)
    return figure


DRAWINGS: dict[str, tuple[str, Callable[[Run, Run | None], Figure | None]]] = {
    "throughput": ("Throughput and latency by rate", throughput),
    "time": ("Second by second", over_time),
    "cpu": ("CPU of each host, by service", hosts_over_time),
    "shares": ("Share of each backend", shares_over_time),
    "hosts": ("Memory, network, Redis, Nginx", others_over_time),
}


def draw(run: Run, before: Run | None, folder: Path) -> dict[str, tuple[str, str]]:
    """Writes the pictures; returns title and base64 content of each."""
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for name, (title, drawing) in DRAWINGS.items():
            figure = drawing(run, before)
            if figure is None:
                continue
            buffer = io.BytesIO()
            # Omit matplotlib's version, so that equal data give equal files.
            figure.savefig(buffer, format="png", metadata={"Software": None})
            pyplot.close(figure)
            (folder / f"{name}.png").write_bytes(buffer.getvalue())
            pictures[name] = (title, base64.b64encode(buffer.getvalue()).decode())
    return pictures


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def cells(run: Run) -> Iterable[list[str]]:
    """The table's head and rows, as text."""
    hosts = list(run.hosts)
    yield [
        "target",
        *("requests/s, one at a time", "50 at a time"),
        *("knee, writes/s", "p50 at half the knee, ms", "p99 at half, ms", "p99 at the knee, ms"),
        *(f"CPU of {host} at the knee" for host in hosts),
        *("CPU per write, ms", "failed"),
    ]
    for row in rows(run):
        yield [
            row["target"],
            *(number(row["at_once"].get(count), 0) for count in (1, 50)),
            number(row["knee"], 0),
            *(number(row[name], 2) for name in ("p50_half", "p99_half", "p99_knee")),
            *(f"{row['cpu'][host]:.0%}" if host in row["cpu"] else "-" for host in hosts),
            number(row["cpu_ms_a_write"], 2),
            str(row["failed"]),
        ]


def markdown(run: Run) -> str:
    head, *body = cells(run)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(run: Run, before: Run | None, pictures: dict[str, tuple[str, str]]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    head, *body = cells(run)
    began = min(stages[0]["began"] for stages in run.targets.values())
    return environment.from_string(TEMPLATE.read_text()).render(
        began=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)),
        meta=run.meta,
        findings=sentences(run),
        changes=changes(before, run) if before else [],
        before=before.name if before else "",
        head=head,
        body=body,
        pictures=pictures,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.loadreport", description="Draws a load test's results."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a run to compare with")
    parser.add_argument("--table", action="store_true", help="print a table instead")
    options = parser.parse_args(arguments)
    try:
        run = Run.read(options.folder)
        before = Run.read(options.before) if options.before else None
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report.loadreport: {error}", file=sys.stderr)
        return 2
    if options.table:
        print(markdown(run))
        return 0
    pictures = draw(run, before, options.folder)
    (options.folder / "index.html").write_text(page(run, before, pictures))
    for sentence in [*sentences(run), *(changes(before, run) if before else [])]:
        print(sentence)
    print(f"{options.folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
