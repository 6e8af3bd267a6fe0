"""Formats results as text: a table, the ratios and the limits."""

from __future__ import annotations

from bench.compare.plan import MAIN_CONNECTIONS
from bench.compare.results import GROUPS, RATIO_FIGURES, Key, Results
from bench.load.figures import Figure

COLUMNS = (
    f"{'workload':<11}{'conns':>5}  {'variant':<15}{'fsync':<9}{'req/s':>22}{'p50 ms':>8}"
    f"{'p99 ms':>22}  |{'app':>7}{'nginx':>7}{'redis':>7}{'total':>19}  |{'RSS MB':>7}"
)


def table(results: Results) -> str:
    lines = ["CPU is in seconds per 10,000 requests; figures are medians (lowest-highest).", ""]
    lines.append(COLUMNS)
    order = sorted(results.measured(), key=lambda key: (_rank(key.workload), key.connections))
    previous = None
    for key in order:
        if previous is not None and previous != (key.workload, key.connections):
            lines.append("")
        previous = (key.workload, key.connections)
        lines.append(_row(results, key))
    return "\n".join(lines)


def _row(results: Results, key: Key) -> str:
    groups = [results.figure(key, f"cpu_{group}") for group in GROUPS if group != "total"]
    costs = "".join(f"{of.median:7.2f}" if of.max else f"{'-':>7}" for of in groups)
    errors = f"  {results.errors(key)} ERRORS" if results.errors(key) else ""
    return (
        f"{key.workload:<11}{key.connections:>5}  {key.variant:<15}{key.fsync:<9}"
        f"{_spread(results.figure(key, 'rps'), 0):>22}"
        f"{results.figure(key, 'p50_ms').median:8.1f}"
        f"{_spread(results.figure(key, 'p99_ms'), 1):>22}  |{costs}"
        f"{_spread(results.figure(key, 'cpu_total'), 2):>19}  |"
        f"{results.figure(key, 'rss_mb').median:7.0f}{errors}"
    )


def ratios(results: Results) -> str:
    """Returns the ratios at 64 connections, and of viewers, one pair a line; the JSON file has all."""
    pairs: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for ratio in results.ratios():
        main = ratio.connections == MAIN_CONNECTIONS and ratio.workload != "mix90"
        if main or ratio.workload == "viewers":
            of_what = ratio.fsync if ratio.workload == "write" else ratio.workload
            pairs.setdefault((ratio.a, ratio.b, of_what), {})[ratio.figure] = ratio.of
    if not pairs:
        return ""
    lines = [
        f"Ratios at {MAIN_CONNECTIONS} connections, paired by round:",
        "",
        f"{'':<48}" + "".join(f"{name:>19}" for name in RATIO_FIGURES),
    ]
    for (a, b, of_what), figures in pairs.items():
        cells = (_spread(figures[name], 2) if name in figures else "-" for name in RATIO_FIGURES)
        lines.append(f"{f'{a} / {b}':<29}{of_what:<19}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines)


def bars(results: Results) -> str:
    lines = []
    for bar in results.bars():
        verdict = "met" if bar.met else f"MISSED by {bar.of.median / bar.limit - 1:.0%}"
        lines.append(f"  {bar.what:<42}{_spread(bar.of, 2):>20}  <= {bar.limit:<6g}{verdict}")
    return "\n".join(["Bars:", *lines]) if lines else ""


def _rank(workload: str) -> int:
    order = ["write", "browser", "batch100", "mix90", "viewers", "scaling_1w", "scaling_2w"]
    return order.index(workload)


def _spread(figure: Figure, digits: int) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in figure)
    return f"{median} ({low}-{high})" if low != high else median
