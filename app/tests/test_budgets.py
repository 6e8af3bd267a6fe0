"""Budgets: the script in Redis, and the group commit that charges them."""

import asyncio
import json
import re
from itertools import pairwise

import pytest
from conftest import RedisServer
from hypothesis import given
from hypothesis import strategies as st
from test_store import stored

from pixel.budgets import Budgets, Charge, Writer
from pixel.lifetime import RedisClock
from pixel.names import EVENTS, budget_key, lease_key
from pixel.pixel import RECORD_BYTES, Change
from pixel.problems import Problem
from pixel.resp import Connection, ReplyError, Server
from pixel.settings import Budget
from pixel.store import Store
from pixel.stream import EVENT_CHANGES, EventId

LEASE = lease_key("test")

SLOW = 1
"""A rate at which a budget regains nothing during a test."""


def writer(name: str, burst: int, per_minute: int = SLOW) -> Writer:
    return Writer(f"key:{name}", budget_key(f"key:{name}"), Budget(per_minute, burst))


async def outcome(written: asyncio.Future[EventId]) -> int:
    """The status of a write's answer."""
    try:
        await written
    except Problem as problem:
        return int(problem.status)
    return 200


def charged(server: RedisServer) -> int:
    """How many times Redis was asked about budgets."""
    with server.admin() as admin:
        return int(admin.info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"])


WRITERS = [writer("a", 5), writer("b", 9), None, Writer("key:c")]
REQUESTS = st.tuples(st.sampled_from(WRITERS), st.integers(1, 4))


@given(batches=st.lists(st.lists(REQUESTS, min_size=1, max_size=12), min_size=1, max_size=4))
def test_each_budget_is_spent_in_the_order_of_the_requests(
    redis_server: RedisServer, batches: list[list[tuple[Writer | None, int]]]
) -> None:
    """A batch is allowed as a counter for each writer allows it; the lease exists only if all of it is."""

    async def ask() -> None:
        with redis_server.admin() as admin:
            admin.flushall()
        connection = await Connection.open(Server.of(redis_server.settings()))
        budgets = Budgets(RedisClock())
        left = {writer.account: writer.budget.burst for writer in WRITERS if writer and writer.budget}
        for batch in batches:
            charge = Charge(batch)
            replies = await connection.execute(
                [("EXPIRE", LEASE, 0), charge.command(LEASE, 4e9), ("GET", LEASE)]
            )
            expected = []
            for who, cost in batch:
                fits = who is None or who.budget is None or cost <= left[who.account]
                if fits and who and who.budget:
                    left[who.account] -= cost
                expected.append(fits)
            problems = charge.problems(replies[1], budgets)
            assert [problem is None for problem in problems] == expected
            assert replies[2] == (b"1" if all(expected) else None)
        connection.close()

    asyncio.run(ask())


async def test_a_budget_is_regained_with_time(store: Store) -> None:
    painter = writer("painter", 3, per_minute=600)
    change = [Change(0, 0, 0, 1)]
    assert [await outcome(store.write(change, writer=painter)) for _ in range(5)] == [200] * 3 + [429] * 2
    await asyncio.sleep(0.15)
    assert [await outcome(store.write(change, writer=painter)) for _ in range(2)] == [200, 429]
    await asyncio.sleep(0.5)
    assert [await outcome(store.write(change, writer=painter)) for _ in range(4)] == [200] * 3 + [429]


async def test_two_workers_share_one_budget(store: Store, redis_server: RedisServer) -> None:
    other = Store(redis_server.settings())
    painter = writer("painter", 50)
    writes = [
        outcome(worker.write([Change(n, 0, 0, 1)], writer=painter))
        for n in range(60)
        for worker in (store, other)
    ]
    answers = await asyncio.gather(*writes)
    other.close()
    assert (answers.count(200), answers.count(429)) == (50, 70)
    with redis_server.admin() as admin:
        events = admin.xrange(EVENTS)
    assert sum(len(fields[b"c"]) for _, fields in events) == 50 * RECORD_BYTES


async def test_what_is_refused_is_not_written_and_does_not_disturb_others(
    store: Store, redis_server: RedisServer
) -> None:
    await store.probe()
    poor, rich = writer("poor", 4), writer("rich", 1000)
    writes = [store.write([Change(99, 0, 0, 9)])]  # in flight while the others wait
    writes += [store.write([Change(n, 0, c, 1) for c in range(3)], writer=poor) for n in range(3)]
    writes += [store.write([Change(n, 1, 0, 1)], writer=rich) for n in range(3)]
    writes += [store.write([Change(n, 2, 0, 1)]) for n in range(3)]
    answers = await asyncio.gather(*map(outcome, writes))
    assert answers == [200, 200, 429, 429, 200, 200, 200, 200, 200, 200]
    assert [stored(redis_server, Change(n, 0, 2, 1)) for n in range(3)] == [1, 0, 0]
    assert [stored(redis_server, Change(n, 2, 0, 1)) for n in range(3)] == [1, 1, 1]
    # One channel write of the four is left: the refused requests have cost nothing.
    assert await outcome(store.write([Change(0, 0, 0, 7)], writer=poor)) == 200
    assert await outcome(store.write([Change(0, 0, 0, 7)], writer=poor)) == 429


async def test_the_answer_to_a_refusal_says_when_to_come_again(store: Store) -> None:
    painter = writer("painter", 6, per_minute=60)
    assert await outcome(store.write([Change(0, 0, 0, 1)] * 5, writer=painter)) == 200
    assert store.budgets.fields(painter) == {
        "RateLimit-Policy": '"writes";q=6;w=6',
        "RateLimit": '"writes";r=1;t=5',
    }
    with pytest.raises(Problem, match="can be made in 2 s; nothing was written") as refusal:
        await store.write([Change(0, 0, 0, 1)] * 3, writer=painter)
    assert refusal.value.headers == {
        "Retry-After": "2",
        "RateLimit-Policy": '"writes";q=6;w=6',
        "RateLimit": '"writes";r=1;t=5',
    }
    assert store.budgets.fields(writer("new", 6)) == {
        "RateLimit-Policy": '"writes";q=6;w=360',
        "RateLimit": '"writes";r=6;t=0',
    }
    assert store.budgets.fields(Writer("key:free")) == store.budgets.fields(None) == {}


async def test_a_batch_larger_than_its_budget_is_refused(store: Store, redis_server: RedisServer) -> None:
    await store.probe()
    before = charged(redis_server)
    with pytest.raises(Problem, match="one request can write at most 6"):
        await store.write([Change(0, 0, 0, 1)] * 7, writer=writer("painter", 6))
    assert charged(redis_server) == before


async def test_a_worker_that_knows_of_an_empty_budget_does_not_ask_redis(
    store: Store, redis_server: RedisServer
) -> None:
    painter = writer("painter", 1)
    assert await outcome(store.write([Change(0, 0, 0, 1)], writer=painter)) == 200
    before = charged(redis_server)
    assert {await outcome(store.write([Change(0, 0, 0, 1)], writer=painter)) for _ in range(50)} == {429}
    assert charged(redis_server) == before


async def test_an_outage_of_redis_gives_no_free_budget_and_takes_none(fragile_redis: RedisServer) -> None:
    store = Store(fragile_redis.settings(redis_timeout=0.3, start_limit=0.3))
    painter = writer("painter", 10)
    change = [Change(0, 0, 0, 1)]
    assert {await outcome(store.write(change, writer=painter)) for _ in range(4)} == {200}
    fragile_redis.kill()

    async def attempt() -> int:
        try:
            return await outcome(store.write(change, writer=painter))
        except Problem as problem:
            return int(problem.status)

    for _ in range(6):
        assert await attempt() == 503
    fragile_redis.start()
    for _ in range(200):
        if await attempt() == 200:  # the fifth
            break
        await asyncio.sleep(0.05)
    assert [await attempt() for _ in range(6)] == [200] * 5 + [429]
    store.close()


async def test_if_a_budget_cannot_be_charged_only_its_writes_are_refused(
    store: Store, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    painter, other = writer("painter", 5), writer("other", 5)
    with redis_server.admin() as admin:
        admin.lpush(painter.account, "this is no number")
    await store.probe()
    free = store.write([Change(9, 9, 0, 1)])
    counted = [store.write([Change(n, 0, 0, 1)], writer=painter) for n in range(3)]
    late = store.write([Change(5, 9, 0, 1)])
    assert await asyncio.gather(*map(outcome, [free, *counted, late])) == [200, 503, 503, 503, 200]
    assert caplog.text.count("charging budgets in Redis fails") == 1
    assert stored(redis_server, Change(0, 0, 0, 1)) == 0
    assert await outcome(store.write([Change(1, 0, 0, 1)], writer=other)) == 200
    with redis_server.admin() as admin:
        admin.delete(painter.account)
    assert await outcome(store.write([Change(1, 0, 0, 1)], writer=painter)) == 200


async def test_without_permission_to_charge_budgets_the_service_is_not_ready(
    fragile_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with fragile_redis.admin() as admin:
        admin.execute_command("ACL", "SETUSER", "pixel", "-eval")
    # Nothing needs a budget.
    store = Store(fragile_redis.settings())
    await store.probe()
    assert await outcome(store.write([Change(0, 0, 0, 1)])) == 200
    assert await outcome(store.write([Change(0, 0, 0, 1)], writer=writer("painter", 5))) == 503
    assert await outcome(store.write([Change(0, 0, 0, 1)], writer=Writer("key:free"))) == 200
    store.close()
    # Every anonymous write does.
    store = Store(fragile_redis.settings(anonymous_budget=json.dumps({"per_minute": 60, "burst": 5})))
    with pytest.raises(Problem):
        await store.probe()
    assert re.search("writing to Redis fails: .*'?eval'?", caplog.text)
    store.close()


async def test_a_lapsed_lease_does_not_charge_a_budget_twice(
    store: Store, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = writer("painter", 2)
    await store.probe()
    command = Charge.command

    def late(self: Charge, lease: str, lease_end: float) -> tuple[str | bytes | int, ...]:
        monkeypatch.setattr(Charge, "command", command)
        return command(self, lease, 1)  # the lease has ended when the transaction comes

    monkeypatch.setattr(Charge, "command", late)
    change = [Change(0, 0, 0, 1)]
    assert [await outcome(store.write(change, writer=painter)) for _ in range(3)] == [200, 200, 429]
    assert charged(redis_server) >= 2


AUTHORS = [None, Writer(""), Writer("key:alice"), Writer("addr:192.0.2.7"), writer("bob", 10**6, 10**6)]


@given(
    requests=st.lists(
        st.tuples(st.sampled_from(AUTHORS), st.sampled_from([1, 1, 3, 700, 1024, 3000])), max_size=6
    )
)
def test_the_stream_names_the_author_of_each_change(
    redis_server: RedisServer, requests: list[tuple[Writer | None, int]]
) -> None:
    async def write() -> None:
        with redis_server.admin() as admin:
            admin.flushall()
            store = Store(redis_server.settings())
            await store.probe()
            writes = [
                store.write([Change(n, 0, 0, size % 256)] * size, writer=who)
                for n, (who, size) in enumerate(requests)
            ]
            await asyncio.gather(*writes)
            store.close()
            expected = [who.author if who else "" for who, size in requests for _ in range(size)]
            found = []
            for _, fields in admin.xrange(EVENTS):
                size = len(fields[b"c"]) // RECORD_BYTES
                assert size <= EVENT_CHANGES
                runs = json.loads(fields[b"a"]) if b"a" in fields else [["", size]]
                assert all(run[0] != after[0] for run, after in pairwise(runs))
                assert b"a" not in fields or any(name for name, _ in runs)
                assert sum(count for _, count in runs) == size
                found += [name for name, count in runs for _ in range(count)]
            assert found == expected

    asyncio.run(write())


async def test_events_with_and_without_authors_are_read_alike(store: Store) -> None:
    await store.write([Change(0, 0, 0, 1)])
    await store.write([Change(1, 0, 0, 1)], writer=Writer("key:alice"))
    await store.write([Change(2, 0, 0, 1)])
    events = await store.events(EventId(0, 0))
    assert [len(record) for _, record in events.records] == [RECORD_BYTES] * 3


def test_an_error_reply_of_redis_refuses_the_requests_with_a_budget() -> None:
    charge = Charge([(None, 1), (writer("a", 1), 1), (Writer("key:b"), 1)])
    problems = charge.problems(ReplyError("OOM"), Budgets(RedisClock()))
    assert [problem and (problem.status, problem.written) for problem in problems] == [
        None,
        (503, "no"),
        None,
    ]
