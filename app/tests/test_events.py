"""The event stream, as viewers receive it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from conftest import RedisServer

from pixel import events
from pixel.canvas import CHANNELS, Region
from pixel.events import Hub, Viewer
from pixel.names import EVENTS
from pixel.pixel import Change, coalesce, pack
from pixel.settings import Settings
from pixel.store import Events, Store
from pixel.stream import NO_EVENT, EventId

Cells = dict[tuple[int, int, str], int]

NAMES = ("c5", "t2")
SETTINGS = Settings(instance="c5", release="r1")


@pytest.fixture
async def hub(store: Store) -> AsyncIterator[Hub]:
    hub = Hub(store, SETTINGS)
    yield hub
    hub.close()


@pytest.fixture(params=["viewer", "iterator"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test for both implementations of the route: the protocol's and FastAPI's."""
    monkeypatch.setattr(Screen, "iterates", request.param == "iterator")


class Screen:
    """A viewer like a browser: it applies the events that it receives to its canvas."""

    iterates = False

    def __init__(self, hub: Hub, after: EventId | None = None, region: Region | None = None) -> None:
        self._hub = hub
        self._region = region
        self.after = after
        self.cells: Cells = {}
        self.messages: list[list[Any]] = []
        self.names: list[str] = []
        self.statuses: list[Any] = []
        self.ended = False
        self._viewer = Viewer(self._receive, self._end, region)

    async def __aenter__(self) -> "Screen":
        await self._hub.prepare()
        if self.iterates:
            self._task = asyncio.create_task(self._iterate(self._hub.stream(self.after, self._region)))
        else:
            self._hub.open(self._viewer, self.after)
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.iterates:
            self._task.cancel()
            await asyncio.wait([self._task])
        else:
            self._hub.remove(self._viewer)

    async def _iterate(self, frames: AsyncIterator[bytes]) -> None:
        try:
            async for some in frames:
                self._receive(some)
            self._end()
        finally:
            await frames.aclose()  # type: ignore[attr-defined]

    def _receive(self, frames: bytes) -> None:
        for event in frames.decode().split("\n\n")[:-1]:
            self._apply(event.splitlines())

    def _end(self) -> None:
        self.ended = True

    def _apply(self, lines: list[str]) -> None:
        if lines == [":"]:
            return
        fields = dict(line.split(": ", 1) for line in lines)
        if fields.get("event") == "status":
            self.statuses.append(json.loads(fields["data"]))
            if "id" in fields:
                assert self._region
                self.after = EventId.parse(fields["id"].encode())
            return
        self.after = EventId.parse(fields["id"].encode())
        self.names.append(fields.get("event", "message"))
        changes = json.loads(fields["data"])
        self.messages.append(changes)
        self.cells |= {(x, y, channel): value for x, y, channel, value in changes}

    async def sees(self, cells: Cells) -> None:
        """Wait until the viewer has received all these cells."""
        await eventually(lambda: cells.items() <= self.cells.items())


def figures(screen: Screen) -> list[Any]:
    """Viewers and writes of the last status."""
    return [status[name] for status in screen.statuses[-1:] for name in ("viewers", "writes")]


async def eventually(true: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


def written(changes: list[Change]) -> Cells:
    return {(x, y, CHANNELS[channel]): value for x, y, channel, value in changes}


async def test_a_viewer_receives_changes_from_now_on(store: Store, hub: Hub) -> None:
    await store.write([Change(9, 9, 0, 9)])
    async with Screen(hub) as screen:
        changes = [Change(1, 2, 0, 3), Change(1, 2, 1, 4), Change(700, 800, 2, 5)]
        await store.write(changes)
        await screen.sees(written(changes))
        assert screen.messages == [[], [[1, 2, "R", 3], [1, 2, "G", 4], [700, 800, "B", 5]]]
        assert screen.after == await store.last_event()


async def test_changes_are_coalesced_to_20_messages_a_second(store: Store, hub: Hub) -> None:
    async with Screen(hub) as screen:
        started = asyncio.get_running_loop().time()
        for value in range(1, 201):
            await store.write([Change(1, 1, 0, value % 256), Change(value, 0, 0, 1)])
        await screen.sees({(1, 1, "R"): 200, (200, 0, "R"): 1})
        seconds = asyncio.get_running_loop().time() - started
    assert len(screen.messages) <= 20 * seconds + 3
    assert len({cell for message in screen.messages for cell in map(tuple, message)}) <= 400


async def test_a_viewer_resumes_without_a_gap(store: Store, hub: Hub) -> None:
    async with Screen(hub) as first:
        await store.write([Change(0, 0, 0, 1)])
        await first.sees({(0, 0, "R"): 1})
    for value in range(1, 31):
        await store.write([Change(value, 0, 0, value)])
    async with Screen(hub, first.after) as again:
        await store.write([Change(31, 0, 0, 31)])
        expected = {(value, 0, "R"): value for value in range(1, 32)}
        await again.sees(expected)
        assert again.cells == expected
        assert set(again.names) == {"message"}


async def test_a_viewer_that_knows_an_empty_canvas_receives_all_changes(store: Store, hub: Hub) -> None:
    async with Screen(hub, NO_EVENT) as screen:
        await store.write([Change(3, 3, 0, 3)])
        await screen.sees({(3, 3, "R"): 3})
    async with Screen(hub, NO_EVENT) as screen:
        await screen.sees({(3, 3, "R"): 3})
        assert "resync" not in screen.names


@pytest.mark.parametrize("after", [NO_EVENT, EventId(5, 0), EventId(10**15, 0)])
async def test_a_viewer_with_an_unknown_position_is_sent_resync(
    store: Store, hub: Hub, redis_server: RedisServer, after: EventId
) -> None:
    short = Store(redis_server.settings(events_maxlen=100))
    for value in range(400):
        await short.write([Change(value, 0, 0, 1)])
    short.close()
    last = await store.last_event()
    async with Screen(hub, after) as screen:
        await eventually(lambda: screen.names == ["message", "resync"])
        assert screen.after == last
        await store.write([Change(7, 7, 0, 7)])
        await screen.sees({(7, 7, "R"): 7})
        assert screen.cells == {(7, 7, "R"): 7}


async def test_picture_and_later_events_are_the_canvas_exactly(
    store: Store, hub: Hub, redis_server: RedisServer
) -> None:
    """A snapshot and the events after its ID give the current canvas during concurrent writes."""
    region = Region(200, 200, 120, 120)
    stop = False

    async def write_on(channel: int) -> None:
        value = 0
        while not stop:
            value = (value + 1) % 256
            changes = [Change(250 + n, 255 + n % 2, channel, value) for n in range(value % 9 + 1)]
            await (store, other)[channel % 2].write(changes)
            await asyncio.sleep(0.005)  # stay below the limit of a replay, which another test covers

    other = Store(redis_server.settings())
    writers = [asyncio.create_task(write_on(n % 3)) for n in range(9)]
    screens = []
    for _ in range(5):
        await asyncio.sleep(0.05)
        event, tiles = await other.snapshot(region.tile_keys())
        raw = bytearray(region.assemble(tiles))
        await asyncio.sleep(0.05)
        screens.append((raw, await Screen(hub, event).__aenter__()))
    await asyncio.sleep(0.2)
    stop = True
    await asyncio.gather(*writers)
    last = await store.last_event()
    final = region.assemble((await other.snapshot(region.tile_keys()))[1])
    other.close()
    await eventually(lambda: all(screen.after == last for _, screen in screens))
    for raw, screen in screens:
        assert "resync" not in screen.names
        for (x, y, channel), value in screen.cells.items():
            place = ((y - region.y) * region.w + x - region.x) * 3
            raw[place + CHANNELS.index(channel)] = value
        assert raw == final
        await screen.__aexit__()


async def test_viewers_that_resume_during_writes_share_the_reader(
    store: Store, hub: Hub, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    first = await store.write([Change(0, 0, 0, 1)])

    async def write_on() -> None:
        while True:
            await store.write([Change(1, 1, 1, 1)])
            await asyncio.sleep(0.01)

    writer = asyncio.create_task(write_on())
    screens = [await Screen(hub, first).__aenter__() for _ in range(10)]
    await eventually(lambda: all(screen.statuses for screen in screens))
    with redis_server.admin() as admin:
        admin.config_resetstat()
        await asyncio.sleep(0.5)
        assert admin.info("commandstats")["cmdstat_xrange"]["calls"] <= 15
    writer.cancel()
    for screen in screens:
        await screen.__aexit__()


def batch(number: int, size: int) -> list[Change]:
    places = range(number * size, (number + 1) * size)
    return [Change(n % 1024, n // 1024, 0, 1 + n % 255) for n in places]


async def test_replayed_changes_come_in_messages_of_bounded_size(store: Store, hub: Hub) -> None:
    changes = [change for number in range(4) for change in batch(number, 4000)]
    for start in range(0, len(changes), 4000):
        await store.write(changes[start : start + 4000])
    async with Screen(hub, NO_EVENT) as screen:
        last = await store.last_event()
        await eventually(lambda: screen.after == last)
        assert screen.cells == written(changes)
        assert set(screen.names) == {"message"}
        assert max(map(len, screen.messages)) <= events.FRAME_CHANGES


async def test_a_viewer_too_far_behind_is_sent_resync(
    store: Store, hub: Hub, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        await store.write(batch(number, 10_000))
    last = await store.last_event()
    async with Screen(hub, NO_EVENT) as screen:
        await eventually(lambda: screen.names == ["message", "resync"])
        assert screen.after == last
        await store.write([Change(1, 1, 1, 1)])
        await screen.sees({(1, 1, "G"): 1})
        assert len(screen.cells) == 1
    # The same for many small events.
    monkeypatch.setattr(events, "REPLAY_CHANGES", 300)
    for value in range(600):
        await store.write([Change(value, 9, 0, 1)])
    async with Screen(hub, last) as screen:
        await eventually(lambda: "resync" in screen.names)
        assert screen.after == await store.last_event()
        assert len(screen.cells) <= 301


async def test_a_replay_reads_no_more_than_it_may_need(
    store: Store, hub: Hub, redis_server: RedisServer
) -> None:
    """If full events exceed the limit of a replay, 100 kB of them are read, not a reply of 1.5 MB."""
    for number in range(26):
        await store.write(batch(number, 10_000))
    with redis_server.admin() as admin:
        before = admin.info("stats")["total_net_output_bytes"]
        async with Screen(hub, NO_EVENT) as screen:
            await eventually(lambda: "resync" in screen.names)
            assert screen.messages == [[], []]
        assert admin.info("stats")["total_net_output_bytes"] - before < 200_000


async def test_after_each_message_others_have_the_workers_time(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, ends = 0.02, []

    def slowly(records: Iterable[bytes]) -> list[tuple[int, int, str, int]]:
        time.sleep(work)
        ends.append(time.monotonic())
        return coalesce(records)

    monkeypatch.setattr(events, "coalesce", slowly)
    await store.write(batch(0, 10_000))
    async with Screen(hub, NO_EVENT) as screen:
        await eventually(lambda: len(screen.cells) == 10_000)
    assert len(ends) == 4
    # One message takes `work` seconds; a pause of three times as long follows it.
    assert all(later - earlier >= 3.9 * work for earlier, later in pairwise(ends))


async def test_viewers_at_the_same_position_share_one_replay(
    store: Store, hub: Hub, redis_server: RedisServer
) -> None:
    last = await store.write(batch(0, 1000))
    with redis_server.admin() as admin:
        admin.config_resetstat()
        screens = [Screen(hub, NO_EVENT) for _ in range(20)]
        await asyncio.gather(*(screen.__aenter__() for screen in screens))
        await eventually(lambda: all(screen.after == last for screen in screens))
        assert all(len(screen.cells) == 1000 for screen in screens)
        assert admin.info("commandstats")["cmdstat_xrange"]["calls"] <= 10
    for screen in screens:
        await screen.__aexit__()


async def test_beyond_the_bound_of_replays_viewers_are_sent_resync_at_once(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "REPLAYS_WAITING", 3)
    ids = [NO_EVENT, *[await store.write([Change(n, 0, 0, 1)]) for n in range(4)]]
    for _ in range(events.REPLAYS):
        await hub._replaying.acquire()
    screens = [await Screen(hub, after).__aenter__() for after in ids]
    await eventually(lambda: screens[-1].names == ["message", "resync"])
    assert [screen.names for screen in screens[:3]] == [["message"]] * 3
    assert len(hub._replays) == 3
    for _ in range(events.REPLAYS):
        hub._replaying.release()
    await screens[0].sees(written([Change(n, 0, 0, 1) for n in range(4)]))
    await store.write([Change(9, 9, 0, 9)])
    for screen in screens:
        await screen.sees({(9, 9, "R"): 9})
        await screen.__aexit__()


async def test_too_many_changes_at_once_cause_few_resyncs(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "REPLAY_CHANGES", 1000)
    async with Screen(hub) as screen:
        for number in range(20):
            await store.write(batch(number, 1500))
            await asyncio.sleep(0.02)
        await eventually(lambda: "resync" in screen.names)
        assert screen.names.count("resync") <= 2
        # Cause one more `resync`: all events so far may have been found by one read.
        await store.write(batch(20, 1500))
        await eventually(lambda: screen.names.count("resync") >= 2)
        await store.write([Change(1, 1, 1, 1)])
        await screen.sees({(1, 1, "G"): 1})
        assert sum(map(len, screen.messages)) <= 2


async def test_viewers_are_counted_by_the_clock_of_redis(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [Store(redis_server.settings(instance=name)) for name in NAMES]
    clock = time.time
    for store, shift in zip(stores, (0, 30), strict=True):
        monkeypatch.setattr(time, "time", lambda shift=shift: clock() + shift)
        viewers = await store.count_viewers(3)
        store.close()
    assert viewers == 6


async def test_a_slow_viewer_is_bounded_and_misses_nothing(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUEUE_BYTES", 200)
    await hub.prepare()
    slow = hub.stream(None)
    await anext(slow)
    waited = 0
    async with Screen(hub) as quick:
        for value in range(1, 60):
            await store.write([Change(value % 7, 0, 0, value)])
            await asyncio.sleep(0.01)
        final = {(value % 7, 0, "R"): value for value in range(53, 60)}
        await quick.sees(final)
        [viewer] = [viewer for viewer in hub._viewers if viewer.paused]
        assert viewer.position < await store.last_event()
        screen = Screen(hub)
        async with asyncio.timeout(5):
            while not final.items() <= screen.cells.items():
                frames = await anext(slow)
                if viewer.paused:
                    waited += len(frames)
                screen._receive(frames)
    assert 0 < waited < 200 + 120
    assert not viewer.paused
    await slow.aclose()  # type: ignore[attr-defined]


async def test_a_viewer_that_is_paused_gets_nothing_and_catches_up(store: Store, hub: Hub) -> None:
    async with Screen(hub) as screen:
        [viewer] = hub._viewers
        other = await Screen(hub).__aenter__()
        hub.pause(viewer)
        hub.pause(viewer)
        for value in range(1, 5):
            await store.write([Change(value, 0, 0, value)])
            await other.sees({(value, 0, "R"): value})
        assert screen.cells == {}
        hub.resume(viewer)
        hub.resume(viewer)
        await store.write([Change(5, 0, 0, 5)])
        final = {(value, 0, "R"): value for value in range(1, 6)}
        for each in (screen, other):
            await each.sees(final)
            assert each.cells == final
        await other.__aexit__()


async def test_a_viewer_ahead_of_the_reader_never_sees_an_older_value(store: Store, hub: Hub) -> None:
    """A replay may contain newer changes than the reader has read."""
    async with Screen(hub) as screen:
        hub._least_pause = hub._longest_pause = 0.5
        await store.write([Change(1, 1, 0, 1)])
        await screen.sees({(1, 1, "R"): 1})
        middle = await store.write([Change(1, 1, 0, 2)])
        await store.write([Change(1, 1, 0, 3)])
        async with Screen(hub, middle) as ahead:
            await ahead.sees({(1, 1, "R"): 3})
            assert screen.cells == {(1, 1, "R"): 1}
            assert len(hub._ahead) == 1
            await screen.sees({(1, 1, "R"): 3})
            await store.write([Change(1, 1, 0, 4)])
            await ahead.sees({(1, 1, "R"): 4})
            seen = [change for changes in ahead.messages for change in changes]
            assert seen == sorted(seen)


async def test_a_replay_that_is_older_than_the_readers_position_is_no_gap(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = store.events
    first = await store.write([Change(1, 1, 0, 1)])
    async with Screen(hub) as screen:

        async def slowly(after: EventId, **options: Any) -> Events:
            events = await read(after, **options)
            if options and not screen.cells:
                assert not events.records
                await store.write([Change(2, 2, 0, 2)])
                await screen.sees({(2, 2, "R"): 2})
            return events

        monkeypatch.setattr(store, "events", slowly)
        async with Screen(hub, first) as late:
            await late.sees({(2, 2, "R"): 2})


async def test_a_position_without_its_epoch_is_followed(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    with redis_server.admin() as admin:
        event = EventId.of((admin.xadd(EVENTS, {"c": pack([Change(1, 1, 0, 1)]), "e": 7}), [b"e", b"7"]))
    replays = 0
    read = store.events

    async def counted(after: EventId, **options: Any) -> Events:
        nonlocal replays
        replays += bool(options)
        return await read(after, **options)

    monkeypatch.setattr(store, "events", counted)
    async with Screen(hub, event._replace(epoch=0)):
        await asyncio.sleep(0.3)
        assert len(hub._following) == 1
    assert replays == 1


async def test_the_pause_grows_with_viewers_and_shrinks_again(hub: Hub) -> None:
    assert hub._choose_pause() == 0.05
    for number, pause in ((2000, 0.25), (50_000, 0.5), (0, 0.05)):
        hub._following = {Viewer(len, hub.close) for _ in range(number)}
        assert hub._choose_pause() == pytest.approx(pause)


async def test_a_region_is_told_of_by_itself(store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    monkeypatch.setattr(events, "STATUS_PAUSES", 1)
    first = await store.write([Change(0, 0, 0, 1)])
    part = Region(100, 50, 20, 10)
    inside = [Change(100, 50, 0, 1), Change(119, 59, 1, 2), Change(110, 55, 2, 3)]
    outside = [Change(99, 50, 0, 4), Change(120, 59, 0, 5), Change(100, 49, 0, 6), Change(119, 60, 0, 7)]
    async with Screen(hub, region=part) as screen, Screen(hub) as other:
        await store.write([*inside, *outside])
        await screen.sees(written(inside))
        await other.sees(written([*inside, *outside]))
        assert screen.cells == written(inside)
        # Changes outside the region are not sent, but the position in the stream is.
        await store.write(outside)
        last = await store.write([Change(1, 1, 0, 1)])
        await eventually(lambda: screen.after == last)
        assert [len(message) for message in screen.messages] == [0, 3]
        # The same applies to a viewer that catches up.
        async with Screen(hub, first, part) as late:
            await late.sees(written(inside))
            assert late.cells == written(inside)
            await store.write([Change(101, 51, 0, 9), Change(1, 2, 0, 9)])
            for each in (screen, late):
                await each.sees({(101, 51, "R"): 9})
                assert len(each.cells) == 4


async def test_a_region_that_is_behind_is_sent_resync(store: Store, hub: Hub) -> None:
    for number in range(2):
        await store.write(batch(number, 10_000))
    async with Screen(hub, NO_EVENT, Region(5, 5, 1, 1)) as screen:
        await eventually(lambda: screen.names == ["message", "resync"])


async def test_regions_are_bounded_and_all_of_it_is_none(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "REGIONS", 2)
    regions = [Region(x, 0, 1, 1) for x in range(3)]
    screens = [Screen(hub, region=region) for region in (*regions, regions[0], Region(0, 0, 1024, 1024))]
    for screen in screens:
        await screen.__aenter__()
    assert hub._regions == {regions[0]: 2, regions[1]: 1}
    await store.write([Change(9, 9, 0, 9), Change(0, 0, 0, 1), Change(1, 0, 0, 1)])
    await eventually(lambda: all(len(screen.messages) > 1 for screen in screens))
    assert [len(screen.cells) for screen in screens] == [1, 1, 3, 1, 3]
    for screen in screens:
        await screen.__aexit__()
    await asyncio.sleep(0.01)
    assert not hub._regions


async def test_many_viewers_have_one_reader(store: Store, hub: Hub, redis_server: RedisServer) -> None:
    screens = [await Screen(hub).__aenter__() for _ in range(100)]
    await store.write([Change(1, 1, 1, 1)])
    for screen in screens:
        await screen.sees({(1, 1, "G"): 1})
    with redis_server.admin() as admin:
        assert len([c for c in admin.client_list() if c["user"] == "pixel"]) == 3
        for screen in screens:
            await screen.__aexit__()
        await asyncio.sleep(1.2)
        reads = admin.info("commandstats")["cmdstat_xread"]["calls"]
        await asyncio.sleep(1.2)
        assert admin.info("commandstats")["cmdstat_xread"]["calls"] == reads


async def test_an_outage_of_redis_loses_no_change(fragile_redis: RedisServer) -> None:
    store = Store(fragile_redis.settings())
    hub = Hub(store, SETTINGS)
    async with Screen(hub) as screen:
        await store.write([Change(1, 1, 0, 1)])
        await screen.sees({(1, 1, "R"): 1})
        fragile_redis.kill()
        async with Screen(hub, screen.after) as late:
            await asyncio.sleep(0.1)
            fragile_redis.start()
            await asyncio.sleep(0.05)
            await store.write([Change(2, 2, 0, 2)])
            await screen.sees({(2, 2, "R"): 2})
            await late.sees({(2, 2, "R"): 2})
        assert set(screen.names) == {"message"}
        # Redis is restored to an earlier state.
        with fragile_redis.admin() as admin:
            admin.delete(EVENTS)
        await eventually(lambda: screen.names[-1] == "resync")
    hub.close()
    store.close()


async def test_streams_end_with_the_worker(store: Store, hub: Hub) -> None:
    async with Screen(hub) as live, Screen(hub, NO_EVENT) as resumed:
        hub.close()
        await eventually(lambda: live.ended and resumed.ended)
        async with Screen(hub) as late:
            await eventually(lambda: late.ended)


async def test_the_status_contains_viewers_and_writes_of_the_fleet(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    monkeypatch.setattr(events, "STATUS_PAUSES", 1)
    monkeypatch.setattr(events, "_CHECK", 0.02)
    stores = [Store(redis_server.settings(instance=name)) for name in NAMES]
    hubs = [
        Hub(store, Settings(instance=name, release="r1")) for name, store in zip(NAMES, stores, strict=True)
    ]
    async with Screen(hubs[0]) as one, Screen(hubs[1]), Screen(hubs[1]) as other:
        status = {"viewers": 3, "writes": 0.0, "release": "r1", "maintenance": None}
        await eventually(
            lambda: (
                [s.statuses[-1:] for s in (one, other)] == [[status | {"instance": name}] for name in NAMES]
            )
        )
        count = len(one.statuses)
        await stores[1].write([Change(x, 1, 2, 3) for x in range(100)])
        await eventually(lambda: len(one.statuses) > count + 2)
        rates = [status["writes"] for status in one.statuses[count:]]
        assert 0.2 * sum(rates) == pytest.approx(100, rel=0.5)
    async with Screen(hubs[0]) as one:  # disconnected viewers are not counted
        await eventually(lambda: figures(one) == [1, 0.0])
    for hub, store in zip(hubs, stores, strict=True):
        hub.close()
        await asyncio.sleep(0.05)
        store.close()


async def test_the_status_is_null_while_redis_is_unavailable(
    fragile_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    store = Store(fragile_redis.settings())
    hub = Hub(store, SETTINGS)
    async with Screen(hub) as screen:
        fragile_redis.kill()
        await eventually(lambda: figures(screen) == [None, None])
        assert screen.statuses[-1]["instance"] == "c5"
        fragile_redis.start()
        await eventually(lambda: figures(screen) == [1, 0.0])
    hub.close()
    store.close()
