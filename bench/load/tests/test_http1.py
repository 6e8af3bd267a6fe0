from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing

import pytest

from bench.load.http1 import Answer, AnswerReader, BadAnswerError, Client, ConnectError, Target
from bench.load.tests.standin import WIDTH, StandIn

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN


@pytest.mark.parametrize("message", [PLAIN, CHUNKED, INTERIM])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_an_answer_is_complete_however_it_comes(message: bytes, piece: int) -> None:
    reader = AnswerReader()
    for _ in range(2):
        answers = [reader.feed(message[at : at + piece]) for at in range(0, len(message), piece)]
        assert answers[-1] == Answer(200, b"hello", True)
        assert not any(answers[:-1])


def test_an_answer_without_a_body() -> None:
    assert AnswerReader().feed(EMPTY) == Answer(204, b"", True)


def test_close_is_honoured() -> None:
    answer = AnswerReader().feed(PLAIN.replace(b"\r\n\r\n", b"\r\nConnection: Close\r\n\r\n"))
    assert answer == Answer(200, b"hello", False)


def test_an_answer_without_length_ends_with_the_connection() -> None:
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nhel") is None
    assert reader.feed(b"lo") is None
    assert reader.end() == Answer(200, b"hello", False)


def test_half_an_answer_is_none() -> None:
    reader = AnswerReader()
    assert reader.feed(PLAIN[:-1]) is None
    assert reader.end() is None


@pytest.mark.parametrize(
    "message",
    [
        b"SSH-2.0-x\r\n\r\n",
        PLAIN + b"more",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_refused(message: bytes) -> None:
    with pytest.raises(BadAnswerError):
        AnswerReader().feed(message)


def test_a_target_keeps_path_port_and_headers() -> None:
    target = Target.parse("http://localhost:81/cluster/c5/", ["X-Key: 1"])
    assert (target.host, target.port, target.url) == (
        "localhost",
        81,
        "http://localhost:81/cluster/c5",
    )
    assert target.head("POST", "/pixel") == (
        b"POST /cluster/c5/pixel HTTP/1.1\r\nHost: localhost:81\r\nX-Key: 1\r\n"
    )


@pytest.mark.parametrize("url", ["localhost:80", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        Target.parse(url)


@pytest.mark.parametrize("header", ["nonsense", "A: b\r\nC: d"])
def test_what_is_no_header_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match="not a header"):
        Target.parse("http://x", [header])


# The client


def test_a_client_keeps_its_connection_and_opens_another_after_a_close() -> None:
    async def session(service: StandIn) -> list[int]:
        with closing(Client(Target.parse(service.url))) as client:
            body = b'{"R":1,"G":2,"B":3}'
            statuses = [(await client.request("PUT", "/pixel/1/2", body)).status for _ in range(2)]
            service.close_each = True
            return statuses + [(await client.get("/pixel/1/2")).status for _ in range(2)]

    with StandIn().serving() as service:
        assert asyncio.run(session(service)) == [200, 200, 200, 200]
        assert service.canvas[(2 * WIDTH + 1) * 3 :][:3] == b"\1\2\3"


def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    async def session(service: StandIn) -> None:
        with closing(Client(Target.parse(service.url), timeout=0.2)) as client:
            body = b'{"x":1,"y":2,"channel":"R","value":3}'
            service.delay = 0.4
            with pytest.raises(TimeoutError):
                await client.request("POST", "/pixel", body)
            await asyncio.sleep(0.4)
            answer = await client.get("/pixel/1/2")
            assert json.loads(answer.body) == {"R": 3, "G": 0, "B": 0}

    with StandIn().serving() as service:
        asyncio.run(session(service))


def test_a_request_without_a_connection_was_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = Client(Target.parse(f"http://127.0.0.1:{port}"))
    with pytest.raises(ConnectError):
        asyncio.run(client.get("/"))


def test_a_request_that_is_given_up_is_discarded_by_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(Target.parse(f"http://127.0.0.1:{server.getsockname()[1]}"), timeout=0.2)
        with pytest.raises(TimeoutError):
            asyncio.run(client.get("/"))
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as sent, pytest.raises(ConnectionResetError):
            sent.read()
