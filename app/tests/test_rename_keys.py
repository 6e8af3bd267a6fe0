"""roles/redis/files/rename_keys.lua moves the canvas of earlier releases to the present names of keys."""

import json
from collections.abc import Callable, Iterator

import pytest
import redis
from conftest import REDIS_ROLE, RedisServer

from pixel.canvas import TILE_BYTES, locate
from pixel.maintenance import Maintenance
from pixel.names import EVENTS, KEYS, KEYS_VERSION, MAINTENANCE, budget_key, tile_key
from pixel.pixel import Change, pack
from pixel.store import Store

SCRIPT = (REDIS_ROLE.parents[1] / "files" / "rename_keys.lua").read_text()

Step = Callable[[str], bytes]


@pytest.fixture
def admin(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.admin() as admin:
        yield admin


@pytest.fixture
def step(admin: redis.Redis) -> Step:
    return lambda name: admin.eval(SCRIPT, 0, name, "2026-11-28T00:00:00Z")


def paint_as_before(admin: redis.Redis, change: Change, maxlen: int = 1000) -> bytes:
    """Write as releases with the former names do."""
    _, place = locate(change.x, change.y)
    tile = f"pixel:{{{change.x // 256}:{change.y // 256}}}"
    admin.setrange(tile, TILE_BYTES - 1, b"\0")
    admin.setrange(tile, place + change.channel, bytes([change.value]))
    event: bytes = admin.xadd("pixel:events", {"c": pack([change])}, maxlen=maxlen, approximate=False)
    return event


def fill(admin: redis.Redis) -> None:
    for n in range(20):
        paint_as_before(admin, Change(n * 50, n * 30, n % 3, n + 1), maxlen=15)
    admin.hset("pixel:keys", "alice", '{"hash":"x","scopes":["paint"],"created":1}')
    admin.incr("pixel:keys:version")
    admin.set("pixel:budget:key:alice", "123", px=60_000)
    admin.set("pixel:lease:c5/1:abc", "1", px=60_000)


async def test_the_canvas_is_the_same_under_the_present_names(
    redis_server: RedisServer, admin: redis.Redis, step: Step
) -> None:
    fill(admin)
    store = Store(redis_server.settings())
    await store.probe()  # the new release's trial
    before = {key: admin.dump(key) for key in admin.scan_iter()}
    assert step("begin") == b"changed"
    state = Maintenance.decode(admin.get("pixel:maintenance"))
    assert (state.state, state.since) == ("read-only", "2026-11-28T00:00:00Z")
    assert step("copy") == b"changed"
    # Both releases show the canvas, and refuse writes.
    assert Maintenance.decode(admin.get(MAINTENANCE)) == state
    for former, name in (
        ("pixel:events", EVENTS),
        ("pixel:keys", KEYS),
        ("pixel:keys:version", KEYS_VERSION),
        ("pixel:{3:2}", tile_key(3, 2)),
        ("pixel:budget:key:alice", budget_key("key:alice")),
    ):
        assert admin.dump(name) == admin.dump(former) == before[former.encode()]
    assert admin.ttl(budget_key("key:alice")) > 0
    assert admin.xinfo_stream(EVENTS)["entries-added"] == 20
    assert await store.colour(150, 90) == (4, 0, 0)
    assert step("finish") == b"changed"
    assert admin.get(MAINTENANCE) == b""
    assert [key for key in admin.scan_iter() if not key.startswith((b"pixel:{0}:", b"pixel:lease:"))] == []
    assert not admin.exists("pixel:{0}:copied")
    await store.write([Change(0, 0, 0, 9)])
    assert [step(name) for name in ("begin", "copy", "finish")] == [b"unchanged"] * 3
    assert await store.colour(150, 90) == (4, 0, 0)
    assert await store.colour(0, 0) == (9, 0, 0)
    store.close()


async def test_every_step_can_be_repeated_and_a_deploy_be_given_up(
    redis_server: RedisServer, admin: redis.Redis, step: Step
) -> None:
    fill(admin)
    for name in ("begin", "begin", "copy", "copy"):
        step(name)
    # The operator stays with the former release, whose hosts write again; later the deploy is run again.
    admin.set("pixel:maintenance", "")
    paint_as_before(admin, Change(1, 1, 1, 77))
    step("begin")
    assert step("copy") == b"changed"
    # A worker that was suspended writes once more.
    late = paint_as_before(admin, Change(2, 2, 2, 88))
    assert step("finish") == b"changed"
    assert step("finish") == b"unchanged"
    store = Store(redis_server.settings())
    assert await store.colour(1, 1) == (0, 77, 0)
    assert await store.colour(2, 2) == (0, 0, 88)
    assert (await store.last_event()).text() == late
    store.close()


def test_a_canvas_without_events_is_copied_before_it_is_deleted(admin: redis.Redis, step: Step) -> None:
    """Its tiles are all that there is: a worker has created them, or the events have been removed."""
    tiles = {(0, 0): bytes(TILE_BYTES), (3, 2): b"\7" * TILE_BYTES}
    for (column, row), content in tiles.items():
        admin.set(f"pixel:{{{column}:{row}}}", content)
    results = [step(name) for name in ("begin", "copy", "copy", "finish", "finish")]
    assert results == [b"changed", b"changed", b"unchanged", b"changed", b"unchanged"]
    assert {place: admin.get(tile_key(*place)) for place in tiles} == tiles
    assert not admin.exists("pixel:{0:0}", "pixel:{3:2}")


async def test_writes_under_both_names_are_an_error(
    redis_server: RedisServer, admin: redis.Redis, step: Step
) -> None:
    fill(admin)
    step("begin")
    step("copy")
    store = Store(redis_server.settings())
    await store.write([Change(1, 1, 0, 5)])  # not refused, as there is no gate here
    # Nothing was written under the former names: they are obsolete.
    assert step("copy") == b"unchanged"
    paint_as_before(admin, Change(1, 1, 0, 6))
    for name in ("copy", "finish"):
        with pytest.raises(redis.ResponseError, match="under the former and under the present names"):
            step(name)
    assert admin.exists("pixel:events")
    assert await store.colour(1, 1) == (5, 0, 0)
    store.close()


async def test_the_maintenance_of_an_operator_goes_on(admin: redis.Redis, step: Step) -> None:
    fill(admin)
    state = json.dumps({"state": "on", "message": "Moving house", "since": ""})
    admin.set("pixel:maintenance", state)
    for name in ("begin", "copy", "finish"):
        step(name)
    assert admin.get(MAINTENANCE) == state.encode()


async def test_a_restored_backup_is_renamed_at_once(
    redis_server: RedisServer, admin: redis.Redis, step: Step
) -> None:
    fill(admin)
    assert step("finish") == b"changed"
    store = Store(redis_server.settings())
    assert await store.colour(150, 90) == (4, 0, 0)
    store.close()
