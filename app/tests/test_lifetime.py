"""A write that was given up is never made: the lease, the start limit, and the clocks."""

import asyncio
import http.client
import json
import os
import signal
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from conftest import RedisServer, Service, wait_until, worker_pids
from test_store import late_probe, outcomes, stored

from pixel import lifetime
from pixel.canvas import locate
from pixel.commit import GroupCommit
from pixel.lifetime import MustWaitError, RedisClock, StartLimit
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.resp import Connection, Server
from pixel.settings import Settings
from pixel.store import Store


@pytest.fixture
async def fragile(fragile_redis: RedisServer) -> AsyncIterator[Store]:
    store = Store(fragile_redis.settings())
    await store.probe()
    yield store
    store.close()


async def given_up(write: Awaitable[object]) -> Problem:
    with pytest.raises(Problem) as caught:
        await write
    return caught.value


async def ready(store: Store, seconds: float = 3) -> None:
    """Wait until the store writes again."""
    end = time.monotonic() + seconds
    while await outcomes([late_probe(store)]) != ["ok"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_what_lies_in_redis_buffer_when_it_is_given_up_is_never_made(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    """Redis stands still; what was sent to it is read after it goes on."""
    other = Store(fragile_redis.settings())
    await other.probe()
    fragile_redis.pause()
    old = asyncio.ensure_future(fragile.write([Change(5, 5, 0, 2)]))
    problem = await given_up(old)
    assert (problem.status, problem.written) == (503, "maybe")
    new = asyncio.ensure_future(other.write([Change(5, 5, 0, 255)]))
    await asyncio.sleep(0.02)
    fragile_redis.resume()
    await new
    await ready(fragile)
    assert stored(fragile_redis, Change(5, 5, 0, 0)) == 255
    other.close()


async def test_a_large_batch_that_redis_has_half_read_is_never_made(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    """Larger than what Redis reads in one turn: its end is read after newer writes."""
    for _ in range(3):
        fragile_redis.pause()
        changes = [Change(n % 1000, n // 1000, 1, 9) for n in range(10_000)]
        assert (await given_up(fragile.write(changes))).written == "maybe"
        fragile_redis.resume()
        await ready(fragile)
        await fragile.write([Change(999, 9, 1, 77)])
        await asyncio.sleep(0.3)
        assert stored(fragile_redis, Change(999, 9, 1, 0)) == 77
        await fragile.write([Change(999, 9, 1, 0)])


async def test_a_transaction_executes_only_within_its_lease(
    redis_server: RedisServer,
) -> None:
    """Stopped between any two of its commands, it does nothing once the lease is over."""
    commit = GroupCommit(
        Server.of(redis_server.settings()), redis_server.settings(), RedisClock(), "c5/1"
    )
    connection = await Connection.open(Server.of(redis_server.settings()))
    lease = commit._lease
    now = time.time()
    commands = [*lease.renew(now), *lease.conditions, ("MULTI",), ("SET", "pixel:x", 1), ("EXEC",)]
    for split in range(1, len(commands)):
        lease.end = 0
        assert [*lease.renew(time.time())]
        first = [*_renewed(lease, time.time() + 0.1), *commands[2:]][:split]
        rest = [*_renewed(lease, time.time() + 0.1), *commands[2:]][split:]
        await connection.execute(first)
        await asyncio.sleep(0.15)
        if rest[0][0] == "SET" and "PXAT" in rest[0]:
            rest[0] = (
                first[-1]
                if first[-1][0] == "SET"
                else (*rest[0][:4], int((time.time() - 0.05) * 1000))
            )
        assert (await connection.execute(rest))[-1] is None, split
    in_time = [*_renewed(lease, time.time() + 5), *commands[2:]]
    assert (await connection.execute(in_time))[-1] == [b"OK"]
    connection.close()
    commit.close()


def _renewed(lease: object, end: float) -> list[tuple[str | int, ...]]:
    key = lease._key  # type: ignore[attr-defined]
    return [("TIME",), ("SET", key, 1, "PXAT", int(end * 1000))]


class Balancer:
    """Sends writes as a balancer does, with a stamp."""

    def __init__(self, service: Service) -> None:
        self._address = service.tcp.getsockname()
        self._connection = http.client.HTTPConnection(*self._address, timeout=10)

    def send(self, value: int, stamp: str | None = None) -> None:
        body = f'{{"x":7,"y":7,"channel":"R","value":{value}}}'
        headers = {"Content-Type": "application/json"}
        headers["X-Request-Start"] = f"{time.time():.3f} lb" if stamp is None else stamp
        self._connection.request("POST", "/pixel", body, headers)

    def answer(self) -> tuple[int, dict[str, str], dict[str, object]]:
        response = self._connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(response.read())

    def post(
        self, value: int, stamp: str | None = None
    ) -> tuple[int, dict[str, str], dict[str, object]]:
        self.send(value, stamp)
        return self.answer()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def start_balancer() -> Iterator[Callable[[Service], Balancer]]:
    balancers: list[Balancer] = []

    def start(service: Service) -> Balancer:
        balancers.append(Balancer(service))
        return balancers[-1]

    yield start
    for balancer in balancers:
        balancer.close()


def test_a_worker_that_stood_still_makes_nothing_that_was_given_up(
    redis_server: RedisServer,
    start_service: Callable[..., Service],
    start_balancer: Callable[[Service], Balancer],
) -> None:
    """What lay in its socket is not made when it goes on."""
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    # What waits for the start is too old when it is read.
    wait_until(lambda: start_balancer(service).post(1)[0] == 200, 30)
    [pid] = worker_pids(service)
    with redis_server.admin() as admin:
        key, place = locate(7, 7)
        for value in range(2, 6):
            os.kill(pid, signal.SIGSTOP)
            balancer = start_balancer(service)
            balancer.send(value)
            time.sleep(1.2)
            balancer.close()  # it gives up, and tries another host
            admin.setrange(key, place, bytes([100 + value]))
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
            assert stored(redis_server, Change(7, 7, 0, 0)) == 100 + value


def test_an_old_request_is_refused_and_sent_back_to_the_balancer(
    redis_server: RedisServer,
    start_service: Callable[..., Service],
    start_balancer: Callable[[Service], Balancer],
) -> None:
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    wait_until(lambda: start_balancer(service).post(1)[0] == 200, 30)
    balancer = start_balancer(service)
    status, headers, body = balancer.post(2, f"{time.time() - 1:.3f} lb")
    assert (status, headers["x-accel-redirect"], headers["x-pixel-written"]) == (
        503,
        "@again",
        "no",
    )
    assert body["written"] == "no"
    assert "nothing was written" in str(body["detail"])
    # A retry, whose earlier attempt may have been made, is refused in other words.
    status, headers, body = balancer.post(3, f"{time.time() - 1:.3f} lb maybe")
    assert (status, headers["x-pixel-written"], body["written"]) == (503, "maybe", "maybe")
    assert "the write may have been made" in str(body["detail"])
    assert stored(redis_server, Change(7, 7, 0, 0)) == 1
    # One that has to wait for an earlier attempt's end is held back for that long.
    asked = time.monotonic()
    assert balancer.post(4, f"{time.time():.3f} lb wait")[0] == 200
    assert 1.6 <= time.monotonic() - asked < 2.4
    assert stored(redis_server, Change(7, 7, 0, 0)) == 4


@pytest.mark.parametrize(
    "stamp", ["", "x", "nan lb", "inf lb", "-inf lb", "1e999 lb", "1 2 3 4", "9e10 lb", "\xff \xff"]
)
def test_an_odd_stamp_makes_no_500_and_harms_no_other_request(
    service: Service, start_balancer: Callable[[Service], Balancer], stamp: str
) -> None:
    assert start_balancer(service).post(5, stamp)[0] in (200, 503)
    for _ in range(4):
        assert start_balancer(service).post(6)[0] == 200


async def test_a_lost_connection_leaves_nothing_in_the_kernels_buffer() -> None:
    """A peer that doesn't read: the rest is discarded with a reset, not sent later."""
    received = bytearray()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(100))
        writer.write(b"+OK\r\n+PONG\r\n")
        await asyncio.sleep(0.5)
        try:
            while part := await reader.read(1 << 16):
                received.extend(part)
            ended.set_result("closed")
        except ConnectionResetError:
            ended.set_result("reset")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 12)
    port = server.sockets[0].getsockname()[1]
    connection = await Connection.open(Server.of(Settings(redis_url=f"redis://127.0.0.1:{port}/0")))
    doomed = connection.execute([("SET", "pixel:x", b"x" * (64 << 20))])
    await asyncio.sleep(0.1)
    connection.close()
    with pytest.raises(ConnectionError):
        await doomed
    assert await ended == "reset"
    assert len(received) < 32 << 20
    linger = connection._transport.get_extra_info("socket")
    assert linger is None or struct.calcsize("ii") == 8
    server.close()


class Clocks:
    """A worker's view of Redis's clock, and a balancer's clock, all of which a test can set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        self.redis = 0.0  # seconds by which Redis's clock is ahead
        self.balancer = 0.0
        monkeypatch.setattr(lifetime, "monotonic", lambda: self.now)
        monkeypatch.setattr(lifetime, "time", lambda: self.now)
        self.clock = RedisClock()
        self.limit = StartLimit(self.clock, Settings(start_limit=0.8))
        self.reports: dict[int, dict[bytes, float]] = {}
        self.known: dict[bytes, float] = {}
        self.ask()

    def ask(self, there: float = 0.0002, back: float = 0.0002) -> None:
        """A question to Redis that takes so long on its way there and back."""
        asked = self.now
        said = asked + there + self.redis
        self.now += there + back
        self.clock.learn(asked, said, self.now)

    def exchange(self) -> None:
        """As ``Store.exchange_differences``, with no Redis."""
        period = self.limit.period()
        for name, least in self.limit.report().items():
            known = self.reports.setdefault(period, {})
            known[name] = min(least, known.get(name, least))
        former, current = self.reports.get(period - 1, {}), self.reports.get(period, {})
        self.known |= self.limit.learn(self.known, former, current)

    def request(self, age: float = 0.0, name: str = "lb") -> bool:
        """Whether a request is taken that the balancer sent so long ago."""
        return self.judge(self.stamp(age, name))

    def stamp(self, age: float = 0.0, name: str = "lb") -> bytes:
        """The stamp of a request that the balancer sent so long ago."""
        return f"{self.now - age + self.balancer:.3f} {name}".encode()

    def judge(self, stamp: bytes) -> bool:
        """Whether a request with this stamp is taken."""
        try:
            self.limit.begin_by(stamp)
        except Problem:
            return False
        return True

    def go_on(self, seconds: float, age: float = 0.0) -> list[bool]:
        """Ten requests a second, and an exchange each second."""
        taken = []
        for tick in range(round(seconds * 10)):
            self.now += 0.1
            if tick % 10 == 9:
                self.ask()
                self.exchange()
            taken.append(self.request(age))
        return taken


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.mark.parametrize("ahead", [0, -3600, 5, 86400 * 400])
def test_a_clock_that_differs_is_learned_within_seconds(clocks: Clocks, ahead: float) -> None:
    clocks.balancer = ahead
    taken = clocks.go_on(15)
    assert all(taken[20 * lifetime.PERIOD + 11 :])
    assert clocks.request(0.7)
    assert not clocks.request(0.9)
    assert not clocks.request(30)


@pytest.mark.parametrize("jump", [0.5, 2, 3600])
@pytest.mark.parametrize("whose", ["balancer", "redis"])
def test_a_clock_that_jumps_refuses_at_worst_for_seconds(
    clocks: Clocks, whose: str, jump: float
) -> None:
    for sign in (1, -1):
        clocks.go_on(15)
        before = clocks.stamp(0.9)
        setattr(clocks, whose, getattr(clocks, whose) + sign * jump)
        clocks.ask()
        # A request from before is not taken for a new one, unless the clocks' difference shrank
        # by less than it is late: the first new request corrects that.
        assert not clocks.judge(before) or (whose, sign) == ("redis", -1)
        taken = clocks.go_on(20)
        refused = taken.count(False) / 10
        assert refused <= 2 * lifetime.PERIOD + 2
        assert all(taken[120:])
        assert not clocks.request(0.9)


def test_a_worker_that_was_stopped_refuses_what_waited(clocks: Clocks) -> None:
    clocks.go_on(15)
    clocks.now += 12  # stopped; other workers' reports are old by now, and gone
    clocks.reports.clear()
    assert not any(clocks.request(age) for age in (12, 5, 1))
    clocks.exchange()
    assert not any(clocks.request(age) for age in (12, 5, 1))
    assert clocks.request(0)


def test_a_slow_link_is_told_from_a_clock_by_what_other_hosts_see(clocks: Clocks) -> None:
    clocks.go_on(15)
    for _ in range(30):  # all that comes here comes three seconds late
        period = clocks.limit.period()
        clocks.reports.setdefault(period, {})[b"lb"] = 0.001
        assert not any(clocks.go_on(1, age=3))


def test_a_suspended_host_learns_of_it_by_redis_time(clocks: Clocks) -> None:
    """Its monotonic clock stood still too."""
    clocks.go_on(15)
    clocks.redis += 10
    clocks.balancer += 10
    assert clocks.request(10)  # it can't know yet; its lease has expired, so nothing is written
    clocks.ask()
    assert not clocks.request(10)
    assert clocks.request(0)


def test_a_slow_answer_of_redis_does_not_move_its_clock(clocks: Clocks) -> None:
    clocks.go_on(5)
    before = clocks.clock.now() - clocks.now
    clocks.ask(0.0, 0.7)
    clocks.ask(0.7, 0.0)
    assert clocks.clock.now() - clocks.now == pytest.approx(before, abs=0.001)
    assert all(clocks.go_on(12))


def test_two_balancers_have_a_clock_each(clocks: Clocks) -> None:
    for _ in range(30):
        clocks.go_on(1)
        clocks.request(7, "other")
    assert clocks.request(7.5, "other")
    assert not clocks.request(8, "other")
    assert clocks.request(0.5)
    assert not clocks.request(1)


def test_a_marked_retry_waits_and_then_has_its_own_start_limit(clocks: Clocks) -> None:
    clocks.go_on(3)
    stamp = f"{clocks.now:.3f} lb wait".encode()
    with pytest.raises(MustWaitError):
        clocks.limit.begin_by(stamp)
    clocks.now += clocks.limit.wait + 0.1
    assert clocks.limit.begin_by(stamp, clocks.limit.wait) - clocks.now == pytest.approx(
        0.7, abs=0.05
    )
    clocks.now += 1
    with pytest.raises(Problem):
        clocks.limit.begin_by(stamp, clocks.limit.wait)
