"""The drill on a stand-in service with faults that the tests select."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.drill import __main__ as drill
from bench.drill.__main__ import Drill
from bench.drill.events import Act, Event, Scene
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
        "FOLLOWERS": 0,
        "CAUGHT_UP": 1.0,
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


def test_an_outage_beyond_the_limit_is_a_fault() -> None:
    service = StandIn()
    act = failing_for(service, Deed.BROKEN, 0.6)
    excused = Event("away", act, excused=frozenset({"503"}), grace=1, outage=0.3, patience=5)
    (run,) = happen(service, excused)
    assert run.outage == pytest.approx(0.6, abs=0.2)
    assert run.faults == [f"no write was acknowledged for {run.outage:.1f} s, the limit is 0.3 s"]


def test_only_the_blows_of_an_act_excuse_failures() -> None:
    service = StandIn()

    async def act(scene: Scene, turn: int) -> None:
        with scene.blow():
            await failing_for(service, Deed.BROKEN, 0.2)(scene, turn)
        await asyncio.sleep(0.5)
        await failing_for(service, Deed.DROP, 0.2)(scene, turn)

    anything = frozenset({"503", "connection lost"})
    (run,) = happen(service, Event("twice", act, excused=anything, grace=0.2, patience=5))
    assert run.failed["503"] > 0
    assert run.faults == [f"{run.failed['connection lost']} x connection lost"]


def test_viewers_that_miss_a_change_and_see_one_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "WRITERS", 0)  # no later write hides the difference
    monkeypatch.setattr(drill, "FOLLOWERS", 2)
    service = StandIn()

    async def act(_scene: Scene, turn: int) -> None:
        if turn == 1:
            service.silent_changes = 1
            service.false_changes = 1

    right, wrong = happen(service, Event("misled", act, patience=5), times=2)
    assert (right.faults, right.gaps, right.phantoms) == ([], 0, 0)
    assert (wrong.gaps, wrong.phantoms) == (2, 2)
    assert wrong.faults == [f"viewer {number}: 1 gaps, 1 phantoms" for number in (1, 2)]


def happen_apart(service: StandIn, apart: StandIn, act: Act) -> Run:
    """Runs an event that cuts off a host, for whose own clients there is another service."""

    async def session() -> Run:
        fleet = Healed("nobody", service.url, {"stand-in": f"127.0.0.1:{apart.port}"}, {})
        event = Event("cut off", act, apart="stand-in", patience=5)
        return await Drill(Scene(fleet), 200, (WIDTH, HEIGHT)).happen(event, 0)

    with service.serving(), apart.serving():
        return asyncio.run(session())


def test_the_clients_of_a_host_that_is_cut_off_may_fail() -> None:
    service, apart = StandIn(), StandIn()
    apart.canvas, apart.changes = service.canvas, service.changes
    run = happen_apart(service, apart, failing_for(apart, Deed.BROKEN, 0.3))
    assert (run.faults, run.failed) == ([], {})
    assert apart.writes > 0


def test_their_acknowledged_writes_may_not_be_undone() -> None:
    service, apart = StandIn(), StandIn()  # the second one has a canvas of its own
    run = happen_apart(service, apart, failing_for(apart, Deed.STORE, 0.3))
    assert run.undone > 0
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
