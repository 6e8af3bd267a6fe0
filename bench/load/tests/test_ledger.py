from __future__ import annotations

import pytest

from bench.load.ledger import Fate, Ledger, fate_of_failure

WIDTH, HEIGHT = 16, 8


def canvas_of(ledger: Ledger, before: bytes, written: set[int]) -> bytes:
    canvas = bytearray(before)
    for number in written:
        x, y, channel, value = ledger.write(number)
        canvas[(y * WIDTH + x) * 3 + "RGB".index(channel)] = value
    return bytes(canvas)


@pytest.fixture
def before() -> bytes:
    return bytes(range(256)) + bytes(WIDTH * HEIGHT * 3 - 256)


@pytest.fixture
def ledger(before: bytes) -> Ledger:
    return Ledger(WIDTH, HEIGHT, before)


def test_every_write_has_a_cell_and_channel_of_its_own(ledger: Ledger) -> None:
    places = {ledger.write(ledger.open())[:3] for _ in range(ledger.capacity)}
    assert len(places) == ledger.capacity == WIDTH * HEIGHT * 3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (1000, 1000), (1_000_003, 1)])
def test_writes_are_unique_on_any_canvas(width: int, height: int) -> None:
    ledger = Ledger(width, height)
    numbers = range(min(ledger.capacity, 3000))
    assert len({ledger.write(number)[:3] for number in numbers}) == len(numbers)


def test_a_full_canvas_has_no_more_writes(ledger: Ledger) -> None:
    for _ in range(ledger.capacity):
        ledger.open()
    with pytest.raises(ValueError, match="384 cells"):
        ledger.open()


def test_a_write_always_changes_its_cell(ledger: Ledger, before: bytes) -> None:
    for _ in range(ledger.capacity):
        x, y, channel, value = ledger.write(ledger.open())
        assert 0 <= value <= 255
        assert value != before[(y * WIDTH + x) * 3 + "RGB".index(channel)]


def test_acknowledged_and_stored_is_clean(ledger: Ledger, before: bytes) -> None:
    for _ in range(50):
        ledger.close(ledger.open(), Fate.ACKNOWLEDGED)
    verdict = ledger.check(canvas_of(ledger, before, set(range(50))))
    assert verdict.clean
    assert verdict.fates == {Fate.ACKNOWLEDGED: 50}


def test_acknowledged_and_not_stored_is_lost(ledger: Ledger, before: bytes) -> None:
    for _ in range(50):
        ledger.close(ledger.open(), Fate.ACKNOWLEDGED)
    verdict = ledger.check(canvas_of(ledger, before, set(range(50)) - {7, 9}))
    assert [fault.write for fault in verdict.lost] == [ledger.write(7), ledger.write(9)]
    assert not verdict.wrong
    assert verdict.as_json()["lost"] == 2


@pytest.mark.parametrize("fate", list(Fate))
def test_any_other_value_is_wrong(ledger: Ledger, before: bytes, fate: Fate) -> None:
    ledger.close(ledger.open(), fate)
    x, y, channel, value = ledger.write(0)
    canvas = bytearray(before)
    canvas[(y * WIDTH + x) * 3 + "RGB".index(channel)] = (value + 1) % 256
    assert len(ledger.check(bytes(canvas)).wrong) == 1


@pytest.mark.parametrize("stored", [True, False])
def test_unknown_may_be_either(ledger: Ledger, before: bytes, stored: bool) -> None:
    ledger.close(ledger.open(), Fate.UNKNOWN)
    verdict = ledger.check(canvas_of(ledger, before, {0} if stored else set()))
    assert verdict.clean
    assert verdict.unknown_written == int(stored)


@pytest.mark.parametrize("fate", [Fate.REFUSED, Fate.UNSENT])
def test_what_was_refused_or_never_sent_must_not_be_there(ledger: Ledger, before: bytes, fate: Fate) -> None:
    ledger.close(ledger.open(), fate)
    assert ledger.check(before).clean
    assert len(ledger.check(canvas_of(ledger, before, {0})).wrong) == 1


def test_a_fault_says_where_and_what(ledger: Ledger, before: bytes) -> None:
    ledger.close(ledger.open(), Fate.ACKNOWLEDGED)
    assert str(ledger.check(before).lost[0]) == "(0, 0) R: wrote 1, acknowledged; held 0, holds 0"


def test_a_canvas_of_another_size_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="has 5 bytes"):
        ledger.check(b"12345")
    with pytest.raises(ValueError, match="not 5"):
        Ledger(WIDTH, HEIGHT, b"12345")


def test_reserved_pixels_are_left_to_others(before: bytes) -> None:
    ledger = Ledger(WIDTH, HEIGHT, before, reserved=WIDTH)
    places = {ledger.write(ledger.open())[:3] for _ in range(ledger.capacity)}
    assert len(places) == WIDTH * (HEIGHT - 1) * 3
    assert max(y for _, y, _ in places) == HEIGHT - 2
    with pytest.raises(ValueError, match="336 cells"):
        ledger.open()


@pytest.mark.parametrize(
    ("status", "body", "fate"),
    [
        (404, b"{}", Fate.REFUSED),
        (429, b"{}", Fate.REFUSED),
        (503, b'{"detail":"Redis can\'t be reached; nothing was written."}', Fate.REFUSED),
        (503, b'{"detail":"Nothing was written."}', Fate.REFUSED),
        (503, b'{"detail":"The write may have been made."}', Fate.UNKNOWN),
        (504, b"", Fate.UNKNOWN),
    ],
)
def test_only_a_promise_makes_a_failure_certain(status: int, body: bytes, fate: Fate) -> None:
    assert fate_of_failure(status, body) is fate
