"""The connection to Redis: addresses, replies, errors and TLS."""

import asyncio
import contextlib
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from conftest import PASSWORD, RedisServer, free_ports

from pixel import resp
from pixel.resp import Connection, ReplyError, Server
from pixel.settings import Settings


def server(url: str, **others: object) -> Server:
    return Server.of(Settings(redis_url=url, **others))


def test_addresses_are_parsed() -> None:
    tcp = server("redis://10.0.0.1/2")
    assert (tcp.host, tcp.port, tcp.database, tcp.tls, tcp.path) == ("10.0.0.1", 6379, 2, False, "")
    assert (tcp.username, tcp.password) == (None, None)
    tls = server("rediss://pixel@[::1]:7000", redis_password=PASSWORD)
    assert (tls.host, tls.port, tls.database, tls.tls) == ("::1", 7000, 0, True)
    assert (tls.username, tls.password) == ("pixel", PASSWORD)
    assert PASSWORD not in repr(tls)
    local = server("unix:///run/redis.sock?db=3", redis_username="app")
    assert (local.path, local.database, local.username) == ("/run/redis.sock", 3, "app")


@pytest.fixture
async def connection(redis_server: RedisServer) -> AsyncIterator[Connection]:
    connection = await Connection.open(Server.of(redis_server.settings()))
    yield connection
    connection.close()


async def test_pipelines_in_flight_together_get_their_own_replies(connection: Connection) -> None:
    asked = [connection.execute([("PING", f"{n}"), ("PING", b"x" * n * 999)]) for n in range(50)]
    for n, replies in enumerate(await asyncio.gather(*asked)):
        assert replies == [str(n).encode(), b"x" * n * 999]


async def test_an_error_is_the_reply_to_its_own_command(connection: Connection) -> None:
    first, error, last = await connection.execute([("PING", "a"), ("NONSENSE",), ("PING", "b")])
    assert (first, last) == (b"a", b"b")
    assert isinstance(error, ReplyError)


async def test_replies_to_cancelled_commands_are_dropped(connection: Connection) -> None:
    gone, here = connection.execute([("PING", "a")]), connection.execute([("PING", "b")])
    gone.cancel()
    assert await here == [b"b"]


async def test_a_lost_connection_fails_the_commands_in_flight(fragile_redis: RedisServer) -> None:
    connection = await Connection.open(Server.of(fragile_redis.settings()))
    fragile_redis.pause()
    asked = [connection.execute([("PING",)]) for _ in range(3)]
    fragile_redis.kill()
    for result in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(result, ConnectionError)
    assert connection.closed
    with pytest.raises(ConnectionError):
        await connection.execute([("PING",)])


async def test_a_wrong_password_is_an_error_without_the_password(redis_server: RedisServer) -> None:
    settings = redis_server.settings().model_copy(update={"redis_username": "nobody"})
    with pytest.raises(ReplyError, match="WRONGPASS") as caught:
        await Connection.open(Server.of(settings))
    assert PASSWORD not in str(caught.value)


class NotRedis(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        transport.close()


async def test_a_server_that_is_not_redis_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with await asyncio.get_running_loop().create_unix_server(NotRedis, path):
        with pytest.raises(ConnectionError, match="not Redis"):
            await Connection.open(server(f"unix://{path}"))


@pytest.fixture
def tls_redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis with TLS; its certificate is ``tmp_path / "cert.pem"``."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    [port] = free_ports(1)
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no",
         "--tls-cert-file", tmp_path / "cert.pem", "--tls-key-file", tmp_path / "key.pem",
         "--tls-ca-cert-file", tmp_path / "cert.pem", "--save", "", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    yield f"rediss://127.0.0.1:{port}"
    resp._tls_context.cache_clear()
    process.terminate()
    process.wait()


async def test_tls_is_spoken_and_certificates_are_checked(
    tls_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "cert.pem"
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                    await Connection.open(server(tls_redis))
                break
            await asyncio.sleep(0.05)
    connection = await Connection.open(server(tls_redis, redis_ca=b64encode(certificate.read_bytes())))
    assert await connection.execute([("PING",)]) == [b"PONG"]
    connection.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    resp._tls_context.cache_clear()
    connection = await Connection.open(server(tls_redis))
    assert await connection.execute([("PING",)]) == [b"PONG"]
    connection.close()
