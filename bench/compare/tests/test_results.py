from __future__ import annotations

import json

import pytest

from bench.compare import tables
from bench.compare.results import Key, Results, Sample


def sample(cpu: float, p99: float = 10.0, errors: int = 0, rss: float = 50.0) -> Sample:
    groups = {"app": cpu * 0.8, "nginx": cpu * 0.1, "redis": cpu * 0.1, "total": cpu}
    return Sample(1000 / cpu, p99 / 2, p99, groups, rss, rss / 2, errors, 0.01)


OURS = Key("ours_unix", "always", 64)
USUAL = Key("usual", "always", 64)


@pytest.fixture
def results() -> Results:
    """Three rounds; in the second, everything took four times as long."""
    results = Results()
    for number, noise in enumerate([1, 4, 1]):
        results.add(number, OURS, sample(0.5 * noise, 4))
        results.add(number, OURS._replace(fsync="everysec"), sample(0.4 * noise, 4))
        results.add(number, USUAL, sample(3.0 * noise, 16))
        results.add(number, Key("literal", "none", 64), sample(2.0 * noise))
    return results


def test_noise_in_a_round_does_not_change_its_ratios(results: Results) -> None:
    ratio = results.ratio(OURS, USUAL, "cpu_total")
    assert ratio == pytest.approx((1 / 6, 1 / 6, 1 / 6))
    assert results.figure(OURS, "cpu_total") == pytest.approx((0.5, 0.5, 2.0))


def test_a_ratio_uses_only_rounds_that_measured_both_variants(results: Results) -> None:
    results.add(3, OURS, sample(100))
    assert results.ratio(OURS, USUAL, "cpu_total") == pytest.approx((1 / 6, 1 / 6, 1 / 6))
    assert results.ratio(OURS, Key("nginx_lua", "always", 64), "cpu_total") is None


def test_a_group_without_cpu_time_gives_no_ratio() -> None:
    results = Results()
    bare = sample(1)._replace(cpu={"app": 0.0, "nginx": 1.0, "redis": 0.0, "total": 1.0})
    results.add(0, OURS, sample(1))
    results.add(0, Key("nginx_lua", "always", 64), bare)
    assert {ratio.figure for ratio in results.ratios()} == {"cpu_total", "p99_ms", "rps"}


def test_ratios_pair_variants_and_appendfsync_settings(results: Results) -> None:
    pairs = {(ratio.a, ratio.b, ratio.fsync) for ratio in results.ratios()}
    assert pairs == {
        ("ours_unix", "usual", "always"),
        ("ours_unix", "literal", "always"),
        ("ours_unix", "literal", "everysec"),
        ("ours_unix", "ours_unix", "always/everysec"),
        ("usual", "literal", "always"),
    }


def test_bars_are_met_or_missed(results: Results) -> None:
    bars = {bar.what: bar for bar in results.bars()}
    assert bars["ours_unix / usual, cpu_total"].met
    assert not bars["ours_unix / usual, p99_ms"].met
    assert not bars["ours_unix always / everysec, cpu_total"].met
    assert bars["ours_unix, RSS of a worker in MB"].met
    text = tables.bars(results)
    assert text.count("MISSED by 25%") == 1
    assert text.count("met") == 2


def test_the_json_document_has_the_documented_fields(results: Results) -> None:
    rows = json.loads(json.dumps(results.as_json()))
    row = next(row for row in rows if (row["variant"], row["fsync"]) == ("usual", "always"))
    assert row["connections"] == 64
    assert row["workload"] == "write"
    assert set(row["cpu_s_per_10k"]) == {"app", "nginx", "redis", "total"}
    for figure in (row["rps"], row["p50_ms"], row["p99_ms"], row["cpu_s_per_10k"]["total"]):
        assert set(figure) == {"median", "min", "max"}
    ratio = next(iter(results.ratios())).as_json()
    assert set(ratio) >= {"a", "b", "figure", "fsync", "connections", "median", "min", "max"}


def test_the_table_shows_every_key_and_every_error(results: Results) -> None:
    results.add(0, USUAL, sample(3, errors=7))
    text = tables.table(results)
    assert text.count("ours_unix") == 2
    assert "7 ERRORS" in text
    assert "ours_unix / usual" in tables.ratios(results)


def test_empty_results_give_no_ratio_and_no_bar() -> None:
    assert tables.ratios(Results()) == ""
    assert tables.bars(Results()) == ""
