from __future__ import annotations

import pytest

from bench.compare import __main__ as bench
from bench.compare.plan import MAIN_CONNECTIONS, jobs
from bench.compare.variants import VARIANTS


def test_the_full_comparison_takes_at_most_15_minutes() -> None:
    options = bench.parse_arguments([])
    planned = jobs(options.only, options.seconds, quick=False)
    assert options.rounds >= 5
    assert sum(job.seconds for job in planned) * options.rounds < 15 * 60


def test_every_variant_is_measured_at_the_main_number_of_connections() -> None:
    planned = jobs(set(VARIANTS), 4, quick=False)
    for name, variant in VARIANTS.items():
        if "write" not in variant.workloads:
            continue
        fsyncs = {
            job.fsync
            for job in planned
            for step in job.steps
            if job.variant == name and (step.workload, step.connections) == ("write", 64)
        }
        assert "always" in fsyncs or not variant.stores
    assert MAIN_CONNECTIONS == 64


def test_a_round_measures_each_setting_once() -> None:
    planned = jobs(set(VARIANTS), 4, quick=False)
    measured = [
        (job.variant, job.fsync, step.connections, step.workload) for job in planned for step in job.steps
    ]
    assert len(measured) == len(set(measured))


def test_rounds_start_with_different_variants() -> None:
    planned = jobs(set(VARIANTS), 1, quick=True)
    rounds = [bench.rotated(planned, number) for number in range(5)]
    assert len({each[0] for each in rounds}) >= 3
    assert all(set(each) == set(planned) for each in rounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "usual,nginx"], "unknown: nginx; the variants are literal"),
        (["--rounds", "0"], "at least 1"),
        (["--service-cpus", "a"], "not a list"),
        (["--load-cpus", "4096"], "processor 4096 is not available"),
    ],
)
def test_invalid_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_tools_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert bench.main(["--only", "usual"]) == 2
    assert "apt-get install --no-install-recommends nginx redis-server" in capsys.readouterr().err
