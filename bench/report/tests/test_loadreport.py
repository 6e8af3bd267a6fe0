"""The load test against a stub service: figures, findings and page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.load.http1 import Target
from bench.load.openloop import Plan, Report, Sample
from bench.load.tests.standin import Deed, StandIn
from bench.report import findings, loadreport, loadtest
from bench.report.findings import Run, changes, intervals, rows, sentences

NOON = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "CANVAS": 32,
        "REQUESTS": 60,
        "STEP_SECONDS": 0.5,
        "STEPS": 3,
        "CONNECTIONS": 8,
        "SPIKE_SECONDS": 1.5,
        "SPIKE_FROM": 0.5,
        "SPIKE_TO": 1.0,
        "LATE_MS": 300.0,  # the test machine may be busy
    }.items():
        monkeypatch.setattr(loadtest, name, value)


def drive(service: StandIn, folder: Path, *stages: str) -> list[dict[str, Any]]:
    arguments = [argument for stage in stages for argument in ("--stage", stage)]
    assert loadtest.main(["--url", service.url, "--target", "all", "--out", str(folder), *arguments]) == 0
    found: list[dict[str, Any]] = json.loads((folder / "load.json").read_text())["targets"]["all"]["stages"]
    return found


def test_stages_are_run_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn().serving() as service:
        drive(service, tmp_path, "requests")
        stages = drive(service, tmp_path, "staircase", "spike")
    assert [stage["kind"] for stage in stages] == ["requests"] * 2 + ["step"] * 3 + ["spike"]
    assert [stage["sent"] for stage in stages[:2]] == [60, 60]
    assert [stage["rate"] for stage in stages[2:5]] == [100, 150, 225]
    assert [stage["acknowledged"] for stage in stages[2:5]] == [50, 75, 112]
    for stage in stages:
        assert not stage["errors"]
        assert sum(second["due"] for second in stage["timeline"]) == stage["sent"]
        assert stage["latency_ms"]["p50"] > 0
    output = capsys.readouterr().out
    assert "60 requests, 50 at once" in output
    assert "225/s" in output


def test_a_staircase_ends_at_the_first_step_that_fails(tmp_path: Path) -> None:
    with StandIn(lambda number: Deed.BROKEN if number > 120 else Deed.STORE).serving() as service:
        steps = drive(service, tmp_path, "staircase")
    assert [bool(step["verdict"]) for step in steps] == [False, True]
    assert steps[-1]["verdict"].endswith("failed (status 503)")
    assert loadtest.knee(steps) == 100


def test_an_unreachable_target_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", "http://127.0.0.1:1", "--target", "all", "--stage", "staircase"]
    assert loadtest.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "cannot reach http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [False, True])
def test_insecure_accepts_any_certificate(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drive(target: Target, stage: str, before: object) -> list[Any]:
        assert target.tls is not None
        assert target.tls.check_hostname is not wanted
        return []

    monkeypatch.setattr(loadtest, "drive", drive)
    arguments = ["--url", "https://127.0.0.1:1", "--target", "all", "--out", str(tmp_path)]
    assert loadtest.main([*arguments, *["--insecure"] * wanted]) == 0


def step(rate: float, shares: dict[str, float], began: float, **others: Any) -> dict[str, Any]:
    """Returns a step of five seconds in the file's format."""
    sent = int(rate * 5)
    return {
        "kind": "step",
        "rate": rate,
        "began": began,
        "seconds": 5.0,
        "sent": sent,
        "acknowledged": sent,
        "errors": {},
        "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "p999": 4.0, "max": 5.0},
        "instances": {name: int(share * sent) for name, share in shares.items()},
        "timeline": [
            {
                "time": began + second,
                "due": int(rate),
                "failed": 0,
                "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
                "instances": {name: int(share * rate) for name, share in shares.items()},
            }
            for second in range(5)
        ],
        "generator": {"cpu_share": 0.2, "late_ms": 0.1},
        "verdict": "",
    } | others


def samples(busy: float, steal: float = 0.0) -> list[dict[str, Any]]:
    """Returns samples of a host with two processors under a constant load."""
    return [
        {
            "time": NOON + second,
            "cpu": {"processors": 2, "busy": second * busy, "steal": second * steal},
            "bytes_gauge": 5e8,
            "network": {"received": second * 1e6, "sent": second * 2e6},
            "services": {
                "app": {"cpu": second * busy * 0.75, "bytes_gauge": 1e8},
                "nginx": {"cpu": second * busy * 0.25, "bytes_gauge": 1e7},
            },
            "redis": {"commands": second * 900.0, "clients_gauge": 4},
            "nginx": {"requests": second * 1000, "connections_gauge": 60},
        }
        for second in range(20)
    ]


def write(folder: Path, targets: dict[str, Any], hosts: dict[str, Any], **meta: Any) -> Run:
    (folder / "hosts").mkdir(parents=True)
    data = {"targets": {name: {"url": "", "stages": stages} for name, stages in targets.items()}}
    (folder / "load.json").write_text(json.dumps(data))
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, lines in hosts.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "hosts" / f"{name}.jsonl").write_text(text + '{"time": 1, "cut off')
    return Run.read(folder)


def reference(folder: Path, shares: dict[str, float], **meta: Any) -> Run:
    """A run with knees 600 (c5 alone), 400 (t2 alone) and 1,000, where c5 saturates."""
    targets = {
        "c5": [step(600, {name: 1 for name in shares if "c5" in name}, NOON)],
        "t2": [step(400, {name: 1 for name in shares if "t2" in name}, NOON)],
        "all": [step(1000, shares, NOON)],
    }
    return write(folder, targets, {"c5": samples(1.8), "t2": samples(1.0, 0.4)}, **meta)


def test_counters_are_converted_to_rates_and_gauges_are_kept(tmp_path: Path) -> None:
    seen = reference(tmp_path / "run", {"c5": 0.6, "t2": 0.4}).hosts["c5"]
    assert len(seen) == 19
    one = seen[3]
    assert one.busy == pytest.approx(1.8)
    assert (one.sent, one.memory) == (2e6, 5e8)
    assert one.services == pytest.approx({"app": 1.35, "nginx": 0.45})
    assert one.redis == {"commands": 900, "clients_gauge": 4}
    assert one.nginx == {"requests": 1000, "connections_gauge": 60}


def test_the_rate_of_a_restarted_service_is_not_negative() -> None:
    old, new = samples(1.0)[5:7]
    new["services"]["app"]["cpu"] = 0.1
    new["redis"] = {}
    [one] = intervals([old, new])
    assert one.services["app"] == 0
    assert one.redis == {}


def test_findings_follow_from_the_data(tmp_path: Path) -> None:
    found = sentences(reference(tmp_path / "run", {"c5": 0.6, "t2": 0.4}))
    assert found == [
        "Cluster c5 sustained 600 writes/s with a p99 of 3.0 ms, which was the last step tried.",
        "Cluster t2 sustained 400 writes/s with a p99 of 3.0 ms, which was the last step tried.",
        "The balancer as a whole sustained 1000 writes/s with a p99 of 3.0 ms, which was the last"
        " step tried.",
        "c5 is the first host to saturate: 90% of its CPU at 1000 writes/s; app used 75%"
        " of its services' CPU time.",
        "A write takes 2,800 µs of the services' CPU time at 1000 writes/s: c5 app 1,350, c5 nginx 450,"
        " t2 app 750, t2 nginx 250.",
        "Up to 20% of the CPU of t2 was steal: a burstable host out of credits, or a busy host machine.",
        "The weights fit: shares were c5 60%, t2 40%; by each knee alone c5 60%, t2 40%.",
        "No request failed at rates up to the knees.",
    ]


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    found = sentences(reference(tmp_path / "run", {"c5": 0.4, "t2": 0.6}))
    assert any(line.startswith("The weights don't fit: t2 gets more than its part") for line in found)


def test_shares_of_instances_are_added_by_cluster(tmp_path: Path) -> None:
    shares = {"c5-1": 0.3, "c5-8001": 0.3, "t2-1": 0.4}
    found = sentences(reference(tmp_path / "run", shares))
    assert ("The weights fit: shares were c5 60%, t2 40%; by each knee alone c5 60%, t2 40%.") in found


def test_a_cluster_that_gets_nothing_is_named(tmp_path: Path) -> None:
    found = sentences(reference(tmp_path / "run", {"c5-1": 1.0, "t2-1": 0.0}))
    assert any(line.startswith("The weights don't fit: t2 gets less than its part") for line in found)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({}, "at least two clusters must be tested separately"),
        ({"t2": [step(400, {"c5": 1}, NOON)]}, "c5 answers in the clusters c5 and t2"),
        ({"t2": [step(400, {"t2": 1}, NOON)]}, "stray answers in no cluster"),
        (
            {"t2": [step(400, {"t2": 1}, NOON, verdict="p99 300 ms")]},
            "cluster t2 alone sustained no step",
        ),
    ],
)
def test_weights_that_can_not_be_checked_are_reported(
    tmp_path: Path, others: dict[str, Any], reason: str
) -> None:
    targets = {
        "c5": [step(600, {"c5": 1}, NOON)],
        **others,
        "all": [step(1000, {"c5": 0.6, "stray": 0.4}, NOON)],
    }
    found = sentences(write(tmp_path / "run", targets, {}))
    assert f"The weights can't be checked: {reason}." in found


def test_steal_counts_towards_saturation(tmp_path: Path) -> None:
    targets = {"all": [step(1000, {"c5": 0.6, "t2": 0.4}, NOON)]}
    hosts = {"c5": samples(1.0), "t2": samples(0.5, 1.3)}
    found = sentences(write(tmp_path / "run", targets, hosts))
    assert (
        "t2 is the first host to saturate: 25% of its CPU and 65% steal at 1000 writes/s;"
        " app used 75% of its services' CPU time."
    ) in found
    shared = sentences(write(tmp_path / "shared", targets, hosts, shared_processors=True))
    assert any(line.startswith("No host used 85% of its CPU. The busiest was c5") for line in shared)


@pytest.mark.parametrize("answered_within", [None, 5.0, 7.5])
def test_throughput_counts_until_the_last_answer(answered_within: float | None) -> None:
    one = step(1500, {}, NOON)
    if answered_within is not None:
        one["answered_within"] = answered_within
    assert loadtest.throughput(one) == (1000 if answered_within == 7.5 else 1500)


def test_a_stage_records_the_time_of_its_last_answer() -> None:
    samples = [Sample(10, 0.1, None, ""), Sample(11, 2.5, None, ""), Sample(12, 5, "late", "")]
    assert loadtest.stage_of("step", samples, NOON, 3)["answered_within"] == 3.5


def test_a_late_generator_is_reported_before_a_high_latency() -> None:
    late = step(100, {}, NOON, generator={"cpu_share": 0.3, "late_ms": 400})
    late["latency_ms"]["p99"] = 450
    assert loadtest.verdict(late) == "the generator can't send faster from here"
    late["generator"]["late_ms"] = 40
    assert loadtest.verdict(late) == "p99 450 ms"


def test_cpu_time_of_runs_in_one_process_is_not_added() -> None:
    calm = Report(Plan(1, 1), cpu_seconds=4.8, wall_seconds=16)
    on_top = Report(Plan(1, 1), cpu_seconds=1.8, wall_seconds=3)
    assert loadtest.effort([calm, on_top])["cpu_share"] == 0.6


def test_weights_and_credits_are_not_evaluated_on_a_shared_machine(tmp_path: Path) -> None:
    found = sentences(reference(tmp_path / "run", {"c5": 0.4, "t2": 0.6}, shared_processors=True))
    assert any("shared the processors of one machine" in line for line in found)
    assert (
        "Shares were c5 40%, t2 60%; by each knee alone c5 60%, t2 40%. Hosts that share one machine's"
        " processors do not show whether the weights fit."
    ) in found
    assert not any("credits" in line for line in found)


def test_limits_and_failures_are_named(tmp_path: Path) -> None:
    failed = step(100, {"c5": 1}, NOON, errors={"status 429": 20}, acknowledged=480)
    late = step(150, {"c5": 1}, NOON + 6, errors={"status 503": 400}, verdict="53% failed (status 503)")
    found = sentences(write(tmp_path / "run", {"all": [failed, late]}, {}))
    assert "20 requests failed at rates up to the knees: status 429 (20)." in found
    assert any("nginx_lb_limit_exempt" in line for line in found)
    assert found[0].endswith("; the next step: 53% failed (status 503).")


def test_two_runs_are_compared(tmp_path: Path) -> None:
    before = reference(tmp_path / "before", {"c5": 0.6, "t2": 0.4})
    after = write(
        tmp_path / "after",
        {"all": [step(1000, {"c5": 1}, NOON), step(1500, {"c5": 1}, NOON + 6)]},
        {"c5": samples(1.4)},
    )
    c5, t2, whole = changes(before, after)
    assert c5 == "c5: knee 600/s before, not tested now."
    assert t2 == "t2: knee 400/s before, not tested now."
    assert whole.startswith("all: knee 1000 → 1500/s, p99 at half of it 3.00 → 3.00 ms (+0%)")
    assert "CPU per write 2.80 → 0.93 ms (-67%)" in whole


def test_a_lost_knee_is_reported(tmp_path: Path) -> None:
    good = write(tmp_path / "good", {"all": [step(1000, {}, NOON)]}, {})
    bad = write(tmp_path / "bad", {"all": [step(100, {}, NOON, verdict="p99 300 ms")]}, {})
    assert changes(good, bad) == ["all: knee 1000/s before, no step sustained now (p99 300 ms)."]
    assert changes(bad, good) == ["all: no step sustained before, knee 1000/s now."]


def test_the_page_is_self_contained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    reference(folder, {"c5": 0.6, "t2": 0.4}, inventory="<local>")
    reference(tmp_path / "before", {"c5": 0.6, "t2": 0.4})
    assert loadreport.main([str(folder), "--before", str(tmp_path / "before")]) == 0
    page = (folder / "index.html").read_text()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["cpu.png", "hosts.png", "shares.png", "throughput.png", "time.png"]
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page.replace("data:image/png", "")
    assert "c5 is the first host to saturate" in page
    assert "inventory &lt;local&gt;" in page
    assert "Against before" in page
    assert "c5 is the first host to saturate" in capsys.readouterr().out


def test_a_table_in_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference(tmp_path / "run", {"c5": 0.6, "t2": 0.4})
    assert loadreport.main([str(tmp_path / "run"), "--table"]) == 0
    head, _, *body = capsys.readouterr().out.splitlines()
    assert head.startswith("| target | requests/s, one at a time |")
    assert body[2] == "| all | - | - | 1,000 | 1.00 | 3.00 | 3.00 | 90% | 50% | 2.80 | 0 |"
    assert rows(Run.read(tmp_path / "run"))[2]["knee"] == 1000


@pytest.mark.parametrize("content", [None, "{", '{"targets": {}}'])
def test_a_directory_without_a_run_is_reported(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "load.json").write_text(content)
    assert loadreport.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench.report.loadreport: ")


def test_hostwatch_samples_this_host() -> None:
    program = Path(findings.__file__).with_name("hostwatch.py")
    done = subprocess.run(
        [sys.executable, program, "--seconds", "2.5"], capture_output=True, text=True, check=True
    )
    seen = intervals([json.loads(line) for line in done.stdout.splitlines()])
    assert len(seen) >= 2
    for one in seen:
        assert 0 <= one.busy <= one.processors + 0.5
        assert one.memory > 0
