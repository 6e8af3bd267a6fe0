"""Fixtures: Redis servers with the durability and the users of a fleet, and the service under
Gunicorn as systemd starts it."""

import contextlib
import functools
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpcore2
import httpx2 as httpx
import pytest
import redis
import yaml
from hypothesis import HealthCheck, settings
from starlette.testclient import TestClient

from pixel.app import create_app
from pixel.settings import Settings
from pixel.store import Store

# The same examples in every run, however busy the machine is.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

# Each client of httpx would load the certificates of all authorities, 40 ms. No test uses TLS.
httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)

REDIS_ROLE = Path(__file__).parents[2] / "roles" / "redis" / "vars" / "main.yml"
APP_COMMANDS: list[str] = yaml.safe_load(REDIS_ROLE.read_text())["_redis_app_commands"]
APP_USER = f"~pixel:* resetchannels -@all +{' +'.join(APP_COMMANDS)}"
PASSWORD = "correct-horse"
GUNICORN = ("gunicorn", "--config", "python:pixel.gunicorn_conf", "pixel.app:app")


def wait_until(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a condition is true; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition didn't become true in time"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody uses, and that no connection gets by itself: these begin at 32768."""
    found: list[int] = []
    with contextlib.ExitStack() as sockets:
        while len(found) < count:
            port = random.randrange(10_000, 32_000)
            with contextlib.suppress(OSError):
                sockets.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


class RedisProcess:
    """A Redis server, which a test can pause and kill."""

    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class RedisServer(RedisProcess):
    """A durable Redis server in a temporary directory, which a test can pause, kill and restart."""

    def __init__(self) -> None:
        # Not pytest's directory: a socket's path has to be short.
        self.directory = Path(tempfile.mkdtemp(prefix="px-"))
        self.socket = self.directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        # The default user can't log in, but must keep its permissions: Redis replays the
        # transactions of its append-only file as that user, and drops what it may not do.
        options = f"""
            --port 0 --unixsocket {self.socket} --dir {self.directory}
            --save "" --appendonly yes --appendfsync always
            --user default off resetpass ~* &* +@all
            --user admin on nopass ~* &* +@all
            --user pixel on >{PASSWORD} {APP_USER}
        """
        self.process = subprocess.Popen(["redis-server", *shlex.split(options)], stdout=subprocess.DEVNULL)
        try:
            wait_until(self._answers)
        except AssertionError:
            self.kill()
            raise

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.admin() as admin:
            return bool(admin.ping())
        return False

    def admin(self) -> redis.Redis:
        """A client with all permissions. The caller closes it."""
        return redis.Redis(unix_socket_path=str(self.socket), username="admin", password="", protocol=2)

    def settings(self, **others: object) -> Settings:
        """Settings of a service that uses this Redis."""
        return Settings(redis_url=self.url, redis_username="pixel", redis_password=PASSWORD, **others)

    def kill(self) -> None:
        super().kill()
        self.socket.unlink(missing_ok=True)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory)


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.remove()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """The shared Redis, emptied. Tests must not stop it."""
    with shared_redis.admin() as admin:
        admin.flushall()
    return shared_redis


@pytest.fixture
def fragile_redis() -> Iterator[RedisServer]:
    """A Redis that the test may pause, kill and break."""
    server = RedisServer()
    yield server
    server.remove()


@pytest.fixture
async def fragile(fragile_redis: RedisServer) -> AsyncIterator[Store]:
    """A store that is connected to ``fragile_redis``."""
    store = Store(fragile_redis.settings())
    await store.probe()
    yield store
    store.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[TestClient]:
    """The application in this process, with an empty canvas of 1024x1024."""
    with TestClient(create_app(redis_server.settings(instance="c5", release="r1"))) as client:
        yield client


class Service:
    """The service under Gunicorn, with a TCP and a unix socket passed as systemd passes them."""

    def __init__(self, redis_url: str, **environment: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="px-"))
        (self.directory / "metrics").mkdir()
        self.socket = self.directory / "app.sock"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.socket))
        self.unix.listen()
        self.url = f"http://127.0.0.1:{self.tcp.getsockname()[1]}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
            "PROMETHEUS_MULTIPROC_DIR": str(self.directory / "metrics"),
            "PIXEL_INSTANCE": "c5",
            "PIXEL_WORKERS": "2",
            "PIXEL_REDIS_URL": redis_url,
            "PIXEL_REDIS_USERNAME": "pixel",
            "PIXEL_REDIS_PASSWORD": PASSWORD,
            **environment,
        }
        self.log = (self.directory / "log").open("a+")
        self.start()

    def start(self) -> None:
        sockets = (self.tcp.fileno(), self.unix.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AS_SYSTEMD, *map(str, sockets), "-m", *GUNICORN],
            env=self.environment,
            pass_fds=sockets,
            stderr=self.log,
        )

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)

    def remove(self) -> None:
        if self.process.poll() is None:
            self.stop()
        self.log.close()
        self.tcp.close()
        self.unix.close()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def history_service(server: RedisServer, directory: Path) -> Iterator[str]:
    """Runs the history service of a Redis, with its file in a directory; its address."""
    [port] = free_ports(1)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parent.parent / "src"),
        "HISTORY_PATH": str(directory / "history.sqlite"),
        "HISTORY_PORT": str(port),
        "PIXEL_REDIS_URL": server.url,
        "PIXEL_REDIS_USERNAME": "pixel",
        "PIXEL_REDIS_PASSWORD": PASSWORD,
    }
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return bool(httpx.get(f"{url}/healthz").status_code == 200)
        return False

    with subprocess.Popen([sys.executable, "-m", "pixel.history", "serve"], env=environment) as process:
        try:
            wait_until(answers, 20)
            yield url
        finally:
            process.terminate()


def worker_pids(service: Service) -> set[int]:
    """The processes of a service's workers."""
    pid = service.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# Puts the two sockets where systemd does, 3 and 4, and executes the given command.
_AS_SYSTEMD = """
import os, sys
for source, aside in zip(sys.argv[1:3], (100, 101)):
    os.dup2(int(source), aside)
os.dup2(100, 3)
os.dup2(101, 4)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


@pytest.fixture
def start_service() -> Iterator[Callable[..., Service]]:
    """A function that starts services; they are stopped after the test."""
    services: list[Service] = []

    def start(redis_url: str, **environment: str) -> Service:
        services.append(Service(redis_url, **environment))
        return services[-1]

    yield start
    for service in services:
        service.remove()


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    """A store on the shared Redis, emptied."""
    store = Store(redis_server.settings())
    yield store
    store.close()


@pytest.fixture(scope="module")
def service(shared_redis: RedisServer) -> Iterator[Service]:
    """A service with two workers, which is ready."""
    service = Service(shared_redis.url)
    assert httpx.get(f"{service.url}/readyz", timeout=20).status_code == 200
    yield service
    service.remove()
