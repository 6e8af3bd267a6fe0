"""The load generator, tested with a service that has every kind of fault."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.drill.hosts import Fleet
from bench.load import __main__ as load
from bench.load.disk import Flush
from bench.load.http1 import Target
from bench.load.ledger import Fate, Ledger, Verdict
from bench.load.openloop import Plan, Report, Sample, run
from bench.load.readback import read_canvas
from bench.load.tests.standin import HEIGHT, WIDTH, Deed, StandIn

pytestmark = pytest.mark.timing

WRITES = 100


@pytest.fixture
def service() -> Iterator[StandIn]:
    with StandIn().serving() as running:
        yield running


def drive(service: StandIn, **changes: float | int) -> tuple[Report, Verdict]:
    """Sends 100 writes in 0.2 s, and checks the canvas."""

    async def session() -> tuple[Report, Verdict]:
        plan = Plan(**{"rate": 500, "seconds": 0.2, "connections": 8, "timeout": 5} | changes)  # type: ignore[arg-type]
        target = Target.parse(service.url)
        cells = Ledger(WIDTH, HEIGHT).cells(range(plan.total))
        ledger = Ledger(WIDTH, HEIGHT, await read_canvas(target, WIDTH, HEIGHT, cells))
        report = await run(target, plan, ledger)
        return report, ledger.check(await read_canvas(target, WIDTH, HEIGHT, cells))

    return asyncio.run(session())


def every_tenth(deed: Deed) -> StandIn:
    return StandIn(lambda number: deed if number % 10 == 0 else Deed.STORE)


@pytest.mark.parametrize("whole_canvas", [True, False])
def test_an_honest_service_is_clean(service: StandIn, whole_canvas: bool) -> None:
    service.whole_canvas = whole_canvas
    for _ in range(2):  # the second run changes the pixels of the first one
        report, verdict = drive(service)
        assert verdict.clean
        assert verdict.fates == {Fate.ACKNOWLEDGED: WRITES}
        assert (report.sent, report.acknowledged, report.failed) == (WRITES, WRITES, 0)
        assert report.statuses == {200: WRITES}
        assert report.connections_opened == 8


def test_reads_change_nothing(service: StandIn) -> None:
    async def session() -> tuple[Report, bytes, bytes]:
        target = Target.parse(service.url)
        before = await read_canvas(target, WIDTH, HEIGHT, [])
        report = await run(target, Plan(500, 0.2, 8, 5, reads=True), Ledger(WIDTH, HEIGHT))
        return report, before, await read_canvas(target, WIDTH, HEIGHT, [])

    report, before, after = asyncio.run(session())
    assert (report.acknowledged, report.failed) == (WRITES, 0)
    assert before == after


def test_requests_leave_on_time(service: StandIn) -> None:
    report, _ = drive(service)
    assert len(report.lags) == WRITES
    assert report.lag.p50 < 1
    assert 0.2 <= report.wall_seconds < 1


@pytest.mark.parametrize(
    ("deed", "fate", "error", "lost", "wrong"),
    [
        (Deed.LIE, Fate.ACKNOWLEDGED, None, 10, 0),
        (Deed.GARBLE, Fate.ACKNOWLEDGED, None, 0, 10),
        (Deed.DROP, Fate.UNKNOWN, "connection lost", 0, 0),
        (Deed.STORE_AND_DROP, Fate.UNKNOWN, "connection lost", 0, 0),
        (Deed.STALL, Fate.UNKNOWN, "no answer in time", 0, 0),
        (Deed.BUSY, Fate.REFUSED, "status 429", 0, 0),
        (Deed.BUSY_YET_STORE, Fate.REFUSED, "status 429", 0, 10),
        (Deed.PROMISE_NOTHING_YET_STORE, Fate.REFUSED, "status 503", 0, 10),
        (Deed.BROKEN, Fate.UNKNOWN, "status 503", 0, 0),
        (Deed.ECHO_ANOTHER, Fate.UNKNOWN, "answer is not an acknowledgement", 0, 0),
    ],
)
def test_each_failure_is_told_apart(deed: Deed, fate: Fate, error: str | None, lost: int, wrong: int) -> None:
    with every_tenth(deed).serving() as service:
        report, verdict = drive(service, connections=32, timeout=0.3)
    assert (len(verdict.lost), len(verdict.wrong)) == (lost, wrong)
    expected = {Fate.ACKNOWLEDGED: 90, fate: 10}
    assert verdict.fates == (expected if fate is not Fate.ACKNOWLEDGED else {fate: 100})
    assert report.errors == ({error: 10} if error else {})
    assert verdict.unknown_written == (10 if deed is Deed.STORE_AND_DROP else 0)


def test_latency_counts_from_when_a_request_was_due() -> None:
    # One connection, 20 ms per answer, 500 requests/s: the last of 50 requests waits for 49 others.
    with StandIn().serving() as service:
        service.delay = 0.02
        report, verdict = drive(service, seconds=0.1, connections=1)
    assert verdict.clean
    assert report.latency.max > 49 * 20 - 100
    assert report.lag.p50 < 1


def test_what_never_left_is_unsent_and_counts_with_its_waiting_time() -> None:
    with StandIn(lambda _: Deed.STALL).serving() as service:
        report, verdict = drive(service, connections=1, timeout=0.3)
    assert verdict.fates[Fate.UNSENT] + verdict.fates[Fate.UNKNOWN] == WRITES
    assert verdict.fates[Fate.UNSENT] > 0
    assert report.errors["no free connection in time"] == verdict.fates[Fate.UNSENT]
    assert report.latency.p50 >= 300


def test_spare_connections_are_opened_when_all_others_wait() -> None:
    with StandIn(lambda number: Deed.STALL if number < 20 else Deed.STORE).serving() as service:
        report, verdict = drive(service, connections=2, timeout=1, spare=30)
    assert report.errors == {"no answer in time": 20}
    assert verdict.fates == {Fate.ACKNOWLEDGED: WRITES - 20, Fate.UNKNOWN: 20}
    assert report.connections_opened > 20


def test_a_service_that_closes_each_connection_gets_new_ones(service: StandIn) -> None:
    service.close_each = True
    report, verdict = drive(service)
    assert verdict.clean
    assert report.failed == 0
    assert report.connections_opened > WRITES / 2


def test_a_run_can_be_stopped(service: StandIn) -> None:
    async def session() -> Report:
        stop = asyncio.Event()
        target, ledger = Target.parse(service.url), Ledger(WIDTH, HEIGHT)
        return await run(target, Plan(100, 20), ledger, stop=stop, watch=lambda _: stop.set())

    report = asyncio.run(session())
    assert report.interrupted
    assert 0 < report.sent == report.acknowledged < 100


def test_the_timeline_has_a_row_a_second(service: StandIn) -> None:
    report, _ = drive(service, rate=50, seconds=1.5)
    assert [second.due for second in report.timeline] == [50, 25]


def test_every_request_can_be_watched() -> None:
    seen: list[Sample] = []

    async def session(service: StandIn) -> Report:
        target, ledger = Target.parse(service.url), Ledger(WIDTH, HEIGHT)
        return await run(target, Plan(500, 0.2, 8, 5), ledger, watch=seen.append)

    with every_tenth(Deed.BROKEN).serving() as service:
        asyncio.run(session(service))
    assert len(seen) == WRITES
    assert sum(sample.error == "status 503" for sample in seen) == 10
    assert {sample.instance for sample in seen if sample.error is None} == {"stand-in"}
    dues = sorted(sample.due for sample in seen)
    assert dues[-1] - dues[0] == pytest.approx(0.2 - 1 / 500)
    assert all(0 < sample.seconds < 1 for sample in seen)


# The command line


def command(service: StandIn, *more: str) -> list[str]:
    load_for_a_moment = ["--rate", "500", "--seconds", "0.2", "--connections", "4"]
    return ["--url", service.url, "--canvas", f"{WIDTH}x{HEIGHT}", *load_for_a_moment, *more]


def test_exit_0_and_a_summary(service: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(command(service, "--strict", "--json", str(tmp_path / "a" / "b.json"))) == 0
    assert "0 lost, 0 wrong" in capsys.readouterr().out
    seen = json.loads((tmp_path / "a" / "b.json").read_text())
    assert seen["statuses"] == {"200": WRITES}
    assert seen["canvas"]["acknowledged"] == WRITES
    assert seen["latency_ms"]["p99"] > 0


def test_exit_1_when_the_service_lies(capsys: pytest.CaptureFixture[str]) -> None:
    with every_tenth(Deed.LIE).serving() as service:
        assert load.main(command(service)) == 1
    assert "10 lost, 0 wrong" in capsys.readouterr().out


def test_failures_matter_when_strict() -> None:
    with every_tenth(Deed.BUSY).serving() as service:
        assert load.main(command(service)) == 0
        assert load.main(command(service, "--strict")) == 1


@pytest.mark.parametrize(("deed", "status"), [(Deed.BROKEN, 0), (Deed.DROP, 1)])
def test_a_slow_disk_is_forgiven_what_it_does(
    deed: Deed, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def flushes(_: Fleet) -> list[Flush]:
        return [Flush(time.monotonic(), 5)]

    monkeypatch.setattr(Fleet, "load", lambda: Fleet("nobody", "", {}, {}))
    monkeypatch.setattr(Fleet, "slow_flushes", flushes)
    with every_tenth(deed).serving() as service:
        assert load.main(command(service, "--strict", "--forgive-disk")) == status
    assert ("while Redis waited for its disk" in capsys.readouterr().out) is (status == 0)


def test_writers_write_beside_the_rate_and_are_judged_later(
    service: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "SETTLE", 0.5)
    report = tmp_path / "load.json"
    more = ("--writers", "4", "--strict", "--json", str(report))
    assert load.main(command(service, *more)) == 0
    assert "0 undone, 0 wrong" in capsys.readouterr().out
    seen = json.loads(report.read_text())
    assert seen["canvas"]["acknowledged"] == WRITES
    assert seen["writers"]["acknowledged"] > 0
    assert service.writes == WRITES + seen["writers"]["acknowledged"]


def test_exit_1_when_an_acknowledged_write_comes_back_after_the_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "SETTLE", 1.0)
    monkeypatch.setattr("bench.load.writers.PAUSE", 0.005)
    with StandIn(lambda number: Deed.REPEAT_LATER if number % 5 else Deed.STORE).serving() as late:
        late.later = 0.7  # after the load, which takes 0.2 s, and before the check
        assert load.main(command(late, "--writers", "4")) == 1
    out = capsys.readouterr().out
    assert "0 lost, 0 wrong" in out
    assert " 0 undone" not in out


def test_failures_of_writers_matter_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SETTLE", 0.0)
    monkeypatch.setattr("bench.load.writers.PAUSE", 0.005)
    with StandIn().serving() as service:
        # The writers' pixels are the last ones of the canvas.
        service.broken_from_row = HEIGHT - 4
        assert load.main(command(service, "--writers", "4")) == 0
        assert load.main(command(service, "--writers", "4", "--strict")) == 1


def test_exit_1_when_nothing_is_acknowledged() -> None:
    with StandIn(lambda _: Deed.BROKEN).serving() as service:
        assert load.main(command(service, "--no-verify")) == 1


def test_an_unreachable_service_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for more in ([], ["--no-verify"]):
        assert load.main(["--url", f"http://127.0.0.1:{port}", *more]) == 2
        error = capsys.readouterr().err
        assert f"cannot reach http://127.0.0.1:{port}" in error
        assert error.count("\n") == 1


def test_a_canvas_of_another_size_is_said(service: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", service.url]) == 2
    assert "--canvas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--url"),
        (["--url", "localhost"], "not an http://"),
        (["--url", "http://x", "--rate", "0"], "not a positive number"),
        (["--url", "http://x", "--rate", "nan"], "not a positive number"),
        (["--url", "http://x", "--connections", "0"], "not at least 1"),
        (["--url", "http://x", "--canvas", "10"], "not WIDTHxHEIGHT"),
        (["--url", "http://x", "--writers", "-1"], "not at least 1"),
        (["--url", "http://x", "--writers", "1", "--no-verify"], "leave out --no-verify"),
        (["--url", "http://x", "--writers", "9", "--canvas", "9x64"], "need 64 pixels each"),
        (["--url", "http://x", "--writers", "16384"], "need 64 pixels each"),
        (["--url", "http://x", "--seconds", "4000"], "at most 3145 seconds"),
        (["--url", "http://x", "--rate", "1", "--seconds", "0.1"], "not one request is due"),
    ],
)
def test_bad_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
