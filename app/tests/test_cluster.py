"""Writes to a Redis Cluster whose nodes fail: no acknowledged write is lost or undone."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
from conftest import PASSWORD
from redis_cluster import (
    CLUSTER_COMMANDS,
    MASTER,
    REPLICAS,
    VOTERS,
    ClusterNode,
    Ledger,
    RedisCluster,
)

from pixel import cluster as cluster_module
from pixel import keys, metrics
from pixel.canvas import Region
from pixel.cluster import Node, Redis, Replicas
from pixel.events import Hub
from pixel.history import queries
from pixel.history.archive import Archive
from pixel.history.follower import Follower
from pixel.link import Link
from pixel.metrics import PROCESS
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.resp import Command, Connection, Server
from pixel.settings import Settings
from pixel.store import Store
from pixel.stream import EventId, epoch_fields

pytestmark = pytest.mark.timing

TOO_FEW = "Too few replicas of Redis have acknowledged it; the write may have been made."


@pytest.fixture
def cluster() -> Iterator[RedisCluster]:
    cluster = RedisCluster()
    yield cluster
    cluster.remove()


@pytest.fixture
async def stores(cluster: RedisCluster, request: pytest.FixtureRequest) -> AsyncIterator[list[Store]]:
    """The stores of two workers; the parameter holds further settings."""
    stores = [Store(cluster.settings(**getattr(request, "param", {}))) for _ in range(2)]
    for store in stores:
        await store.probe()
    yield stores
    for store in stores:
        store.close()


async def wait_for(true: Callable[[], object], seconds: float = 15) -> None:
    """Wait until a condition is true, without blocking the event loop."""
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def writes_again(ledger: Ledger, since: float, seconds: float = 15) -> None:
    """Wait until a write that began after a time is acknowledged."""
    await wait_for(lambda: ledger.successes and ledger.successes[-1] > since + 0.1, seconds)


def is_failed(cluster: RedisCluster, node: ClusterNode) -> bool:
    """Whether the majority calls a node failed."""
    return "fail" in cluster.nodes[VOTERS[0]].flags(node)


async def paused_master(cluster: RedisCluster, seconds: float) -> None:
    cluster.nodes[MASTER].pause()
    await asyncio.sleep(seconds)
    cluster.nodes[MASTER].resume()


async def killed_master(cluster: RedisCluster) -> None:
    cluster.nodes[MASTER].kill()


async def killed_master_that_returns(cluster: RedisCluster) -> None:
    cluster.nodes[MASTER].kill()
    await asyncio.sleep(3)
    await asyncio.to_thread(cluster.nodes[MASTER].start)
    await wait_for(cluster.is_complete, 20)


async def killed_replica(cluster: RedisCluster) -> None:
    cluster.nodes[REPLICAS[0]].kill()


async def killed_replica_that_returns(cluster: RedisCluster) -> None:
    await killed_replica(cluster)
    await asyncio.sleep(3)
    await asyncio.to_thread(cluster.nodes[REPLICAS[0]].start)
    await wait_for(cluster.is_complete, 20)


async def stale_replica(cluster: RedisCluster) -> None:
    """A replica that has missed writes returns in the moment in which its master dies."""
    stale = cluster.nodes[REPLICAS[0]]
    stale.pause()
    await wait_for(lambda: is_failed(cluster, stale))
    await asyncio.sleep(2)  # writes are acknowledged without it
    stale.resume()
    cluster.nodes[MASTER].kill()


@pytest.mark.parametrize(
    "fault",
    [
        killed_master,
        killed_master_that_returns,
        lambda cluster: paused_master(cluster, 3),
        lambda cluster: paused_master(cluster, 10),
        killed_replica,
        killed_replica_that_returns,
        stale_replica,
    ],
    ids=[
        "killed",
        "killed and started",
        "paused 3 s",
        "paused 10 s",
        "replica killed",
        "replica killed and started",
        "stale replica",
    ],
)
async def test_a_fault_loses_no_acknowledged_write_and_undoes_none(
    cluster: RedisCluster, stores: list[Store], fault: Callable[[RedisCluster], Awaitable[None]]
) -> None:
    ledger = Ledger(*stores)
    await asyncio.sleep(1)
    await fault(cluster)
    await writes_again(ledger, time.monotonic())
    await asyncio.sleep(1)
    await ledger.stop()
    ledger.check(await asyncio.to_thread(cluster.master))
    assert ledger.longest < 1.2
    assert ledger.outage() < 8


# Longer than usual: the machine may be busy.
@pytest.mark.parametrize("stores", [{"start_limit": 3}], indirect=True, ids=[""])
async def test_a_planned_switch_fails_no_write_and_no_read(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    ledger = Ledger(*stores)
    reads: list[tuple[int, int, int]] = []

    async def read() -> None:
        while True:
            reads.append(await stores[0].colour(0, 0))
            await asyncio.sleep(0.005)

    reading = asyncio.create_task(read())
    # Voters accept no second switch away from the same master within twice the node timeout.
    for place in (1, 2, 0):
        await asyncio.sleep(0.5)
        await asyncio.to_thread(cluster.nodes[place].ask, "CLUSTER", "FAILOVER")
        await wait_for(lambda place=place: cluster.master() is cluster.nodes[place])  # type: ignore[misc]
        await wait_for(cluster.is_complete)
    await asyncio.sleep(0.5)
    await ledger.stop()
    reading.cancel()
    ledger.check(cluster.master())
    assert ledger.failures == []
    assert ledger.outage() < 2
    values = [red | green << 8 | blue << 16 for red, green, blue in reads]
    assert values == sorted(values)
    assert len(set(values)) > 50


async def test_a_master_that_refuses_to_wait_has_been_replaced(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica refuses WAIT; the batch's event is on the new master."""
    wait = Replicas.wait

    def refused(replicas: Replicas, seconds: float) -> list[Command]:
        monkeypatch.setattr(Replicas, "wait", wait)
        return [("WAIT", "refused", 0)]

    monkeypatch.setattr(Replicas, "wait", refused)
    await stores[0].write([Change(0, 0, 0, 1)])


async def test_the_replicas_of_a_new_connection_are_counted_anew(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    await stores[0].write([Change(0, 0, 0, 1)])
    assert PROCESS.get_sample_value("pixel_replicas") == 2
    for place in REPLICAS:
        cluster.nodes[place].kill()
    cluster.nodes[MASTER].ask("CLIENT", "KILL", "USER", "pixel")
    # The second one uses a new connection.
    for value in (2, 3):
        with pytest.raises(Problem):
            await stores[0].write([Change(0, 0, 0, value)])
    await wait_for(lambda: PROCESS.get_sample_value("pixel_replicas") == 0)


async def test_without_any_replica_a_write_is_a_503_within_a_second(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    for place in REPLICAS:
        cluster.nodes[place].kill()
    started = time.monotonic()
    with pytest.raises(Problem, match=TOO_FEW) as caught:
        await stores[0].write([Change(0, 0, 0, 1)])
    assert caught.value.written == "maybe"
    assert time.monotonic() - started < 1
    await wait_for(lambda: all(is_failed(cluster, cluster.nodes[place]) for place in REPLICAS))
    # Further writes wait, later they are refused at once; they are not sent.
    for longest in (1, 1, 1, 0.1):
        started = time.monotonic()
        with pytest.raises(Problem, match="nothing was written"):
            await stores[0].write([Change(0, 0, 0, 2)])
        assert time.monotonic() - started < longest
    assert stores[0].replicas == 0
    assert await stores[0].colour(0, 0) == (1, 0, 0)
    await asyncio.to_thread(cluster.nodes[REPLICAS[0]].start)
    await can_write(stores[0])


async def can_write(store: Store, seconds: float = 10) -> None:
    """Wait until a store writes."""
    end = time.monotonic() + seconds
    while True:
        try:
            await store.probe()
        except Problem:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        else:
            return


def counted_replicas() -> float:
    [metric] = metrics.REPLICAS.collect()
    return metric.samples[0].value


def links(master: ClusterNode) -> list[tuple[str, int]]:
    """The states of the replicas, as their master knows them, and what they have acknowledged."""
    info = master.info("replication")
    return [
        (info[f"slave{n}"]["state"], info[f"slave{n}"]["offset"]) for n in range(info["connected_slaves"])
    ]


async def can_not_be_elected(cluster: RedisCluster, replica: ClusterNode) -> None:
    replica.ask("CONFIG", "SET", "cluster-replica-no-failover", "yes")
    await wait_for(lambda: "nofailover" in cluster.nodes[MASTER].flags(replica))
    await asyncio.sleep(0.5)  # the workers know it too


async def test_a_replica_that_can_not_be_elected_is_not_waited_for(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    replica = cluster.nodes[REPLICAS[0]]
    await can_write(stores[0])
    assert counted_replicas() == 2
    await can_not_be_elected(cluster, replica)
    ledger = Ledger(*stores)
    await asyncio.sleep(0.5)
    assert counted_replicas() == 1
    replica.kill()
    await wait_for(lambda: is_failed(cluster, replica))
    await asyncio.to_thread(replica.start, "--cluster-replica-no-failover", "yes")
    await wait_for(cluster.is_complete)
    await asyncio.sleep(0.5)
    await ledger.stop()
    ledger.check(cluster.nodes[MASTER])
    assert ledger.failures == []


async def test_a_replica_that_can_not_be_elected_stands_in_for_no_other(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    """If the master dies while the other one is stopped, the other one is elected."""
    master, electable, other = cluster.nodes[:3]
    await can_not_be_elected(cluster, other)
    for store in stores:
        await store.write([Change(0, 0, 0, 1)])
    electable.pause()
    for store in stores:
        with pytest.raises(Problem, match=TOO_FEW):
            await store.write([Change(0, 0, 0, 2)])
    # When the majority calls it failed, it is not waited for.
    await wait_for(lambda: is_failed(cluster, electable))
    for store in stores:
        await can_write(store)
    electable.resume()
    await wait_for(cluster.is_complete)
    # Its link to the master is cut; for the majority it has not failed.
    electable.ask("CONFIG", "SET", "masterauth", "wrong")
    electable.ask("CLIENT", "KILL", "TYPE", "master")
    await wait_for(lambda: master.info("replication")["connected_slaves"] == 1)
    await asyncio.sleep(0.5)
    for store in stores:
        with pytest.raises(Problem):
            await store.write([Change(0, 0, 0, 3)])
    electable.ask("CONFIG", "SET", "masterauth", PASSWORD)
    for store in stores:
        await can_write(store)


async def test_a_replica_that_loads_what_it_has_copied_delays_no_write(
    cluster: RedisCluster, stores: list[Store]
) -> None:
    """The master calls it online by then, and it acknowledges nothing."""
    await stores[0].write([Change(x, y, 0, 1) for x in range(0, 1024, 256) for y in range(0, 1024, 256)])
    replica = cluster.nodes[REPLICAS[0]]
    replica.kill()
    shutil.rmtree(replica.directory / "appendonlydir")
    await wait_for(lambda: is_failed(cluster, replica))
    ledger = Ledger(*stores)
    # It takes 0.1 s to load each of the 18 keys.
    slow = ["--key-load-delay", "100000", "--cluster-replica-no-failover", "yes"]
    # It may answer for the first time only when it has loaded them.
    starting = asyncio.create_task(asyncio.to_thread(replica.start, *slow))
    await wait_for(lambda: ("online", 0) in links(cluster.nodes[MASTER]))
    await starting
    await wait_for(cluster.is_complete)
    await asyncio.sleep(1)
    await ledger.stop()
    ledger.check(cluster.nodes[MASTER])
    assert ledger.failures == []


async def test_a_replica_counts_when_its_log_is_complete(cluster: RedisCluster, stores: list[Store]) -> None:
    """After a full resynchronisation, Redis's WAIT counts a replica whose log is still being rewritten."""
    await stores[0].write([Change(x, y, 0, 1) for x in range(0, 1024, 256) for y in range(0, 1024, 256)])
    replica, other = (cluster.nodes[place] for place in REPLICAS)
    replica.kill()
    other.kill()
    await wait_for(lambda: is_failed(cluster, replica) and is_failed(cluster, other))
    # Its rewrite takes 0.2 s for each of the 17 keys.
    await asyncio.to_thread(replica.start, "--rdb-key-save-delay", "200000")
    await wait_for(lambda: replica.info("replication")["master_link_status"] == "up")
    rewriting = 0
    for _ in range(10):
        if not (await asyncio.to_thread(replica.info, "persistence"))["aof_rewrite_in_progress"]:
            break
        for store in stores:
            with pytest.raises(Problem, match="nothing was written"):
                await store.probe()
        assert int(cluster.nodes[MASTER].ask("WAIT", 1, 10)) == 1
        rewriting += 1
        await asyncio.sleep(0.1)
    assert rewriting >= 3
    for store in stores:
        await can_write(store)
    assert not replica.info("persistence")["aof_rewrite_in_progress"]


async def test_a_viewer_of_a_deposed_master_ends_with_the_true_canvas(
    cluster: RedisCluster, tmp_path: Path
) -> None:
    """The master executes a write that no replica gets, shows it to viewers, and is deposed."""
    settings = cluster.settings(redis_timeout=0.4)
    store = Store(settings)
    hub = Hub(store, settings)
    archive = Archive(tmp_path / "history.sqlite")
    link = Link(Redis(settings), 1)
    follower = Follower(archive, link, Region(0, 0, 1024, 1024))
    following = asyncio.create_task(follower.run())
    true = await store.write([Change(1, 1, 0, 1)])
    await hub.prepare()
    received = bytearray()

    async def view() -> None:
        async for frame in hub.stream(None):
            received.extend(frame)

    viewing = asyncio.create_task(view())
    await asyncio.sleep(0.3)
    master, *others = cluster.nodes
    for node in others:
        node.pause()
    master.ask("CLIENT", "KILL", "TYPE", "replica")
    with pytest.raises(Problem, match=TOO_FEW):
        await store.write([Change(2, 2, 0, 99)])
    await wait_for(lambda: b'[2,2,"R",99]' in received)
    phantom = await store.last_event()
    assert phantom > true
    assert phantom.epoch == true.epoch == 1
    master.pause()
    for node in others:
        node.resume()
    await wait_for(lambda: cluster.master() is not master)
    master.resume()
    await wait_for(cluster.is_complete)
    await can_write(store)
    newest = await store.write([Change(3, 3, 0, 3)])
    assert newest.epoch > phantom.epoch
    await wait_for(lambda: b"event: resync" in received)
    assert await store.colour(2, 2) == (0, 0, 0)
    # A position that the new master has is valid; one that only the deposed one had is not.
    assert [event for event, _ in (await store.events(true)).records] == [newest]
    assert not (await store.events(phantom)).complete
    await wait_for(lambda: archive.position.event == newest and not archive.position.due)
    [gap] = queries.gaps(tmp_path / "history.sqlite")
    assert gap.reason == "diverged"
    viewing.cancel()
    following.cancel()
    await asyncio.wait([viewing, following])
    hub.close()
    link.close()
    store.close()
    archive.close()


async def test_any_node_leads_to_the_master(cluster: RedisCluster) -> None:
    """Also one that only votes, and one that no longer runs; and nodes that are not among the seeds."""
    cluster.nodes[REPLICAS[0]].kill()
    voter, gone = cluster.nodes[VOTERS[1]], cluster.nodes[REPLICAS[0]]
    settings = cluster.settings().model_copy(
        update={"redis_url": f"redis://127.0.0.1:{voter.port},redis://127.0.0.1:{gone.port}"}
    )
    found = Redis(settings)
    assert (await found.find()).server.port == cluster.nodes[MASTER].port
    # The only seed that runs dies; the others are known by now.
    voter.kill()
    assert (await found.find()).server.port == cluster.nodes[MASTER].port


async def test_the_commands_of_operators_wait_for_replicas(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = keys.parse(["create", "a", "--scopes", "paint"])
    await keys.execute(command, Redis(cluster.settings()))
    store = Store(cluster.settings())
    assert list((await store.keys())[1]) == ["a"]
    store.close()
    connection = await Redis(cluster.settings()).open(Connection)
    await Redis(cluster.settings()).confirm(connection)
    monkeypatch.setattr(cluster_module, "CONFIRM", 0.2)
    cluster.nodes[MASTER].pause()
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionError, match="too few replicas"):
            await Redis(cluster.settings()).confirm(connection)
    cluster.nodes[MASTER].resume()
    connection.close()
    for place in REPLICAS:
        cluster.nodes[place].kill()
    with pytest.raises(ConnectionError, match="too few replicas"):
        await keys.execute(keys.parse(["rotate", "a"]), Redis(cluster.settings()))


async def test_the_application_uses_all_of_its_cluster_commands(cluster: RedisCluster) -> None:
    nodes = cluster.nodes[:3]
    for node in nodes:
        node.ask("ACL", "LOG", "RESET")
        node.ask("CONFIG", "RESETSTAT")
    store = Store(cluster.settings())
    await store.write([Change(1, 1, 0, 1)])
    assert await store.colour(1, 1) == (1, 0, 0)
    used = {name.removeprefix("cmdstat_") for name in nodes[MASTER].info("commandstats")}
    store.close()
    assert set(CLUSTER_COMMANDS) <= used
    for node in nodes:
        assert not node.ask("ACL", "LOG")
    with redis.Redis(port=nodes[0].port, username="pixel", password="correct-horse", protocol=2) as user:
        for words in ("CLUSTER FAILOVER", "CLUSTER RESET", "CLUSTER FORGET x", "REPLICAOF NO ONE"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*words.split())


@pytest.mark.parametrize(
    ("line", "host", "port"),
    [
        ("a 10.0.0.1:6379@16379 master - 0 0 3 connected 0-16383", "10.0.0.1", 6379),
        ("a 10.0.0.1:6379@16379,redis1.example master - 0 0 3 connected 0-16383", "redis1.example", 6379),
        ("a ::1:7000@17000,,shard-id=5 myself,master - 0 0 3 connected 0-16383", "::1", 7000),
        ("a :6379@16379 myself,master - 0 0 3 connected 5 13907", "", 6379),
        ("a 10.0.0.1:6379@16379 master,fail - 0 0 3 disconnected 13000-14000 [5->-b]", "10.0.0.1", 6379),
    ],
)
def test_a_node_is_parsed(line: str, host: str, port: int) -> None:
    node = Node.parse(line)
    assert (node.host, node.port, node.epoch, node.is_owner) == (host, port, 3, True)


@pytest.mark.parametrize("text", [b"1795225898442-0", b"1795225898442-3-7"])
def test_an_event_id_is_parsed_and_written(text: bytes) -> None:
    event = EventId.parse(text)
    assert event.text() == text
    assert event == (1795225898442, *map(int, text.split(b"-")[1:]), *[0] * (text.count(b"-") == 1))
    assert event.in_redis() == b"-".join(text.split(b"-")[:2])
    assert EventId.of((event.in_redis(), [b"c", b"x", *map(_bytes, epoch_fields(event.epoch))])) == event
    assert EventId.of((event.in_redis(), [b"c", b"e", b"a", b"e"])).epoch == 0


def _bytes(value: str | int) -> bytes:
    return str(value).encode()


@pytest.mark.parametrize(
    "text", [b"", b"1", b"1-", b"1-2-", b"1-2-3-4", b"1-x", b"-1-2", b"1--2", b"9" * 63 + b"-0"]
)
def test_other_texts_are_no_event_ids(text: bytes) -> None:
    with pytest.raises(ValueError, match="looks like"):
        EventId.parse(text)


@pytest.mark.parametrize(
    ("linked", "electable", "known", "spare"),
    [
        ("ab", "ab", "ab", 0),
        ("bc", "b", "bc", 1),
        ("c", "b", "bc", 1),
        ("b", "b", "bc", 0),
        ("bc", "", "bc", 2),
        # Behind NAT: as many as can be elected are taken for those.
        ("xy", "ab", "ab", 0),
        ("xx", "b", "bc", 1),
        ("bx", "b", "bc", 1),
        ("x", "b", "bc", 0),
    ],
)
def test_linked_replicas_that_can_not_be_elected_are_counted(
    linked: str, electable: str, known: str, spare: int
) -> None:
    assert cluster_module._spare([*linked], {*electable}, {*known}) == spare


def test_a_node_without_the_slot_is_no_owner() -> None:
    for slots in ("", " 0-13906", " 13908-16383", " [13907-<-b]"):
        assert not Node.parse(f"a 10.0.0.1:6379@16379 master - 0 0 3 connected{slots}").is_owner


async def test_the_claim_with_the_highest_epoch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deposed master that is cut off goes on claiming the canvas."""
    views = {
        1: ["a 127.0.0.1:1@2 myself,master - 0 0 1 connected 0-16383"],
        2: ["a 127.0.0.1:1@2 master - 0 0 1 connected", "b 127.0.0.1:2@3 master - 0 0 7 connected 0-16383"],
        3: ["a 127.0.0.1:1@2 master,fail - 0 0 1 connected 0-16383"],
    }

    async def nodes(_: Redis, server: Server) -> list[Node] | None:
        return [Node.parse(line) for line in views[server.port]] if server.port in views else None

    monkeypatch.setattr(Redis, "nodes", nodes)
    seeds = ",".join(f"redis://127.0.0.1:{port}" for port in (1, 3, 2, 4))
    master, epoch = await Redis(Settings(redis_url=seeds)).find()
    assert (master.port, epoch) == (2, 7)
    with pytest.raises(OSError, match="no node of the cluster"):
        await Redis(Settings(redis_url="redis://127.0.0.1:5,redis://127.0.0.1:6")).find()
