"""Sequential writers: the values a pixel may hold, and services that undo acknowledged writes."""

from __future__ import annotations

import asyncio

import pytest

from bench.load.http1 import Target
from bench.load.ledger import Fate, Ledger
from bench.load.openloop import Sample
from bench.load.readback import read_canvas
from bench.load.tests.standin import HEIGHT, WIDTH, Deed, StandIn
from bench.load.writers import PIXELS_EACH, Register, Writers, WritersVerdict, pixels_of

pytestmark = pytest.mark.timing


def of(register: Register, fates: str) -> Register:
    """Makes one write per letter: (a)cknowledged, (r)efused, (u)nsent, in (d)oubt."""
    meaning = {"a": Fate.ACKNOWLEDGED, "r": Fate.REFUSED, "u": Fate.UNSENT, "d": Fate.UNKNOWN}
    for letter in fates:
        register.close(register.begin(), meaning[letter])
    return register


@pytest.mark.parametrize("channels", ["RGB", "G"])
@pytest.mark.parametrize(
    ("fates", "held", "undone", "wrong"),
    [
        ("", {0}, set(), {1}),
        ("aaa", {3}, {0, 1, 2}, {4}),
        ("aad", {2, 3}, {0, 1}, {4}),
        ("ada", {3}, {0, 1, 2}, {4}),  # a value that was in doubt must not return
        ("adda", {4}, {0, 1, 2, 3}, {5}),
        ("adrd", {1, 2, 4}, {0}, {3}),
        ("aru", {1}, {0}, {2, 3}),
        ("dd", {0, 1, 2}, set(), {3}),
        ("r", {0}, set(), {1}),
    ],
)
def test_a_register_holds_its_last_acknowledged_write_or_one_in_doubt(
    channels: str, fates: str, held: set[int], undone: set[int], wrong: set[int]
) -> None:
    register = of(Register(1, 2, channels, bytes(len(channels))), fates)
    assert {n for n in range(6) if register.fault(register.value(n)) is None} == held
    faults = {n: fault for n in range(6) if (fault := register.fault(register.value(n)))}
    assert {n for n, fault in faults.items() if fault.undone} == undone
    assert {n for n, fault in faults.items() if not fault.undone} >= wrong
    assert all(fault.held == n for n, fault in faults.items() if n <= register.last)


def test_values_rise_and_wrap() -> None:
    three = Register(0, 0, "RGB", b"\x00\xff\xfe")
    assert [three.value(n).hex() for n in (0, 1, 2)] == ["00fffe", "00ffff", "010000"]
    assert Register(0, 0, "RGB", b"\xff\xff\xff").value(1) == b"\0\0\0"
    assert Register(0, 0, "B", b"\xff").value(2) == b"\x01"
    wrapped = of(Register(0, 0, "B", b"\x07"), "a" * 300)
    assert wrapped.fault(wrapped.value(300)) is None
    fault = wrapped.fault(wrapped.value(298))
    assert fault is not None
    assert (fault.undone, fault.held) == (True, 298)


def test_a_fault_names_the_writes() -> None:
    register = of(Register(3, 4, "RGB", bytes(3)), "aad")
    assert str(register.fault(b"\0\0\1")) == (
        "(3, 4) RGB: write 2 (000002) was the last acknowledged of 3; holds 000001, write 1"
    )
    assert str(register.fault(b"\7\0\0")).endswith("holds 070000, a value that was never written")


def test_writers_and_the_ledger_share_no_pixel() -> None:
    pixels = pixels_of(WIDTH, HEIGHT, 4)
    assert len(set(pixels)) == len(pixels) == 4 * PIXELS_EACH
    ledger = Ledger(WIDTH, HEIGHT, reserved=len(pixels))
    others = ledger.cells(range(ledger.capacity))
    assert not others & set(pixels)
    assert len(others) + len(pixels) == WIDTH * HEIGHT


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.writers.PAUSE", 0.003)


def drive(
    service: StandIn, seconds: float = 0.8, settle: float = 0.4, timeout: float = 0.3
) -> tuple[WritersVerdict, list[Sample]]:
    samples: list[Sample] = []

    async def session() -> WritersVerdict:
        target = Target.parse(service.url)
        before = await read_canvas(target, WIDTH, HEIGHT, [])
        writers = Writers(target, (WIDTH, HEIGHT), before, 8, timeout, samples.append)
        stop = asyncio.Event()
        writing = asyncio.create_task(writers.run(stop))
        await asyncio.sleep(seconds)
        stop.set()
        await writing
        await asyncio.sleep(settle)
        return writers.check(await read_canvas(target, WIDTH, HEIGHT, []))

    with service.serving():
        return asyncio.run(session()), samples


def every_tenth(deed: Deed) -> StandIn:
    return StandIn(lambda number: deed if number % 10 == 5 else Deed.STORE)


def test_an_honest_service_is_clean() -> None:
    service = StandIn()
    service.canvas[:] = bytes(range(256)) * (len(service.canvas) // 256)
    verdict, samples = drive(service)
    assert verdict.clean
    assert verdict.failed == {}
    assert verdict.sent == verdict.acknowledged == service.writes > 200
    assert verdict.reads > verdict.sent / 10
    assert len(samples) == verdict.sent + verdict.reads
    assert {sample.instance for sample in samples} == {"stand-in"}
    assert {sample.error for sample in samples} == {None}


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        (Deed.DROP, "connection lost"),
        (Deed.STORE_AND_DROP, "connection lost"),
        (Deed.STALL, "no answer in time"),
        (Deed.BUSY, "status 429"),
        (Deed.BROKEN, "status 503"),
        (Deed.ECHO_ANOTHER, "answer is not an acknowledgement"),
    ],
)
def test_failures_that_undo_nothing_are_only_counted(deed: Deed, error: str) -> None:
    verdict, samples = drive(every_tenth(deed))
    assert verdict.clean
    assert set(verdict.failed) == {error}
    assert verdict.failed[error] == verdict.sent - verdict.acknowledged > 0
    assert sum(sample.error == error for sample in samples) == verdict.failed[error]


@pytest.mark.parametrize("deed", [Deed.REPEAT_LATER, Deed.BROKEN_YET_STORE_LATER])
def test_a_late_attempt_that_undoes_newer_writes_is_found(deed: Deed) -> None:
    verdict, _ = drive(every_tenth(deed))
    assert verdict.undone
    assert {len(fault.register.channels) for fault in verdict.undone} == {1, 3}  # POST and PUT
    assert not verdict.wrong


def test_a_late_attempt_after_the_last_write_is_found() -> None:
    service = every_tenth(Deed.REPEAT_LATER)
    service.later = 1.2
    verdict, _ = drive(service, settle=1.5)
    assert verdict.undone


def test_an_undone_write_counts_once_however_often_it_is_seen() -> None:
    verdict, _ = drive(every_tenth(Deed.REPEAT_LATER))
    writes = {(fault.register, fault.acknowledged) for fault in verdict.undone}
    assert len(writes) == len(verdict.undone)


@pytest.mark.parametrize("deed", [Deed.LIE, Deed.GARBLE])
def test_an_acknowledged_write_that_is_not_there_is_found(deed: Deed) -> None:
    verdict, _ = drive(every_tenth(deed))
    assert verdict.undone if deed is Deed.LIE else verdict.wrong


@pytest.mark.parametrize("deed", [Deed.BUSY_YET_STORE, Deed.PROMISE_NOTHING_YET_STORE])
def test_a_refused_write_that_is_there_is_wrong(deed: Deed) -> None:
    verdict, _ = drive(every_tenth(deed))
    assert verdict.wrong
