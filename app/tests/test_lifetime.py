"""A write that has timed out is never executed: the lease, the start limit, and the clocks."""

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from conftest import RedisServer, Service, wait_until, worker_pids
from test_store import late_probe, outcomes, stored, submit

from pixel import lifetime
from pixel.canvas import locate
from pixel.cluster import Redis
from pixel.commit import GroupCommit
from pixel.lifetime import MustWaitError, RedisClock, StartLimit, UnknownClockError, UnknownPausesError
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.resp import Connection, Server
from pixel.settings import Settings
from pixel.store import Store


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


async def test_a_write_in_the_buffer_of_redis_is_never_made_once_given_up(
    fragile: Store, fragile_redis: RedisServer
) -> None:
    """Redis is paused; it reads the write's commands only after it resumes."""
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
    """The batch is larger than one read of Redis, so its end is read after newer writes."""
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
    """A transaction that is delayed between any two commands has no effect after its lease."""
    commit = GroupCommit(Redis(redis_server.settings()), redis_server.settings(), RedisClock(), "c5/1")
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
            rest[0] = first[-1] if first[-1][0] == "SET" else (*rest[0][:4], int((time.time() - 0.05) * 1000))
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
        headers["X-Request-Start"] = stamp_of() if stamp is None else stamp
        self._connection.request("POST", "/pixel", body, headers)

    def answer(self) -> tuple[int, dict[str, str], dict[str, object]]:
        response = self._connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(response.read())

    def post(self, value: int, stamp: str | None = None) -> tuple[int, dict[str, str], dict[str, object]]:
        self.send(value, stamp)
        return self.answer()

    def close(self) -> None:
        self._connection.close()


def stamp_of(age: float = 0.0, mark: str = "") -> str:
    """The stamp of a request that was sent ``age`` seconds ago."""
    return f"{time.time() - age:.3f} {CLOCK.address}{mark}"


class ClockServer(threading.Thread):
    """Answers with this host's time, as a balancer does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self.socket.getsockname())

    def run(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            with connection:
                connection.recv(4096)
                body = f"{time.time():.3f}"
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((head + body).encode())


CLOCK = ClockServer()
CLOCK.start()


@pytest.fixture
def start_balancer() -> Iterator[Callable[[Service], Balancer]]:
    balancers: list[Balancer] = []

    def start(service: Service) -> Balancer:
        balancers.append(Balancer(service))
        return balancers[-1]

    yield start
    for balancer in balancers:
        balancer.close()


def test_a_worker_that_was_stopped_makes_no_write_that_was_given_up(
    redis_server: RedisServer,
    start_service: Callable[..., Service],
    start_balancer: Callable[[Service], Balancer],
) -> None:
    """Requests in the buffer of its socket are refused when it continues."""
    service = start_service(redis_server.url, PIXEL_WORKERS="1")
    # A request that has waited for the start of the service is too old when it is read.
    wait_until(lambda: start_balancer(service).post(1)[0] == 200, 30)
    [pid] = worker_pids(service)
    with redis_server.admin() as admin:
        key, place = locate(7, 7)
        for value in range(2, 6):
            os.kill(pid, signal.SIGSTOP)
            balancer = start_balancer(service)
            balancer.send(value)
            time.sleep(1.2)
            balancer.close()  # like a balancer that times out and tries another host
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
    status, headers, body = balancer.post(2, stamp_of(1))
    assert (status, headers["x-accel-redirect"], headers["x-pixel-written"]) == (
        503,
        "@again",
        "no",
    )
    assert body["written"] == "no"
    assert "nothing was written" in str(body["detail"])
    # The refusal of a retry reports that an earlier attempt may have been executed.
    status, headers, body = balancer.post(3, stamp_of(1, " maybe"))
    assert (status, headers["x-pixel-written"], body["written"]) == (503, "maybe", "maybe")
    assert "the write may have been made" in str(body["detail"])
    assert stored(redis_server, Change(7, 7, 0, 0)) == 1
    # A retry that has to wait for the end of an earlier attempt is delayed until then.
    asked = time.monotonic()
    assert balancer.post(4, stamp_of(mark=" wait"))[0] == 200
    assert 1.6 <= time.monotonic() - asked < 2.4
    assert stored(redis_server, Change(7, 7, 0, 0)) == 4


@pytest.mark.parametrize(
    "stamp",
    [
        "",
        "x",
        "nan lb",
        "inf lb",
        "-inf lb",
        "1 2 3 4",
        "\xff \xff",
        "x {}",
        "nan {}",
        "inf {}",
        "-1e999 {}",
        "{}",
    ],
)
def test_an_odd_stamp_makes_no_500_and_harms_no_other_request(
    service: Service, start_balancer: Callable[[Service], Balancer], stamp: str
) -> None:
    assert start_balancer(service).post(6)[0] == 200
    assert start_balancer(service).post(5, stamp.format(CLOCK.address))[0] in (200, 503)
    for _ in range(4):
        assert start_balancer(service).post(6)[0] == 200


async def test_a_lost_connection_leaves_nothing_in_the_kernels_buffer() -> None:
    """A peer that doesn't read: the rest is discarded with a reset, not sent later."""
    received = bytearray()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(100))
        writer.write(b"+OK\r\n+PONG\r\n")
        await closed.wait()
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
    await asyncio.sleep(0.1)
    closed.set()
    with pytest.raises(ConnectionError):
        await doomed
    assert await ended == "reset"
    assert len(received) < 32 << 20
    server.close()


LB = b"10.0.0.1:80"


class Clocks:
    """A worker's view of Redis's clock, and a balancer's clock, all of which a test can set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        self.redis = 0.0  # seconds by which Redis's clock is ahead
        self.balancer = 0.0
        self.reachable = True
        self.is_replaced = False  # whether there are several balancers
        self.beat: float | None = 0.0  # seconds since the balancer's record was updated, if it has one
        self.since = 0.0
        self.reads = 0  # of the record
        monkeypatch.setattr(lifetime, "monotonic", lambda: self.now)
        monkeypatch.setattr(lifetime, "time", lambda: self.now)
        monkeypatch.setattr(lifetime, "get", self._say_time)
        self.clock = RedisClock()
        self.limit = StartLimit(self.clock, Settings(start_limit=0.8))
        self.ask()

    async def _say_time(self, url: str) -> tuple[int, bytes]:
        if not self.reachable:
            raise ConnectionRefusedError
        if url == "http://10.0.0.1:80/lb/pauses":
            self.reads += 1
            if self.beat is None:
                return 404, b"{}"
            return 200, b"%.3f %.3f\n" % (self.since, self.now + self.balancer - self.beat)
        assert url == "http://10.0.0.1:80/lb/clock"
        self.now += 0.0005
        body = b"%.3f" % (self.now + self.balancer)
        self.now += 0.0005
        return 200, body

    def ask(self, there: float = 0.0002, back: float = 0.0002) -> None:
        """Read Redis's time, with these delays of the request and the reply."""
        asked = self.now
        redis_time = asked + there + self.redis
        self.now += there + back
        self.clock.learn(asked, redis_time, self.now)

    def stamp(self, age: float = 0.0) -> bytes:
        """The stamp of a request that the balancer sent ``age`` seconds ago."""
        return b"%b%.3f %b" % (b"+" * self.is_replaced, self.now - age + self.balancer, LB)

    async def judge(self, stamp: bytes) -> bool:
        """Whether a request with this stamp is accepted."""
        try:
            for _ in range(3):
                try:
                    self.limit.begin_by(stamp)
                    break
                except UnknownClockError as error:
                    await self.limit.measure(error.balancer)
                except UnknownPausesError as error:
                    await self.limit.read_pauses(error.balancer)
            else:
                raise AssertionError("the request is never judged")
        except Problem as problem:
            await asyncio.sleep(0)  # lets a measurement run
            return problem.written != "no"
        return True

    async def request(self, age: float = 0.0) -> bool:
        return await self.judge(self.stamp(age))

    async def go_on(self, seconds: float, age: float = 0.0) -> list[bool]:
        """Send ten requests per second, and read Redis's time once per second."""
        taken = []
        for tick in range(round(seconds * 10)):
            self.now += 0.1
            if tick % 10 == 9:
                self.ask()
            taken.append(await self.request(age))
        return taken


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.mark.parametrize("ahead", [0, -3600, 5, 86400 * 400])
async def test_any_difference_of_clocks_is_measured(clocks: Clocks, ahead: float) -> None:
    clocks.balancer = ahead
    assert await clocks.request()
    assert await clocks.request(0.7)
    assert not await clocks.request(0.9)
    assert not await clocks.request(30)
    assert all(await clocks.go_on(5))


async def test_a_request_of_an_unknown_balancer_is_judged_by_its_measured_clock(
    clocks: Clocks,
) -> None:
    clocks.balancer = 5
    assert not await clocks.request(3)
    assert await clocks.request(0.5)


@pytest.mark.parametrize("jump", [0.5, 2, 3600])
@pytest.mark.parametrize("whose", ["balancer", "redis"])
@pytest.mark.parametrize("sign", [1, -1])
async def test_after_a_clock_is_set_requests_are_refused_for_two_seconds_at_most(
    clocks: Clocks, whose: str, jump: float, sign: int
) -> None:
    await clocks.go_on(5)
    before = clocks.stamp(0.9)
    setattr(clocks, whose, getattr(clocks, whose) + sign * jump)
    if whose == "balancer":
        assert not await clocks.judge(before)
    taken = await clocks.go_on(5)
    assert taken.count(False) <= 20
    assert all(taken[20:])
    assert not await clocks.request(0.9)


async def test_after_redis_is_set_back_no_request_counts_as_younger(clocks: Clocks) -> None:
    """As after a failover to a host whose clock is behind."""
    await clocks.go_on(5)
    clocks.redis -= 3
    clocks.ask()
    assert not await clocks.request(1)
    assert await clocks.request(0.7)


async def test_a_measurement_during_which_redis_is_set_back_is_of_the_new_clock(clocks: Clocks) -> None:
    await clocks.go_on(5)
    say_time = clocks._say_time

    async def set_back(url: str) -> tuple[int, bytes]:
        clocks.redis -= 3
        clocks.ask()
        return await say_time(url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifetime, "get", set_back)
        await clocks.limit.measure(LB)
    assert not await clocks.request(1)
    assert await clocks.request(0.7)


async def test_what_waits_while_redis_is_set_back_is_refused(fragile_redis: RedisServer) -> None:
    clock = RedisClock()
    settings = fragile_redis.settings(start_limit=3)
    commit = GroupCommit(Redis(settings), settings, clock, "c5/1")
    await submit(commit, Change(0, 0, 0, 1))
    fragile_redis.kill()
    await asyncio.sleep(0.1)
    now = time.monotonic()
    clock.learn(now, time.time() + 3, now)  # the clock of the former host is ahead
    waiting = submit(commit, Change(0, 0, 0, 2))
    fragile_redis.start()
    with pytest.raises(Problem, match="Redis's clock was set back; nothing was written"):
        await waiting
    await submit(commit)
    assert stored(fragile_redis, Change(0, 0, 0, 0)) == 1
    commit.close()


async def test_a_worker_that_was_stopped_refuses_requests_that_waited(clocks: Clocks) -> None:
    await clocks.go_on(5)
    clocks.now += 12
    for age in (12, 5, 1):
        assert not await clocks.request(age)
    assert await clocks.request(0)
    assert not await clocks.request(1)


async def test_a_slow_link_is_not_mistaken_for_a_clock_difference(clocks: Clocks) -> None:
    await clocks.go_on(5)
    assert not any(await clocks.go_on(30, age=3))
    assert all(await clocks.go_on(5))


async def test_a_suspended_host_detects_it_by_the_time_of_redis(clocks: Clocks) -> None:
    """The monotonic clock of a suspended host stops too."""
    await clocks.go_on(5)
    clocks.redis += 10
    clocks.balancer += 10
    assert await clocks.request(10)  # not detectable yet; the lease has expired, so nothing is written
    clocks.ask()
    assert not await clocks.request(10)
    assert await clocks.request(0)


async def test_a_slow_answer_of_redis_does_not_move_its_clock(clocks: Clocks) -> None:
    await clocks.go_on(5)
    before = clocks.clock.now() - clocks.now
    clocks.ask(0.0, 0.7)
    clocks.ask(0.7, 0.0)
    assert clocks.clock.now() - clocks.now == pytest.approx(before, abs=0.001)
    assert all(await clocks.go_on(5))


async def test_a_drifting_clock_is_followed_also_by_slow_answers(clocks: Clocks) -> None:
    """A worker that was stopped while Redis's answer waited must not conclude that Redis is behind."""
    for sign in (1, -1):
        for _ in range(100):
            clocks.now += 0.5
            clocks.redis += sign * 0.5 * 500e-6
            clocks.balancer += sign * 0.5 * 500e-6
            clocks.ask(0.0001, 1.2)
            assert clocks.clock.now() - clocks.now - clocks.redis == pytest.approx(0, abs=0.06)
            assert not await clocks.request(1)


async def test_a_balancer_without_a_clock_answer_is_trusted_after_a_while(
    clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    clocks.reachable = False
    assert not await clocks.request()
    assert not any(await clocks.go_on(9))
    assert (await clocks.go_on(3))[-1]
    assert "clock of balancer 10.0.0.1:80 can't be read; it is assumed to equal Redis's" in caplog.text
    assert not await clocks.request(0.9)
    # Once the balancer answers, its measured clock is used.
    clocks.reachable, clocks.balancer = True, -5
    taken = await clocks.go_on(5)
    assert all(taken[20:])


async def test_a_marked_retry_waits_and_then_has_its_own_start_limit(clocks: Clocks) -> None:
    await clocks.go_on(3)
    stamp = clocks.stamp() + b" wait"
    with pytest.raises(MustWaitError):
        clocks.limit.begin_by(stamp)
    waited = clocks.limit.wait
    clocks.now += waited + 0.1
    assert clocks.limit.begin_by(stamp, waited) - clocks.now == pytest.approx(0.7, abs=0.05)
    clocks.now += 1
    with pytest.raises(Problem):
        clocks.limit.begin_by(stamp, waited)


# Several balancers, each of which another one replaces when it stops.


@pytest.mark.parametrize("ahead", [0.0, -3600.0, 3600.0])
async def test_what_waited_in_a_stopped_balancer_is_refused(clocks: Clocks, ahead: float) -> None:
    clocks.balancer, clocks.is_replaced = ahead, True
    assert all(await clocks.go_on(5))
    clocks.now += 1.2
    # It runs again, and its controller has not noticed the pause yet.
    clocks.beat = 1.2
    assert not await clocks.request()
    clocks.beat, clocks.since = 0.0, clocks.now + clocks.balancer + 1
    assert not any(await clocks.go_on(0.9))
    clocks.now += 0.1
    assert all(await clocks.go_on(5))
    # A retry of a request that was received before the pause.
    sent = clocks.stamp().partition(b" ")
    assert await clocks.judge(b"%b/4.000 %b" % sent[::2])
    assert not await clocks.judge(b"%b/12.000 %b" % sent[::2])


async def test_pauses_are_read_only_after_a_while_without_a_request(clocks: Clocks) -> None:
    clocks.is_replaced = True
    assert all(await clocks.go_on(20))
    assert clocks.reads == 1
    clocks.now += 1
    assert all(await asyncio.gather(*(clocks.request() for _ in range(20))))
    assert clocks.reads == 2


async def test_a_single_balancer_is_not_asked_for_pauses(clocks: Clocks) -> None:
    await clocks.go_on(1)
    clocks.now += 10
    clocks.ask()
    assert await clocks.request()
    assert clocks.reads == 0


async def test_a_balancer_without_a_record_is_trusted(clocks: Clocks) -> None:
    clocks.is_replaced, clocks.beat = True, None
    for _ in range(5):
        clocks.now += 5
        clocks.ask()
        assert await clocks.request()


async def test_a_record_that_is_not_updated_is_trusted_after_a_while(clocks: Clocks) -> None:
    clocks.is_replaced = True
    await clocks.go_on(1)
    clocks.now += 5
    clocks.beat = 5
    assert not any(await clocks.go_on(9))
    assert (await clocks.go_on(3))[-1]


async def test_a_balancer_whose_clock_is_set_back_is_trusted_again(clocks: Clocks) -> None:
    clocks.is_replaced = True
    await clocks.go_on(5)
    clocks.balancer -= 100
    taken = await clocks.go_on(5)
    assert all(taken[20:])
