"""The drill on a stand-in service with faults that the tests select."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.drill import __main__ as drill
from bench.drill.__main__ import Drill
from bench.drill.faults import Act, Event, Scene
from bench.drill.hosts import Fleet, FleetError
from bench.drill.outcomes import Run
from bench.load.disk import Flush
from bench.load.tests.standin import HEIGHT, WIDTH, Deed, StandIn


class Healed(Fleet):
    """A fleet without hosts; it counts the calls of `heal`."""

    times = 0
    flushes: tuple[Flush, ...] = ()

    async def heal(self) -> None:
        type(self).times += 1

    async def slow_flushes(self) -> list[Flush]:
        return list(self.flushes)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Healed, "times", 0)
    monkeypatch.setattr(Healed, "flushes", ())
    monkeypatch.setattr("bench.load.writers.PAUSE", 0.01)
    for name, value in {
        "WARM_UP": 0.1,
        "BEFORE": 0.5,
        "SETTLED": 0.5,
        "PENDING": 0.3,
        "CONNECTIONS": 8,
        "WRITERS": 4,
        "SETTLE": 0.4,
    }.items():
        monkeypatch.setattr(drill, name, value)


def happen(service: StandIn, event: Event, times: int = 1) -> list[Run]:
    async def session() -> list[Run]:
        fleet = Healed("nobody", service.url, {"stand-in": "192.0.2.10"}, {})
        work = Drill(Scene(fleet), 200, (WIDTH, HEIGHT))
        return [await work.happen(event, turn) for turn in range(times)]

    with service.serving():
        return asyncio.run(session())


def failing_for(service: StandIn, deed: Deed, seconds: float) -> Act:
    async def act(_scene: Scene, _turn: int) -> None:
        service.deed = lambda _: deed
        await asyncio.sleep(seconds)
        service.deed = lambda _: Deed.STORE

    return act


def test_an_event_that_nobody_notices() -> None:
    service = StandIn()

    async def act(_scene: Scene, turn: int) -> None:
        assert turn in (0, 1)

    runs = happen(service, Event("nothing", act, patience=3), times=2)
    for run in runs:
        assert run.faults == []
        assert run.recovery == 0
        assert run.sent == run.acknowledged > 200
        assert run.undone == 0
        assert run.failed == {}
    assert Healed.times == 2


def test_failures_that_are_excused_and_the_seconds_until_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drill, "WRITERS", 0)  # only the open loop, whose failures are predictable
    service = StandIn()
    act = failing_for(service, Deed.BROKEN, 0.6)
    (run,) = happen(service, Event("away", act, excused=frozenset({"503"}), grace=1, patience=5))
    assert run.faults == []
    assert run.failed["503"] == pytest.approx(120, abs=30)
    assert run.recovery == pytest.approx(0.75, abs=0.26)


def test_failures_that_are_not() -> None:
    service = StandIn()
    (run,) = happen(service, Event("away", failing_for(service, Deed.BROKEN, 0.3), patience=5))
    assert run.faults == [f"{run.failed['503']} x 503"]


def test_failures_while_the_disk_was_slow_are_not_the_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = StandIn()

    async def act(scene: Scene, turn: int) -> None:
        await failing_for(service, Deed.BROKEN, 0.3)(scene, turn)
        monkeypatch.setattr(Healed, "flushes", (Flush(time.monotonic(), 1.0),))

    (run,) = happen(service, Event("unlucky", act, patience=5))
    assert run.faults == []
    assert run.behind_flush == run.failed["503"] > 0


def test_a_lost_write_is_a_fault() -> None:
    service = StandIn()
    (run,) = happen(service, Event("lies", failing_for(service, Deed.LIE, 0.3), patience=5))
    assert run.lost == pytest.approx(60, abs=20)
    assert run.faults[0].startswith("lost: (")
    assert "acknowledged" in run.faults[0]


def test_an_undone_write_is_a_fault() -> None:
    service = StandIn()
    act = failing_for(service, Deed.REPEAT_LATER, 0.5)
    (run,) = happen(service, Event("zombies", act, patience=5))
    assert (run.lost, run.wrong, run.failed) == (0, 0, {})
    assert run.undone > 0
    assert run.faults[0].startswith("undone: (")


def test_failures_of_the_writers_count_as_all_others() -> None:
    service = StandIn()

    async def act(_scene: Scene, _turn: int) -> None:
        service.broken_from_row = HEIGHT - 4  # the writers' pixels
        await asyncio.sleep(0.3)
        service.broken_from_row = HEIGHT

    (run,) = happen(service, Event("odd", act, patience=5))
    assert run.faults == [f"{run.failed['503']} x 503"]


def test_an_event_can_end_the_writers() -> None:
    service = StandIn()

    async def act(scene: Scene, _turn: int) -> None:
        scene.end_writers()
        await asyncio.sleep(0.2)
        service.broken_from_row = HEIGHT - 4
        await asyncio.sleep(0.3)

    (run,) = happen(service, Event("end", act, patience=5))
    assert run.faults == []
    assert run.failed == {}


def test_what_does_not_come_back_is_said() -> None:
    service = StandIn()

    async def act(_scene: Scene, _turn: int) -> None:
        service.deed = lambda _: Deed.BROKEN

    (run,) = happen(service, Event("ruin", act, excused=frozenset({"503"}), grace=9, patience=1))
    assert run.recovery is None
    assert "not at full capacity" in run.faults[0]


def test_an_act_that_fails_is_a_fault_and_the_drill_goes_on() -> None:
    async def act(_scene: Scene, turn: int) -> None:
        if turn == 0:
            raise FleetError("the playbook failed")

    first, second = happen(StandIn(), Event("odd", act, patience=3), times=2)
    assert first.faults == ["the playbook failed"]
    assert second.faults == []


def test_a_host_that_is_missing_before_the_event_stops_the_drill() -> None:
    async def session(service: StandIn) -> None:
        fleet = Healed("nobody", service.url, {"stand-in": "", "other": ""}, {})
        event = Event("any", failing_for(service, Deed.STORE, 0), patience=3)
        await Drill(Scene(fleet), 200, (WIDTH, HEIGHT)).happen(event, 0)

    with (
        StandIn().serving() as service,
        pytest.raises(FleetError, match="only these answered: stand-in"),
    ):
        asyncio.run(session(service))
