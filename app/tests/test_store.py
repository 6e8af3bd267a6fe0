"""Group commit and reads, with a Redis that works, is slow, is down or holds a broken tile."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from itertools import pairwise

import pytest
import redis
import uvloop
from conftest import APP_COMMANDS, RedisServer

from pixel import keys
from pixel.budgets import Writer
from pixel.canvas import TILE_BYTES, locate
from pixel.cluster import Redis
from pixel.commit import GroupCommit, _Batch
from pixel.events import Hub
from pixel.names import EVENTS, budget_key, tile_key
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.resp import Connection, Server
from pixel.settings import Budget
from pixel.store import Store
from pixel.stream import EVENT_CHANGES, EventId

TILE_00 = tile_key(0, 0)


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    store = Store(redis_server.settings())
    yield store
    store.close()


async def outcomes(writes: Iterable[Awaitable[EventId]]) -> list[str]:
    """The results of concurrent writes: "ok", or the problem's detail."""
    results = await asyncio.gather(*writes, return_exceptions=True)
    for result in results:
        if not isinstance(result, EventId):
            assert isinstance(result, Problem)
            assert result.status == 503
            assert result.headers == {"Retry-After": "1"}
    return ["ok" if isinstance(result, EventId) else str(result) for result in results]


async def late_probe(store: Store) -> EventId:
    """An empty write, as a coroutine: its immediate refusal is an outcome too."""
    return await store.write(())


def stored(server: RedisServer, change: Change) -> int:
    key, place = locate(change.x, change.y)
    with server.admin() as admin:
        value = admin.getrange(key, place + change.channel, place + change.channel)
    return value[0] if value else 0


def events(server: RedisServer) -> list[list[Change]]:
    with server.admin() as admin:
        records = [fields[b"c"] for _, fields in admin.xrange(EVENTS)]
    return [[Change(*change) for change in struct.iter_unpack("<HHBB", record)] for record in records]


def submit(commit: GroupCommit, *changes: Change) -> asyncio.Future[EventId]:
    answer: asyncio.Future[EventId] = asyncio.get_running_loop().create_future()
    commit.submit(answer, changes)
    return answer


async def test_a_write_is_in_redis_when_it_is_answered(store: Store, redis_server: RedisServer) -> None:
    change = Change(1023, 300, 2, 77)
    event = await store.write([change])
    assert event == await store.last_event()
    assert stored(redis_server, change) == 77
    assert await store.colour(1023, 300) == (0, 0, 77)
    assert events(redis_server) == [[change]]


async def test_concurrent_writes_share_transactions_in_their_order(
    store: Store, redis_server: RedisServer
) -> None:
    await store.probe()
    first = Change(1, 1, 0, 1)
    await store.write([first])
    # The first write is sent alone or together with all others.
    changes = [Change(n % 7, 0, 0, n % 256) for n in range(500)]
    assert await outcomes(store.write([change]) for change in changes) == ["ok"] * 500
    batches = events(redis_server)
    assert [change for batch in batches for change in batch] == [first, *changes]
    assert len(batches) <= 3
    for x in range(7):
        assert stored(redis_server, Change(x, 0, 0, 0)) == [c.value for c in changes if c.x == x][-1]


async def test_a_tile_is_created_at_its_full_size(store: Store, redis_server: RedisServer) -> None:
    await store.write([Change(0, 0, 0, 0)])
    with redis_server.admin() as admin:
        assert admin.strlen(TILE_00) == TILE_BYTES
        assert not admin.get(TILE_00).strip(b"\0")


async def test_a_large_batch_is_several_events_of_one_transaction(
    store: Store, redis_server: RedisServer
) -> None:
    changes = [Change(n % 1000, n // 1000, 1, n % 256) for n in range(10_000)]
    event = await store.write(changes)
    assert event == await store.last_event()
    batches = events(redis_server)
    assert max(map(len, batches)) == EVENT_CHANGES
    assert [change for batch in batches for change in batch] == changes


async def test_the_event_stream_is_bounded(redis_server: RedisServer) -> None:
    store = Store(redis_server.settings(events_maxlen=100))
    for n in range(400):
        await store.write([Change(0, 0, 0, n % 256)])
    store.close()
    assert 100 <= len(events(redis_server)) < 300


async def test_one_broken_tile_fails_its_own_writes_only(store: Store, redis_server: RedisServer) -> None:
    with redis_server.admin() as admin:
        admin.rpush(TILE_00, "no string")
    here, there = Change(0, 0, 0, 9), Change(600, 600, 0, 9)
    results = await outcomes(store.write(w) for w in ([here], [there], [there, here], [there]))
    assert [result == "ok" for result in results] == [False, True, False, True]
    assert stored(redis_server, there) == 9
    with pytest.raises(Problem):
        await store.colour(0, 0)
    assert await store.colour(600, 600) == (9, 0, 0)


async def test_a_cancelled_request_leaves_its_neighbours_alone(
    store: Store, redis_server: RedisServer
) -> None:
    tasks = [asyncio.ensure_future(store.write([Change(n, 0, 0, 5)])) for n in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
    assert all(isinstance(result, EventId) for result in results[1::2])
    assert all(stored(redis_server, Change(n, 0, 0, 0)) == 5 for n in range(1, 20, 2))
    await store.write([Change(0, 0, 0, 6)])


async def test_beyond_the_queues_bound_a_write_is_refused_at_once(
    fragile_redis: RedisServer,
) -> None:
    store = Store(fragile_redis.settings(write_queue=10_000))
    await store.probe()
    fragile_redis.pause()
    changes = [Change(0, 0, 0, 1)] * 5_000
    waiting = [asyncio.ensure_future(store.write(changes)) for _ in range(2)]
    await asyncio.sleep(0.05)
    started = time.monotonic()
    with pytest.raises(Problem, match="Too many writes are waiting; nothing was written"):
        await store.write([Change(1, 1, 1, 1)] * 4)
    # Single pixels may use a tenth more of the queue.
    waiting += [asyncio.ensure_future(store.write([Change(2, 2, 2, 2)])) for _ in range(1_000)]
    with pytest.raises(Problem, match="Too many writes are waiting; nothing was written"):
        await store.write([Change(1, 1, 1, 1)])
    assert time.monotonic() - started < 0.2
    fragile_redis.resume()
    assert await outcomes(waiting) == ["ok"] * 1_002
    await store.write([Change(1, 1, 1, 1)])
    store.close()


class FailingAnswer(asyncio.Future[EventId]):
    def set_result(self, _: EventId) -> None:
        raise OSError("no room for an answer")


async def test_an_answer_that_fails_takes_no_other_along(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    leaving = store.write([Change(3, 3, 0, 1)])
    store.submit(FailingAnswer(), [Change(3, 3, 1, 1)], None, None)
    staying = store.write([Change(3, 3, 2, 1)])
    leaving.cancel()
    await staying
    assert caplog.text.count("a write was made, but not answered") == 1
    assert await store.colour(3, 3) == (0, 1, 1)


async def test_a_batch_that_grows_while_it_is_put_back_is_counted_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a node that is not the master any more has refused it."""
    commit = GroupCommit._commit
    joined: list[asyncio.Future[EventId]] = []

    async def put_back(commits: GroupCommit, _: Connection, batch: _Batch) -> None:
        monkeypatch.setattr(GroupCommit, "_commit", commit)
        commits._put_back(batch)
        joined.append(submit(commits, Change(2, 2, 0, 1)))

    monkeypatch.setattr(GroupCommit, "_commit", put_back)
    event = await store.write([Change(1, 1, 0, 1)])
    assert await joined[0] == event
    assert store._commits._depth == 0


async def test_a_hung_redis_is_a_503_within_a_second_and_recovers(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    fragile_redis.pause()
    started = time.monotonic()
    late = asyncio.ensure_future(fragile.write([Change(0, 0, 0, 1)]))
    await asyncio.sleep(0.3)
    results = await outcomes(
        [late, fragile.write([Change(1, 0, 0, 1)]), *[fragile.probe() for _ in range(3)]]  # type: ignore[list-item]
    )
    assert time.monotonic() - started < 0.3 + 1
    assert results[0] == "Redis didn't answer; the write may have been made."
    assert set(results[1:]) == {"Redis can't be reached; nothing was written."}
    with pytest.raises(Problem):
        await fragile.colour(0, 0)
    assert time.monotonic() - started < 0.3 + 2
    # While Redis doesn't answer, new writes are refused at once.
    asked = time.monotonic()
    assert await outcomes([late_probe(fragile)]) == ["Redis can't be reached; nothing was written."]
    assert time.monotonic() - asked < 0.05
    fragile_redis.resume()
    while await outcomes([late_probe(fragile)]) != ["ok"]:
        assert time.monotonic() - asked < 2
        await asyncio.sleep(0.05)
    await fragile.write([Change(1, 0, 0, 2)])
    assert await fragile.colour(1, 0) == (2, 0, 0)


async def test_only_the_writes_in_flight_fail_when_the_connection_is_lost(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    fragile_redis.pause()
    in_flight = asyncio.ensure_future(fragile.write([Change(0, 0, 0, 1)]))
    await asyncio.sleep(0.02)
    behind = [asyncio.ensure_future(fragile.write([Change(n, 0, 0, 2)])) for n in range(1, 9)]
    await asyncio.sleep(0.02)
    fragile_redis.kill()
    fragile_redis.start()
    assert await outcomes([in_flight]) == ["Redis didn't answer; the write may have been made."]
    assert await outcomes(behind) == ["ok"] * 8
    assert all(stored(fragile_redis, Change(n, 0, 0, 0)) == 2 for n in range(1, 9))


async def test_a_restart_of_redis_between_writes_fails_no_request(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    await fragile.write([Change(3, 3, 0, 3)])
    fragile_redis.kill()
    fragile_redis.start()
    await asyncio.sleep(0.05)  # lets the loop notice it
    await fragile.write([Change(4, 4, 0, 4)])
    assert await fragile.colour(3, 3) == (3, 0, 0)


async def test_acknowledged_writes_survive_a_kill_of_redis(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    acknowledged: dict[int, int] = {}
    stop = False

    async def write_on(x: int) -> None:
        value = 0
        while not stop:
            value = value % 255 + 1
            try:
                await fragile.write([Change(x, 9, 0, value)])
                acknowledged[x] = value
                uncertain.pop(x, None)
            except Problem:
                uncertain.setdefault(x, set()).add(value)

    uncertain: dict[int, set[int]] = {}
    writers = [asyncio.create_task(write_on(x)) for x in range(20)]
    for _ in range(3):
        await asyncio.sleep(0.15)
        fragile_redis.kill()
        fragile_redis.start()
    await asyncio.sleep(0.15)
    stop = True
    await asyncio.gather(*writers)
    for x, value in acknowledged.items():
        assert stored(fragile_redis, Change(x, 9, 0, 0)) in {value, *uncertain.get(x, ())}


async def test_a_stopped_redis_is_a_503_within_a_second(fragile_redis: RedisServer) -> None:
    fragile_redis.kill()
    store = Store(fragile_redis.settings())
    started = time.monotonic()
    results = await outcomes([store.write([Change(0, 0, 0, 1)]), store.probe()])  # type: ignore[list-item]
    assert set(results) == {"Redis can't be reached; nothing was written."}
    with pytest.raises(Problem):
        await store.colour(0, 0)
    assert time.monotonic() - started < 1.2
    fragile_redis.start()
    await asyncio.sleep(0.5)
    await store.write([Change(0, 0, 0, 1)])
    store.close()


async def test_the_pauses_between_connection_attempts_grow(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[float] = []

    async def refuse(server: Server) -> Connection:
        task = asyncio.current_task()
        if task and task.get_name() == "group commit":
            attempts.append(time.monotonic())
        raise ConnectionRefusedError

    store = Store(redis_server.settings())
    with monkeypatch.context() as away:
        away.setattr(Connection, "open", refuse)
        assert await outcomes([store.write([Change(0, 0, 0, 1)])]) != ["ok"]
        await asyncio.sleep(1)
    pauses = [after - before for before, after in pairwise(attempts)]
    assert 3 <= len(pauses) <= 8
    # Each pause is twice as long as the previous one; a busy machine only lengthens it.
    for number, pause in enumerate(pauses[:4]):
        assert pause > 0.95 * 0.02 * 2**number
    await store.write([Change(0, 0, 0, 1)])
    store.close()


async def test_a_redis_out_of_memory_writes_nothing_and_says_so(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    with fragile_redis.admin() as admin:
        admin.config_set("maxmemory", 1)
        admin.config_set("maxmemory-policy", "noeviction")
        assert await outcomes([fragile.write([Change(0, 0, 0, 1)])]) == [
            "Redis refuses writes; nothing was written."
        ]
        assert stored(fragile_redis, Change(0, 0, 0, 1)) == 0
        with pytest.raises(Problem):
            await fragile.probe()
        admin.config_set("maxmemory", 0)
    await fragile.write([Change(0, 0, 0, 1)])
    with fragile_redis.admin() as admin:
        assert admin.strlen(TILE_00) == TILE_BYTES


async def test_an_internal_error_fails_only_its_own_batch(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("pixel.commit.pack", lambda changes: 1 / 0)
        assert await outcomes([store.write([Change(0, 0, 0, 1)])]) == [
            "This is a fault of the server, and it is logged; the write may have been made."
        ]
    assert "ZeroDivisionError" in caplog.text
    await store.write([Change(0, 0, 0, 1)])


async def test_a_wrong_password_is_a_503_and_stays_secret(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = redis_server.settings().model_copy(update={"redis_password": None})
    store = Store(settings)
    assert await outcomes([store.write([Change(0, 0, 0, 1)])]) != ["ok"]
    store.close()
    store = Store(redis_server.settings(redis_timeout=0.2).model_copy(
        update={"redis_username": "nobody"}
    ))  # fmt: skip
    assert await outcomes([store.write([Change(0, 0, 0, 1)])]) != ["ok"]
    store.close()
    assert "WRONGPASS" in caplog.text
    assert "correct-horse" not in caplog.text


LEFT_OUT = [
    "ACL WHOAMI", "BLPOP pixel:a 1", "CLIENT LIST", "CONFIG GET maxmemory", "COPY pixel:a pixel:b",
    "DEL pixel:events", "DUMP pixel:events", "EVALSHA 0 0", "FCALL f 0", "FLUSHALL", "FLUSHDB",
    "HDEL pixel:a b", "INFO", "KEYS *", "LPUSH pixel:a b", "MONITOR", "PUBLISH a b",
    "RENAME pixel:a pixel:b",
    "SAVE", "SCAN 0", "SETRANGE pixel:a 536870911 b", "SHUTDOWN", "SORT pixel:a",
    "UNLINK pixel:a", "XDEL pixel:events 1-1", "XINFO GROUPS pixel:events",
    "XTRIM pixel:events MAXLEN 0",
]  # fmt: skip


async def test_the_application_can_use_its_commands_and_keys_only(
    redis_server: RedisServer,
) -> None:
    with redis.Redis(
        unix_socket_path=str(redis_server.socket),
        username="pixel",
        password="correct-horse",
        protocol=2,
    ) as user:
        for command in LEFT_OUT:
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command.split())
        with pytest.raises(redis.exceptions.NoPermissionError):
            user.get("other")
        # A script has no more rights than its user.
        for command in ("'FLUSHALL'", "'GET', 'other'"):
            with pytest.raises(redis.exceptions.ResponseError, match="user executing the script can't"):
                user.eval(f"return redis.call({command})", 0)


async def test_the_application_uses_all_of_its_commands_and_no_others(
    redis_server: RedisServer,
) -> None:
    with redis_server.admin() as admin:
        admin.acl_log_reset()
        admin.config_resetstat()
        store = Store(redis_server.settings())
        hub = Hub(store, redis_server.settings())
        await store.probe()
        writer = Writer("key:a", budget_key("key:a"), Budget(60, 2))
        event = await store.write([Change(1, 1, 0, 1), Change(300, 1, 0, 1)], writer=writer)
        command = keys.parse(["create", "a", "--scopes", "paint"])
        await keys.execute(command, Redis(redis_server.settings()))
        assert list((await store.keys())[1]) == ["a"]
        assert await store.colour(1, 1) == (1, 0, 0)
        assert (await store.snapshot([TILE_00]))[0] == await store.last_event() == event
        assert await store.count_viewers(3) == 3
        await hub.prepare()
        stream = hub.stream(EventId(0, 0))
        for _ in range(2):
            await anext(stream)
        await asyncio.sleep(0.1)
        await stream.aclose()  # type: ignore[attr-defined]
        hub.close()
        await asyncio.sleep(0.1)
        store.close()
        assert admin.acl_log() == []
        used = {name.removeprefix("cmdstat_") for name in admin.info("commandstats")}
    assert set(APP_COMMANDS) <= used
    of_this_test = {"auth", "acl|log", "client|setinfo", "config|resetstat", "info"}
    assert used - set(APP_COMMANDS) <= of_this_test


def test_a_process_that_was_stopped_for_a_while_writes_again(redis_server: RedisServer) -> None:
    """Replies that arrive while the process is stopped have timed out when it reads them."""

    async def write() -> None:
        store = Store(redis_server.settings(redis_timeout=0.2, start_limit=0.2))
        try:
            await store.write([Change(1, 1, 0, 1)])
            late = store.write([Change(1, 1, 0, 2)])
            time.sleep(0.5)  # noqa: ASYNC251 - as SIGSTOP and SIGCONT
            with pytest.raises(Problem):
                await late
            await store.write([Change(1, 1, 0, 3)])
        finally:
            store.close()

    # Unlike asyncio's loop, uvloop looks at the clock before it wakes waiting tasks.
    uvloop.run(write())
