"""The fast path of pixels and streams: its answers equal those of the ASGI application."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator

import pytest
from conftest import RedisServer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn import Config, Server

from pixel import events, protocol, requests
from pixel.app import create_app
from pixel.pixel import Change, Reader
from pixel.protocol import PixelProtocol
from pixel.settings import Settings

GOOD = b'{"x":10,"y":20,"channel":"R","value":255}'
OK = {"status": "ok", "received": json.loads(GOOD)}


class Served:
    """The application behind Uvicorn in this process, and the requests that reached ASGI."""

    def __init__(self, settings: Settings, keep_alive: int = 75) -> None:
        self.came: list[str] = []
        self._clients: list[Client] = []
        self._app = create_app(settings)
        self.server = Server(
            Config(
                self._count,
                interface="asgi3",
                port=0,
                http=PixelProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                headers=[("X-Pixel-Instance", "c5")],
                timeout_keep_alive=keep_alive,
            )
        )

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.came.append(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)

    async def connect(self) -> "Client":
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self._clients.append(Client(*await asyncio.open_connection("127.0.0.1", port)))
        return self._clients[-1]

    def stop(self) -> None:
        for client in self._clients:
            client.writer.close()
        self.server.should_exit = True


class Answer:
    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode().strip().split("\r\n")
        self.status = int(first.split()[1])
        self.first = first
        self.headers = sorted(tuple(line.lower().split(": ", 1)) for line in lines)
        self.body = body

    def __eq__(self, other: object) -> bool:
        """Equal except for the date, which may have changed in between."""
        assert isinstance(other, Answer)
        mine, theirs = (
            (answer.first, [h for h in answer.headers if h[0] != "date"], answer.body)
            for answer in (self, other)
        )
        return mine == theirs


class Client:
    """A client that controls which bytes are sent when."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, first: bytes, *parts: bytes) -> None:
        self.writer.write(first)
        for part in parts:
            await asyncio.sleep(0.002)
            self.writer.write(part)

    async def answer(self, method: str = "GET") -> Answer:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        length = re.search(rb"content-length: (\d+)", head)
        body = b"" if length is None or method == "HEAD" else await self.reader.readexactly(int(length[1]))
        return Answer(head, body)

    async def ask(self, *parts: bytes, method: str = "GET") -> Answer:
        await self.send(*parts)
        return await self.answer(method)

    async def ended(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), 5) == b""


@contextlib.asynccontextmanager
async def serving(settings: Settings, keep_alive: int = 75) -> AsyncIterator[Served]:
    served = Served(settings, keep_alive)
    task = asyncio.create_task(served.server.serve())
    while not (served.server.started or task.done()):  # noqa: ASYNC110 - Uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield served
    finally:
        served.stop()
        await task


@pytest.fixture
async def served(redis_server: RedisServer) -> AsyncIterator[Served]:
    async with serving(redis_server.settings(instance="c5")) as served:
        yield served


def head(length: int, *lines: str, first: str = "POST /pixel HTTP/1.1") -> bytes:
    own = [first, "Host: c5", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*own, *lines, "", ""]).encode()


async def test_a_write_in_one_piece_takes_the_fast_path(served: Served) -> None:
    client = await served.connect()
    for value in range(3):
        body = GOOD.replace(b"255", b"%d" % value)
        answer = await client.ask(head(len(body)) + body)
        assert (answer.status, json.loads(answer.body)["received"]["value"]) == (200, value)
    assert [name for name, _ in answer.headers] == [
        "content-length", "content-type", "date", "x-pixel-instance"
    ]  # fmt: skip
    assert served.came == []
    assert (await client.ask(head(0, first="GET /ping HTTP/1.1"))).status == 200
    assert served.came == ["GET /ping"]


async def ask_both_ways(served: Served, target: str, *lines: str) -> tuple[Answer, Answer]:
    """The answers to a request that arrives in one piece, and to one whose body arrives later."""
    client = await served.connect()
    method = target.split()[0]
    whole = await client.ask(head(0, *lines, first=f"{target} HTTP/1.1"), method=method)
    request = head(1, *lines, first=f"{target} HTTP/1.1")
    before = len(served.came)
    other = await client.ask(request, b"x", method=method)
    assert len(served.came) == before + 1
    client.writer.close()
    return whole, other


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_read_goes_the_short_way(served: Served, method: str) -> None:
    client = await served.connect()
    assert (await client.ask(head(len(GOOD)) + GOOD)).status == 200
    whole, other = await ask_both_ways(served, f"{method} /pixel/10/20")
    assert served.came == [f"{method} /pixel/10/20"]
    assert whole == other
    assert whole.body == (b'{"x":10,"y":20,"R":255,"G":0,"B":0}' if method == "GET" else b"")
    assert {("cache-control", "no-store"), ("content-length", "35"), ("x-pixel-instance", "c5")} < set(
        whole.headers
    )
    # A body has no effect.
    assert (
        await client.ask(head(len(GOOD), first=f"{method} /pixel/10/20 HTTP/1.1") + GOOD, method=method)
        == whole
    )
    assert len(served.came) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "PUT"])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/pixel/1023/1023", 200),
        ("/pixel/00010/00020", 200),
        ("/pixel/%31/2", 200),
        ("/pixel/1/2?x=5", 200),
        ("/pixel/1024/0", 404),
        ("/pixel/0/1024", 404),
        ("/pixel/100000/0", 404),
        ("/pixel/-1/0", 404),
        ("/pixel/+1/0", 404),
        ("/pixel/1_0/0", 404),
        ("/pixel/1/2/", 404),
        ("/pixel/1/", 404),
        ("/pixel/", 404),
        ("/pixel", 405),
    ],
)
async def test_both_ways_read_alike(served: Served, method: str, path: str, status: int) -> None:
    whole, other = await ask_both_ways(served, f"{method} {path}")
    if method != "PUT":  # PUT has a body only in one of the requests
        assert whole == other
    if method in ("GET", "HEAD"):
        assert whole.status == status


async def test_reads_and_writes_are_answered_in_their_order(served: Served) -> None:
    client = await served.connect()
    requests = [
        (GOOD.replace(b"255", b"%d" % value), head(0, first="GET /pixel/10/20 HTTP/1.1"))
        for value in range(20)
    ]
    await client.send(b"".join(head(len(body)) + body + read for body, read in requests))
    for value in range(20):
        assert json.loads((await client.answer()).body)["received"]["value"] == value
        assert json.loads((await client.answer()).body)["R"] == value


async def test_a_read_while_redis_is_away_is_a_503(fragile_redis: RedisServer) -> None:
    async with serving(fragile_redis.settings(instance="c5", redis_timeout=0.2)) as served:
        client = await served.connect()
        assert (await client.ask(head(0, first="GET /pixel/1/2 HTTP/1.1"))).status == 200
        fragile_redis.pause()
        for stamp in ([], ["X-Request-Start: 1"]):
            whole, other = await ask_both_ways(served, "GET /pixel/1/2", *stamp)
            assert whole == other
            assert (whole.status, ("retry-after", "1") in whole.headers) == (503, True)
            assert (("x-accel-redirect", "@again") in whole.headers) == bool(stamp)
        fragile_redis.resume()
        assert (await client.ask(head(0, first="GET /pixel/1/2 HTTP/1.1"))).status == 200


@pytest.mark.parametrize(
    "parts",
    [
        [head(len(GOOD)), GOOD],
        [head(len(GOOD)) + GOOD[:7], GOOD[7:]],
        [head(len(GOOD)) + GOOD[:7], GOOD[7:9], GOOD[9:]],
        [head(len(GOOD), "Expect: 100-continue")],
        [head(len(GOOD), first="POST /pixel? HTTP/1.1") + GOOD],
        [head(len(GOOD), first="POST http://c5/pixel HTTP/1.1") + GOOD],
    ],
)
async def test_an_unusual_request_takes_the_asgi_path(served: Served, parts: list[bytes]) -> None:
    client = await served.connect()
    short = await client.ask(head(len(GOOD)) + GOOD)
    await client.send(*parts)
    if b"Expect" in parts[0]:
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(GOOD)
    assert await client.answer() == short
    assert served.came == ["POST /pixel"]
    assert await client.ask(head(len(GOOD)) + GOOD) == short
    assert served.came == ["POST /pixel"]


async def test_a_request_may_come_byte_by_byte(served: Served) -> None:
    client = await served.connect()
    request = head(len(GOOD)) + GOOD
    assert (await client.ask(*(request[n : n + 1] for n in range(len(request))))).status == 200


async def test_a_chunked_write_that_comes_whole_is_a_write(served: Served) -> None:
    client = await served.connect()
    request = head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    request += b"5\r\n" + GOOD[:5] + b"\r\n%x\r\n" % len(GOOD[5:]) + GOOD[5:] + b"\r\n0\r\n\r\n"
    assert json.loads((await client.ask(request)).body) == OK
    assert served.came == []


async def test_pipelined_requests_are_answered_in_their_order(served: Served) -> None:
    client = await served.connect()
    bodies = [GOOD.replace(b"255", b"%d" % value) for value in range(20)]
    everything = b"".join(head(len(body)) + body for body in bodies)
    everything += head(0, first="GET /ping HTTP/1.1") + head(len(GOOD)) + GOOD
    await client.send(everything)
    for body in bodies:
        assert json.loads((await client.answer()).body)["received"] == json.loads(body)
    assert json.loads((await client.answer()).body)["instance"] == "c5"
    assert json.loads((await client.answer()).body) == OK
    assert json.loads((await client.ask(head(len(GOOD)) + GOOD)).body) == OK


@pytest.mark.parametrize(
    ("first", "lines"),
    [("POST /pixel HTTP/1.1", ["Connection: close"]), ("POST /pixel HTTP/1.0", [])],
)
async def test_a_connection_is_closed_on_request(served: Served, first: str, lines: list[str]) -> None:
    client = await served.connect()
    answer = await client.ask(head(len(GOOD), *lines, first=first) + GOOD)
    assert answer.status == 200
    assert ("connection", "close") in answer.headers
    assert await client.ended()


async def test_a_request_that_is_not_http_is_a_400(served: Served) -> None:
    client = await served.connect()
    assert (await client.ask(head(len(GOOD)) + GOOD)).status == 200
    assert (await client.ask(b"no HTTP at all\r\n\r\n")).status == 400
    assert await client.ended()


async def test_a_body_that_never_comes_is_a_408(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05)
    client = await served.connect()
    assert (await client.ask(head(len(GOOD)) + GOOD[:5])).status == 408


async def test_a_client_that_disconnects_does_not_affect_others(
    fragile_redis: RedisServer,
) -> None:
    async with serving(fragile_redis.settings()) as served:
        leaving, staying = await served.connect(), await served.connect()
        await staying.ask(head(len(GOOD)) + GOOD)
        fragile_redis.pause()
        await leaving.send(head(len(GOOD)) + GOOD)
        await staying.send(head(len(GOOD)) + GOOD)
        await asyncio.sleep(0.05)
        leaving.writer.transport.abort()
        await asyncio.sleep(0.05)
        fragile_redis.resume()
        assert json.loads((await staying.answer()).body) == OK
        assert served.came == []


async def test_a_write_in_doubt_is_a_503_that_says_so_and_is_logged(
    fragile_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(fragile_redis.settings()) as served:
        client, other = await served.connect(), await served.connect()
        await client.ask(head(len(GOOD)) + GOOD)
        fragile_redis.pause()
        await client.send(head(len(GOOD), "X-Request-ID: r-17") + GOOD)
        await asyncio.sleep(0.05)
        await other.send(head(len(GOOD)) + GOOD)
        fragile_redis.kill()
        answer = await client.answer()
        assert answer.first == "HTTP/1.1 503 Service Unavailable"
        assert {("retry-after", "1"), ("content-type", "application/problem+json"),
                ("x-pixel-instance", "c5")} < set(answer.headers)  # fmt: skip
        assert json.loads(answer.body)["detail"].endswith("the write may have been made.")
        fragile_redis.start()
        assert (await other.answer()).status == 200
        assert (await client.ask(head(len(GOOD)) + GOOD)).status == 200
        assert served.came == []
    [logged] = [record for record in caplog.records if "answered" in record.message]
    assert (logged.levelname, logged.message) == ("WARNING", "POST /pixel was answered 503")
    assert getattr(logged, "request_id", "") == "r-17"


async def test_waiting_requests_are_answered_before_the_service_stops(
    fragile_redis: RedisServer,
) -> None:
    async with serving(fragile_redis.settings()) as served:
        idle, waiting = await served.connect(), await served.connect()
        for client in (idle, waiting):
            assert (await client.ask(head(len(GOOD)) + GOOD)).status == 200
        fragile_redis.pause()
        await waiting.send(head(len(GOOD)) + GOOD)
        await asyncio.sleep(0.05)
        served.server.should_exit = True
        assert await idle.ended()
        fragile_redis.resume()
        answer = await waiting.answer()
        assert json.loads(answer.body) == OK
        assert ("connection", "close") in answer.headers
        assert await waiting.ended()


async def test_an_idle_connection_ends_and_a_busy_one_does_not(
    fragile_redis: RedisServer,
) -> None:
    async with serving(fragile_redis.settings(), keep_alive=1) as served:
        idle, active = await served.connect(), await served.connect()
        loop = asyncio.get_running_loop()
        await idle.ask(head(len(GOOD)) + GOOD)
        began = loop.time()

        async def end_of_idle() -> float:
            assert await idle.ended()
            return loop.time()

        idle_ended = asyncio.create_task(end_of_idle())
        while loop.time() < began + 1.5:
            assert (await active.ask(head(len(GOOD)) + GOOD)).status == 200
            await asyncio.sleep(0.1)
        assert await idle_ended < began + 1.6
        assert (await active.ask(head(0, first="GET /ping HTTP/1.1"))).status == 200
        assert await active.ended()
        assert 2.4 < loop.time() - began < 3


async def test_an_internal_error_is_a_500_and_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Reader, "pixel", lambda *_: 1 / 0)
    client = await served.connect()
    answer = await client.ask(head(len(GOOD), "X-Request-ID: r-17") + GOOD)
    assert answer.status == 500
    assert [getattr(record, "request_id", "") for record in caplog.records] == ["r-17"]


async def open_stream(served: Served, path: str = "/events", *lines: str) -> tuple[Client, Answer]:
    client = await served.connect()
    request = ["GET " + path + " HTTP/1.1", "Host: c5", *lines, "", ""]
    await client.send("\r\n".join(request).encode())
    return client, Answer(await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5), b"")


async def sees(client: Client, data: bytes) -> None:
    await asyncio.wait_for(client.reader.readuntil(b"\ndata: " + data + b"\n\n"), 5)


async def test_a_stream_goes_the_short_way(served: Served) -> None:
    short, answer = await open_stream(served)
    other, same = await open_stream(served, "/events", "Connection: close")
    assert served.came == ["GET /events"]
    assert answer.first == same.first == "HTTP/1.1 200 OK"
    assert [name for name in answer.headers if name[0] != "date"] == [
        ("cache-control", "no-store"),
        ("connection", "close"),
        ("content-type", "text/event-stream; charset=utf-8"),
        ("x-accel-buffering", "no"),
        ("x-pixel-instance", "c5"),
    ]
    assert [n for n in same.headers if n[0] != "transfer-encoding"] == answer.headers
    writer = await served.connect()
    assert (await writer.ask(head(len(GOOD)) + GOOD)).status == 200
    for client in (short, other):
        await sees(client, b'[[10,20,"R",255]]')


async def test_a_stream_resumes_after_an_event(served: Served) -> None:
    writer = await served.connect()
    body = b'{"R":1,"G":2,"B":3}'
    event = dict((await writer.ask(head(len(body), first="PUT /pixel/1/1 HTTP/1.1") + body)).headers)[
        "x-pixel-event"
    ]
    await writer.ask(head(len(GOOD)) + GOOD)
    served.came.clear()
    for path, *lines in (
        (f"/events?after={event}",),
        ("/events", f"Last-Event-ID: {event}"),
        ("/events?after=0-0", f"Last-Event-ID: {event}"),
        (f"/events?after={event}", "Last-Event-ID:"),
    ):
        client, _ = await open_stream(served, path, *lines)
        first = await asyncio.wait_for(client.reader.readuntil(b"data: []\n\n"), 5)
        assert first == f"retry: 1000\nid: {event}\ndata: []\n\n".encode()
        await sees(client, b'[[10,20,"R",255]]')
    client, _ = await open_stream(served, "/events", "Last-Event-ID: nonsense")
    await asyncio.wait_for(client.reader.readuntil(b"id: 0-0\n"), 5)
    assert served.came == []


@pytest.mark.parametrize("query", ["x=10&y=20&w=5&h=5&after=0-0", "x=10&y=20&w=5&h=5"])
async def test_a_stream_of_a_region_goes_the_short_way(served: Served, query: str) -> None:
    client, answer = await open_stream(served, f"/events?{query}")
    assert answer.status == 200
    await sees(client, b"[]")
    writer = await served.connect()
    elsewhere = GOOD.replace(b"20", b"19")
    for body in (elsewhere, GOOD):
        assert (await writer.ask(head(len(body)) + body)).status == 200
    await sees(client, b'[[10,20,"R",255]]')
    assert served.came == []


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("after=never", 422),
        ("after=", 422),
        ("after=1-1&after=2-2", 200),
        ("x=10&w=5", 200),
        ("x=10&y=20&w=5&h=0", 422),
        ("x=1020&y=20&w=5&h=1", 422),
        ("x=-1&y=20&w=5&h=1", 422),
        ("x=a&y=20&w=5&h=1", 422),
    ],
)
async def test_what_is_no_common_stream_goes_the_other_way(served: Served, query: str, status: int) -> None:
    _, answer = await open_stream(served, f"/events?{query}")
    assert answer.status == status
    assert served.came == ["GET /events"]


async def test_a_viewer_who_leaves_is_forgotten(served: Served) -> None:
    client, _ = await open_stream(served)
    await sees(client, b"[]")
    hub = served.server.lifespan.state["hub"]
    assert len(hub._viewers) == 1
    client.writer.close()
    async with asyncio.timeout(5):
        while hub._viewers:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


async def test_a_viewer_who_reads_nothing_is_bounded_and_catches_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "QUEUE_BYTES", 20_000)
    monkeypatch.setattr(events, "REPLAY_CHANGES", 1_000_000)
    listening = served.server.servers[0].sockets[0]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    narrow.connect(listening.getsockname())
    slow = Client(*await asyncio.open_connection(sock=narrow, limit=1024))
    served._clients.append(slow)
    await slow.send(b"GET /events HTTP/1.1\r\nHost: c5\r\n\r\n")
    quick, _ = await open_stream(served)
    await sees(quick, b"[]")
    state = served.server.lifespan.state
    for value in range(80):
        changes = [Change(x, 1, 0, value) for x in range(1000)]
        await state["store"].write([*changes, Change(0, 2, 1, value)])
        await asyncio.wait_for(quick.reader.readuntil(b'[0,2,"G",%d]]\n\n' % value), 5)
    [viewer] = [viewer for viewer in state["hub"]._viewers if viewer.paused]
    assert viewer.position < state["hub"]._last
    received = b""
    async with asyncio.timeout(10):
        while b'[0,2,"G",79]]\n\n' not in received:
            received += await slow.reader.read(100_000)
    assert len(received) < 600_000  # of 1,200,000 that the other viewer has received
    ids = [tuple(map(int, event)) for event in re.findall(rb"id: (\d+)-(\d+)", received)]
    assert ids == sorted(ids)
    assert not viewer.paused


async def test_streams_end_when_the_service_stops(redis_server: RedisServer) -> None:
    async with serving(redis_server.settings()) as served:
        client, _ = await open_stream(served)
        await sees(client, b"[]")
        served.server.lifespan.state["hub"].close()
        assert await client.ended()
        late, _ = await open_stream(served)
        await sees(late, b"[]")
        assert await late.ended()


async def test_a_stream_while_redis_is_away_is_a_503(fragile_redis: RedisServer) -> None:
    async with serving(fragile_redis.settings(redis_timeout=0.2)) as served:
        client = await served.connect()
        assert (await client.ask(head(0, first="GET /pixel/1/2 HTTP/1.1"))).status == 200
        fragile_redis.pause()
        clients = [await served.connect() for _ in range(3)]
        for each in clients:
            await each.send(b"GET /events HTTP/1.1\r\nHost: c5\r\n\r\n")
        clients[0].writer.close()
        for each in clients[1:]:
            answer = await each.answer()
            assert (answer.status, ("retry-after", "1") in answer.headers) == (503, True)
        fragile_redis.resume()
        # The connections can be used again.
        assert (await clients[1].ask(head(0, first="GET /pixel/1/2 HTTP/1.1"))).status == 200
        await clients[2].send(b"GET /events HTTP/1.1\r\nHost: c5\r\n\r\n")
        await sees(clients[2], b"[]")
        assert served.came == []


VALUES = st.sampled_from(
    ["0", "10", "1023", "1024", "-1", "-0", "255", "256", "1.0", "1e2", "NaN", "true", "null",
     '"R"', '"G"', '"B"', '"r"', '"10"', "[]", "{}", "9" * 30, '"\\ud800"']
)  # fmt: skip
NAMES = st.sampled_from(["x", "y", "channel", "value", "value", "z", r"\u0078"])
NEARLY = st.lists(st.tuples(NAMES, VALUES), max_size=6).map(
    lambda fields: "{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}"
)
PIXELS = st.fixed_dictionaries({
    "x": st.integers(-1, 1025),
    "y": st.integers(-1, 1025),
    "channel": st.sampled_from(["R", "G", "B", "A"]),
    "value": st.integers(-1, 256),
}).map(json.dumps)  # fmt: skip
BODIES = (NEARLY | PIXELS).map(str.encode) | st.binary(max_size=50) | st.just(b" " * 2000)
TYPES = st.sampled_from(
    [["application/json"]] * 4
    + [["text/plain"], [], ["Application/JSON ; charset=utf-8"]]
    + [["application/json", "text/plain"], ["text/plain", "application/json"]]
)


@hypothesis_settings(max_examples=300)
@given(body=BODIES, types=TYPES)
async def test_both_paths_give_the_same_answers(served: Served, body: bytes, types: list[str]) -> None:
    client = await served.connect()
    lines = ["POST /pixel HTTP/1.1", "Host: c5", f"Content-Length: {len(body)}"]
    request = "\r\n".join([*lines, *(f"Content-Type: {each}" for each in types), "", ""]).encode()
    short = await client.ask(request + body)
    assert short.status in (200, 400, 413, 415, 422)
    assert (short.status == 200) == (served.came == [])
    assert await client.ask(request, body) == short
    assert served.came.pop() == "POST /pixel"
    served.came.clear()
    client.writer.close()
