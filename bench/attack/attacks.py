"""The attacks of one client; each is bounded in time, rate and connections.

An attack runs in its own process, so that it doesn't delay the second client, which measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from bench.load.http1 import Target

RATE = 100.0
CONNECTIONS = 190
"""Requests per second and connections, slightly below the balancer's default limits per client."""

LOOPBACK_SOURCE = "127.0.0.2"
ANSWER_SECONDS = 10.0
MEMBERS = 90_000  # of one JSON object: 1 MB
BATCH = 10_000  # pixels of the largest `POST /pixels`
BATCHES_A_SECOND = 30
HANDSHAKES, RESETS = 300.0, 2000.0  # per second; the limits apply to requests only
HALF_SENT = 1500
SIDE = 1024

# HTTP/2: frames and their types, and a request in HPACK's literals.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_HEADERS, _RESET, _END = 1, 3, 0x5


@dataclass
class Attacker:
    """One client and its limits.

    Attributes:
        source: the address to connect from; empty for the system's choice.
        until: time of the end, by the loop's clock.
        answers: number of requests by status, or by other outcome.
        first, last: IDs in milliseconds of the events before and after its many changes.
    """

    target: Target
    source: str = ""
    until: float = 0.0
    rate: float = RATE
    connections: int = CONNECTIONS
    answers: Counter[str] = field(default_factory=Counter)
    dice: random.Random = field(default_factory=lambda: random.Random(17))  # noqa: S311
    first: int = 0
    last: int = 0

    async def work(self, send: Callable[[Attacker], Awaitable[None]], seconds: float) -> None:
        self.until = asyncio.get_running_loop().time() + seconds
        await send(self)

    async def at_rate(self, send: Callable[[int], Awaitable[str]], rate: float = 0, most: int = 0) -> None:
        """Sends until `until`; requests that are due while all connections are busy are skipped."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        sending: set[asyncio.Task[None]] = set()
        number = 0
        while loop.time() < self.until:
            if len(sending) < (most or self.connections):
                task = asyncio.create_task(self._count(send(number)))
                sending.add(task)
                task.add_done_callback(sending.discard)
            number += 1
            await asyncio.sleep(max(0.0, started + number / (rate or self.rate) - loop.time()))
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)

    async def _count(self, sending: Awaitable[str]) -> None:
        try:
            self.answers[await sending] += 1
        except TimeoutError:
            self.answers["no answer in time"] += 1
        except (OSError, asyncio.IncompleteReadError):
            self.answers["connection lost"] += 1

    @contextlib.asynccontextmanager
    async def connection(
        self, receive_buffer: int = 0, protocols: Sequence[str] = ()
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        tls = self.target.tls
        if tls and protocols:
            tls = ssl.create_default_context()
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
            tls.set_alpn_protocols(list(protocols))
        address = (self.target.host, self.target.port)
        family = socket.AF_INET6 if ":" in self.target.host else socket.AF_INET
        plain = socket.socket(family)
        plain.setblocking(False)
        if self.source:
            plain.bind((self.source, 0))  # so that limits per client don't affect the second client
        if receive_buffer:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        writer = None
        try:
            await asyncio.get_running_loop().sock_connect(plain, address)
            name = self.target.host if tls else None
            limit = receive_buffer or 2**16
            reader, writer = await asyncio.open_connection(
                sock=plain, ssl=tls, server_hostname=name, limit=limit
            )
            yield reader, writer
        finally:
            if writer is None:
                plain.close()
            else:
                writer.transport.abort()

    async def ask(
        self,
        path: str,
        *headers: bytes,
        method: str = "GET",
        body: bytes = b"",
        seconds: float = ANSWER_SECONDS,
    ) -> str:
        """Returns the status of an answer; reads the answer for at most `seconds`."""
        lines = b"".join(b"%b\r\n" % header for header in (*headers, b"Connection: close"))
        if body:
            lines += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        async with self.connection() as (reader, writer):
            writer.write(self.target.head(method, path) + lines + b"\r\n" + body)
            async with asyncio.timeout(ANSWER_SECONDS):
                status = (await reader.readuntil(b"\r\n")).split(b" ")[1].decode()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while await reader.read(2**18):
                        pass
        return status

    async def newest_event(self) -> int:
        """Returns the milliseconds of the newest event's ID."""
        async with self.connection() as (reader, writer):
            writer.write(self.target.head("GET", "/events") + b"\r\n")
            async with asyncio.timeout(ANSWER_SECONDS):
                await reader.readuntil(b"id: ")
                return int((await reader.readuntil(b"-"))[:-1])

    def place(self) -> tuple[int, int]:
        return self.dice.randrange(SIDE), self.dice.randrange(SIDE)


@dataclass(frozen=True)
class Attack:
    """One kind of attack.

    Attributes:
        send: sends until the attacker's `until`.
        reaches: expected outcomes; if none of them occurs, the attack did not reach its target.
        tls: whether it needs HTTPS.
        balancer: whether it needs paths of the fleet's balancer.
        prepare: sends requests before the measurement; None if there are none.
    """

    name: str
    send: Callable[[Attacker], Awaitable[None]]
    reaches: frozenset[str]
    tls: bool = False
    balancer: bool = False
    prepare: Callable[[Attacker], Awaitable[None]] | None = None


async def ordinary(attacker: Attacker) -> None:
    """No attack: as many requests of a usual kind, pixels that are read and painted."""

    def ask(number: int) -> Awaitable[str]:
        x, y = attacker.place()
        if number % 10:
            return attacker.ask(f"/pixel/{x}/{y}")
        body = b'{"x":%d,"y":%d,"channel":"G","value":%d}' % (x, y, number % 256)
        return attacker.ask("/pixel", method="POST", body=body)

    await attacker.at_rate(ask)


async def faults(attacker: Attacker) -> None:
    """Bodies of 1 MB with as many faults as possible."""
    members = ",".join(f'"{number:05}":{number % 10}' for number in range(MEMBERS))
    body = b"[{%b}]" % members.encode()
    await attacker.at_rate(lambda _: attacker.ask("/pixels", method="POST", body=body), rate=20)


def batch(dice: random.Random) -> bytes:
    pixels = [
        {"x": dice.randrange(SIDE), "y": dice.randrange(SIDE), "channel": "RGB"[n % 3], "value": n % 256}
        for n in range(BATCH)
    ]
    return json.dumps(pixels, separators=(",", ":")).encode()


async def batches(attacker: Attacker) -> None:
    """The largest batches, as fast as they are accepted."""
    bodies = [batch(attacker.dice) for _ in range(4)]
    await attacker.at_rate(
        lambda n: attacker.ask("/pixels", method="POST", body=bodies[n % 4]), BATCHES_A_SECOND, most=8
    )


async def many_changes(attacker: Attacker) -> None:
    """Fills the event stream with large batches; records the events before and after them."""
    attacker.first = await attacker.newest_event()
    await batches(attacker)
    attacker.last = await attacker.newest_event()


async def replay(attacker: Attacker) -> None:
    """Streams that resume from the same event, before many changes."""
    path = f"/events?after={attacker.first}-0"
    await attacker.at_rate(lambda _: attacker.ask(path, seconds=5))


async def positions(attacker: Attacker) -> None:
    """Streams that resume from different events among many changes, opened repeatedly."""

    def stream(_: int) -> Awaitable[str]:
        event = attacker.dice.randint(attacker.first, attacker.last)
        path = f"/events?after={event}-{attacker.dice.randrange(10)}"
        return attacker.ask(path, seconds=attacker.dice.uniform(0.1, 2))

    await attacker.at_rate(stream)


async def pictures(attacker: Attacker) -> None:
    """Enlarged pictures of different regions of the canvas."""

    def ask(number: int) -> Awaitable[str]:
        x, y = (number * 37) % 24, (number * 53) % 24
        return attacker.ask(f"/canvas.png?x={x}&y={y}&w=1000&h=1000&scale={(4, 2, 1)[number % 3]}")

    await attacker.at_rate(ask)


async def conditional(attacker: Attacker) -> None:
    """HEAD requests, and conditional requests that always or never match."""

    def ask(number: int) -> Awaitable[str]:
        x, y = (number * 37) % 24, (number * 53) % 24
        area = f"x={x}&y={y}&w=1000&h=1000"
        return (
            lambda: attacker.ask(f"/canvas.png?{area}&scale=2", method="HEAD"),
            lambda: attacker.ask("/canvas.rgb", b"If-None-Match: *"),
            lambda: attacker.ask(f"/canvas.rgb?{area}", b'If-None-Match: "none", W/"of", "these"'),
            lambda: attacker.ask("/events", method="HEAD"),
        )[number % 4]()

    await attacker.at_rate(ask)


async def slow_readers(attacker: Attacker) -> None:
    """Requests for pictures and streams whose answers are read very slowly."""

    async def ask(number: int) -> str:
        x, y = (number * 37) % 24, (number * 53) % 24
        path = ("/canvas.rgb", f"/canvas.rgb?x={x}&y={y}&w=1000&h=1000", "/events")[number % 3]
        async with attacker.connection(receive_buffer=4096) as (reader, writer):
            writer.write(attacker.target.head("GET", path) + b"\r\n")
            async with asyncio.timeout(ANSWER_SECONDS):
                status = (await reader.readuntil(b"\r\n")).split(b" ")[1].decode()
            attacker.answers[status] += 1
            for _ in range(int(attacker.until - asyncio.get_running_loop().time()) + 1):
                await asyncio.sleep(1)
                await reader.read(1)
        return "read slowly"

    await attacker.at_rate(ask)


async def half_sent(attacker: Attacker) -> None:
    """Request heads that are never completed."""

    async def send(_: int) -> str:
        async with attacker.connection() as (reader, writer):
            writer.write(attacker.target.head("GET", "/"))
            attacker.answers["opened"] += 1
            await reader.read()
        return "dropped"

    await attacker.at_rate(send, most=HALF_SENT)


async def raw_bytes(attacker: Attacker) -> None:
    """User agents and paths that are not UTF-8, or very long."""
    texts = (b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80" * 50, b'\\"\x7f', b"\xe2\x82" + b"x" * 4000)

    def ask(number: int) -> Awaitable[str]:
        text = texts[number % len(texts)]
        path = f"/pixel/%ff%fe/{number}?{text.decode('latin-1')}" if number % 2 else "/ping"
        return attacker.ask(path, b"User-Agent: %b" % text)

    await attacker.at_rate(ask)


async def clusters(attacker: Attacker) -> None:
    """Expensive requests to chosen hosts, and to hosts that don't exist."""

    def ask(number: int) -> Awaitable[str]:
        x, y = (number * 37) % 24, (number * 53) % 24
        host = ("c5", "t2", "nobody", "c5%2f..", "t2")[number % 5]
        return attacker.ask(f"/cluster/{host}/canvas.png?x={x}&y={y}&w=1000&h=1000&scale=2")

    await attacker.at_rate(ask)


async def fan_out(attacker: Attacker) -> None:
    """Requests that an instance sends on to all others; from operators' addresses only."""
    paths = ("/fleet/all?timeout=60", "/fleet/first", "/fleet/all", "/metrics")
    await attacker.at_rate(lambda number: attacker.ask(paths[number % 4]))


async def handshakes(attacker: Attacker) -> None:
    """TLS handshakes without requests."""

    async def shake(_: int) -> str:
        async with asyncio.timeout(ANSWER_SECONDS), attacker.connection():
            return "handshake"

    await attacker.at_rate(shake, rate=HANDSHAKES)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


async def resets(attacker: Attacker) -> None:
    """HTTP/2 streams that are cancelled immediately."""
    path, authority = b"/canvas.rgb", attacker.target.authority.encode()
    # :method GET and :scheme https of HPACK's table, :path and :authority as literals.
    fields = b"\x82\x87\x04%c%b\x01%c%b" % (len(path), path, len(authority), authority)

    async def burst(_: int) -> str:
        async with attacker.connection(protocols=("h2",)) as (reader, writer):
            writer.write(_PREFACE)
            for stream in range(1, 201, 2):
                headers = frame(_HEADERS, _END, stream, fields)
                writer.write(headers + frame(_RESET, 0, stream, (8).to_bytes(4)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while await reader.read(2**18):
                        pass
        return "100 streams"

    await attacker.at_rate(burst, rate=RESETS / 100)


ORDINARY = "ordinary"
ATTACKS = (
    Attack(ORDINARY, ordinary, frozenset({"200"})),
    Attack("faults", faults, frozenset({"400", "413", "422"})),
    Attack("batches", batches, frozenset({"200"})),
    Attack("replay", replay, frozenset({"200"}), prepare=many_changes),
    Attack("positions", positions, frozenset({"200"}), prepare=many_changes),
    Attack("pictures", pictures, frozenset({"200"})),
    Attack("conditional", conditional, frozenset({"200"})),
    Attack("slow readers", slow_readers, frozenset({"200"})),
    Attack("half sent", half_sent, frozenset({"opened"})),
    Attack("raw bytes", raw_bytes, frozenset({"200"})),
    Attack("fan-out", fan_out, frozenset({"200"})),
    Attack("clusters", clusters, frozenset({"200"}), balancer=True),
    Attack("handshakes", handshakes, frozenset({"handshake"}), tls=True),
    Attack("resets", resets, frozenset({"100 streams"}), tls=True),
)
QUICK = ("faults", "batches", "positions", "pictures")


_attacker: Attacker | None = None  # of this process


def prepare(name: str, url: str, seconds: float, source: str = "") -> None:
    """Creates this process's attacker and runs the attack's `prepare`."""
    global _attacker
    target = Target.parse(url, insecure=True)
    source = source or (LOOPBACK_SOURCE if target.host.startswith("127.") else "")
    _attacker = attacker = Attacker(target, source)
    if (sending := _named(name).prepare) is not None:
        asyncio.run(attacker.work(sending, seconds))


def attack(name: str, seconds: float) -> Counter[str]:
    """Makes the attack; returns the number of requests by outcome."""
    assert _attacker is not None
    _attacker.answers.clear()
    asyncio.run(_attacker.work(_named(name).send, seconds))
    return _attacker.answers


def _named(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)
