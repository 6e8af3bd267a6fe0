"""The results as people read them: one table, the ratios at its heart, and the bars."""

from __future__ import annotations

from figures import Figure
from plan import MAIN_CONNECTIONS
from results import GROUPS, RATIO_FIGURES, Results

COLUMNS = (
    f"{'workload':<11}{'conns':>5}  {'variant':<15}{'fsync':<9}{'req/s':>17}"
    f"{'p50 ms':>15}{'p99 ms':>17}  {'app':>6}{'nginx':>7}{'redis':>7}{'total':>7}"
    f"{'(spread)':>14}{'RSS MB':>8}"
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
        cpu = {group: results.figure(key, f"cpu_{group}") for group in GROUPS}
        total = cpu["total"]
        costs = "".join(
            f"{cpu[group].median:7.2f}" if cpu[group].max else f"{'-':>7}" for group in GROUPS
        )
        errors = f"  {results.errors(key)} ERRORS" if results.errors(key) else ""
        lines.append(
            f"{key.workload:<11}{key.connections:>5}  {key.variant:<15}{key.fsync:<9}"
            f"{_spread(results.figure(key, 'rps'), 0):>17}"
            f"{_spread(results.figure(key, 'p50_ms'), 1):>15}"
            f"{_spread(results.figure(key, 'p99_ms'), 1):>17} {costs}"
            f"{f'({total.min:.2f}-{total.max:.2f})':>14}"
            f"{results.figure(key, 'rss_mb').median:8.0f}{errors}"
        )
    return "\n".join(lines)


def ratios(results: Results) -> str:
    """A line a pair, at 64 connections; the file has all of them."""
    pairs: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for ratio in results.ratios():
        if ratio.connections == MAIN_CONNECTIONS and ratio.workload != "mix90":
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
    order = ["write", "batch100", "mix90", "scaling_1w", "scaling_2w"]
    return order.index(workload)


def _spread(figure: Figure, digits: int) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in figure)
    return f"{median} ({low}-{high})" if low != high else median
