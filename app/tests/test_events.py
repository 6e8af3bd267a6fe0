"""Changes as viewers hear of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import RedisServer

from pixel import events
from pixel.canvas import CHANNELS, Region
from pixel.events import Hub
from pixel.pixel import Change
from pixel.store import Store
from pixel.stream import EVENTS, NO_EVENT, EventId

Cells = dict[tuple[int, int, str], int]

NAMES = ("c5", "t2")


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    store = Store(redis_server.settings())
    yield store
    store.close()


@pytest.fixture
async def hub(store: Store) -> AsyncIterator[Hub]:
    hub = Hub(store, "c5", "r1")
    yield hub
    hub.close()


class Screen:
    """A viewer as a browser is one: it keeps the canvas by the events that it hears."""

    def __init__(self, hub: Hub, after: EventId | None = None) -> None:
        self._hub = hub
        self.after = after
        self.cells: Cells = {}
        self.messages: list[list[Any]] = []
        self.names: list[str] = []
        self.statuses: list[Any] = []

    async def __aenter__(self) -> "Screen":
        await self._hub.prepare()
        self._frames = self._hub.stream(self.after)
        self._task = asyncio.create_task(self._look())
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._frames.aclose()  # type: ignore[attr-defined]

    async def _look(self) -> None:
        async for frame in self._frames:
            lines = frame.decode().strip().splitlines()
            if lines == [":"]:
                continue
            fields = dict(line.split(": ", 1) for line in lines)
            if fields.get("event") == "status":
                self.statuses.append(json.loads(fields["data"]))
                continue
            self.after = EventId.parse(fields["id"].encode())
            self.names.append(fields.get("event", "message"))
            changes = json.loads(fields["data"])
            self.messages.append(changes)
            self.cells |= {(x, y, channel): value for x, y, channel, value in changes}

    async def sees(self, cells: Cells) -> None:
        """Return when it sees all the cells."""
        await eventually(lambda: cells.items() <= self.cells.items())


def figures(screen: Screen) -> list[Any]:
    """The viewers and writes that it heard of last."""
    return [status[name] for status in screen.statuses[-1:] for name in ("viewers", "writes")]


async def eventually(true: Callable[[], bool]) -> None:
    """Return when something has become true."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.01)


def written(changes: list[Change]) -> Cells:
    return {(x, y, CHANNELS[channel]): value for x, y, channel, value in changes}


async def test_a_viewer_hears_of_changes_from_now_on(store: Store, hub: Hub) -> None:
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


async def test_who_knows_an_empty_canvas_is_told_everything(store: Store, hub: Hub) -> None:
    async with Screen(hub, NO_EVENT) as screen:
        await store.write([Change(3, 3, 0, 3)])
        await screen.sees({(3, 3, "R"): 3})
    async with Screen(hub, NO_EVENT) as screen:
        await screen.sees({(3, 3, "R"): 3})
        assert "resync" not in screen.names


@pytest.mark.parametrize("after", [NO_EVENT, EventId(5, 0), EventId(10**15, 0)])
async def test_who_knows_too_little_or_too_much_fetches_the_canvas_anew(
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
    """Bytes at an id and the events after it, while three write on over one another."""
    region = Region(200, 200, 120, 120)
    stop = False

    async def write_on(channel: int) -> None:
        value = 0
        while not stop:
            value = (value + 1) % 256
            changes = [Change(250 + n, 255 + n % 2, channel, value) for n in range(value % 9 + 1)]
            await (store, other)[channel % 2].write(changes)

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


async def test_who_resumes_while_others_write_on_has_the_same_reader_as_all(
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


async def test_a_slow_viewer_is_bounded_and_misses_nothing(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUEUE_MESSAGES", 3)
    await hub.prepare()
    slow = hub.stream(None)
    await anext(slow)
    async with Screen(hub) as quick:
        for value in range(1, 60):
            await store.write([Change(value % 7, 0, 0, value)])
            await asyncio.sleep(0.01)
        final = {(value % 7, 0, "R"): value for value in range(53, 60)}
        await quick.sees(final)
        [viewer] = [viewer for viewer in hub._viewers if viewer.behind]
        assert len(viewer.waiting) <= 3
        cells: Cells = {}
        async with asyncio.timeout(5):
            while cells != final:
                changes = json.loads((await anext(slow)).decode().partition("data: ")[2])
                cells |= {(x, y, channel): value for x, y, channel, value in changes}
    await slow.aclose()  # type: ignore[attr-defined]


async def test_many_viewers_have_one_reader(
    store: Store, hub: Hub, redis_server: RedisServer
) -> None:
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


async def test_a_redis_that_was_away_costs_no_viewer_a_change(fragile_redis: RedisServer) -> None:
    store = Store(fragile_redis.settings())
    hub = Hub(store, "c5", "r1")
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
        # It comes back with less than it had.
        with fragile_redis.admin() as admin:
            admin.delete(EVENTS)
        await eventually(lambda: screen.names[-1] == "resync")
    hub.close()
    store.close()


async def test_streams_end_with_the_worker(store: Store, hub: Hub) -> None:
    async with Screen(hub) as live, Screen(hub, NO_EVENT) as resumed:
        hub.close()
        async with asyncio.timeout(1):
            await asyncio.wait([live._task, resumed._task])


async def test_a_quiet_stream_has_a_heartbeat(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "HEARTBEAT", 0.05)
    await hub.prepare()
    stream = hub.stream(None)
    await anext(stream)
    assert [await anext(stream), await anext(stream)] == [b":\n\n"] * 2
    await stream.aclose()  # type: ignore[attr-defined]


async def test_viewers_hear_how_many_they_are_and_how_much_is_written(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    monkeypatch.setattr(events, "_LOOK", 0.02)
    stores = [Store(redis_server.settings(instance=name)) for name in NAMES]
    hubs = [Hub(store, name, "r1") for name, store in zip(NAMES, stores, strict=True)]
    async with Screen(hubs[0]) as one, Screen(hubs[1]), Screen(hubs[1]) as other:
        status = {"viewers": 3, "writes": 0.0, "release": "r1"}
        await eventually(
            lambda: (
                [s.statuses[-1:] for s in (one, other)]
                == [[status | {"instance": name}] for name in NAMES]
            )
        )
        count = len(one.statuses)
        await stores[1].write([Change(x, 1, 2, 3) for x in range(100)])
        await eventually(lambda: len(one.statuses) > count + 2)
        rates = [status["writes"] for status in one.statuses[count:]]
        assert 0.2 * sum(rates) == pytest.approx(100, rel=0.5)
    async with Screen(hubs[0]) as one:  # those who have left no longer count
        await eventually(lambda: figures(one) == [1, 0.0])
    for hub, store in zip(hubs, stores, strict=True):
        hub.close()
        await asyncio.sleep(0.05)
        store.close()


async def test_while_redis_is_away_viewers_hear_that_nothing_is_known(
    fragile_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "STATUS", 0.2)
    store = Store(fragile_redis.settings())
    hub = Hub(store, "c5", "r1")
    async with Screen(hub) as screen:
        fragile_redis.kill()
        await eventually(lambda: figures(screen) == [None, None])
        assert screen.statuses[-1]["instance"] == "c5"
        fragile_redis.start()
        await eventually(lambda: figures(screen) == [1, 0.0])
    hub.close()
    store.close()
