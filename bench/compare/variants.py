"""The compared variants: their programs and workloads."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.compare.processes import Program, free_port, wait_for_port

PEERS = Path(__file__).parent / "peers"
MODULES = Path("/usr/lib/nginx/modules")
KEEP_ALIVE_SECONDS = "75"


@dataclass(frozen=True)
class Place:
    """Where and how a variant runs: directory, processors, `appendfsync`, number of workers."""

    directory: Path
    processors: frozenset[int]
    fsync: str
    workers: int = 1


@dataclass
class Stack:
    """The running programs of a variant, by the group of their CPU time."""

    port: int = 0
    token: str = ""  # the key of the load's clients
    programs: dict[str, Program] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """An implementation of the endpoint; `start` starts its programs, the caller stops them."""

    name: str
    what: str
    start: Callable[[Stack, Place], None]
    stores: bool = True
    workloads: frozenset[str] = frozenset({"write"})
    publish: str = ""  # path that takes messages for viewers; by default, they see what is written


def render(source: str, target: Path, **names: object) -> Path:
    text = (PEERS / source).read_text()
    for name, value in names.items():
        text = text.replace("{{" + name + "}}", str(value))
    target.write_text(text)
    return target


# The programs


def start_redis(stack: Stack, place: Place) -> int:
    port = free_port()
    config = render(
        "redis.conf",
        place.directory / "redis.conf",
        port=port,
        directory=place.directory,
        fsync=place.fsync,
    )
    log = place.directory / "redis.log"
    redis = Program("redis", ["redis-server", str(config)], place.processors, log)
    stack.programs["redis"] = redis
    wait_for_port(redis, port)
    return port


def start_nginx(stack: Stack, place: Place, site: str, modules: Iterable[str] = (), **names: object) -> None:
    stack.port = free_port()
    site_file = render(
        site,
        place.directory / site,
        port=stack.port,
        directory=place.directory,
        peers=PEERS.resolve(),
        **names,
    )
    preamble = [f"load_module {MODULES}/{name}.so;" for name in modules]
    if os.geteuid() == 0:
        preamble.append(f"user {pwd.getpwuid(0).pw_name};")  # otherwise Nginx can't read the directory
    config = render(
        "nginx.conf",
        place.directory / "nginx.conf",
        preamble="\n".join(preamble),
        directory=place.directory,
        site=site_file,
    )
    nginx = Program(
        "nginx",
        ["nginx", "-e", "stderr", "-p", str(place.directory), "-c", str(config)],
        place.processors,
        place.directory / "nginx.out",
    )
    stack.programs["nginx"] = nginx
    wait_for_port(nginx, stack.port)


def start_gunicorn(stack: Stack, place: Place, arguments: list[str], environment: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "PIXEL_"}
    stack.programs["app"] = Program(
        "app",
        [sys.executable, "-m", "gunicorn", *arguments],
        place.processors,
        place.directory / "app.log",
        {**inherited, **environment},
    )


def start_peer(
    stack: Stack, place: Place, module: str, worker: str, environment: dict[str, str] | None = None
) -> int:
    """Starts a Python peer under Gunicorn; returns its port."""
    port = free_port()
    arguments = ["--bind", f"127.0.0.1:{port}", "--workers", str(place.workers)]
    arguments += ["--worker-class", f"uvicorn_worker.{worker}", "--backlog", "4096"]
    arguments += ["--keep-alive", KEEP_ALIVE_SECONDS, "--chdir", str(PEERS), f"{module}:app"]
    start_gunicorn(stack, place, arguments, environment or {})
    wait_for_port(stack.programs["app"], port)
    return port


def start_ours(stack: Stack, place: Place, bind: str, redis_port: int) -> None:
    metrics = place.directory / "metrics"
    metrics.mkdir()
    environment = {
        "PIXEL_BIND": bind,
        "PIXEL_WORKERS": str(place.workers),
        "PIXEL_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
        "PIXEL_INSTANCE": "bench",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    start_gunicorn(stack, place, ["--config", "python:pixel.gunicorn_conf", "pixel.app:app"], environment)


# The variants


def literal(stack: Stack, place: Place) -> None:
    port = start_peer(stack, place, "literal", "UvicornH11Worker")
    start_nginx(stack, place, "site_proxy.conf", upstream=f"127.0.0.1:{port}")


def usual(stack: Stack, place: Place) -> None:
    redis_port = start_redis(stack, place)
    environment = {"BENCH_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0"}
    port = start_peer(stack, place, "usual", "UvicornH11Worker", environment)
    start_nginx(stack, place, "site_proxy.conf", upstream=f"127.0.0.1:{port}")


def ours_direct(stack: Stack, place: Place) -> None:
    stack.port = free_port()
    start_ours(stack, place, f"127.0.0.1:{stack.port}", start_redis(stack, place))
    wait_for_port(stack.programs["app"], stack.port)


def ours_tcp(stack: Stack, place: Place) -> None:
    ours_direct(stack, place)
    start_nginx(stack, place, "site_proxy.conf", upstream=f"127.0.0.1:{stack.port}")


def ours_unix(stack: Stack, place: Place) -> None:
    bind = f"unix:{place.directory}/app.sock"
    start_ours(stack, place, bind, start_redis(stack, place))
    start_nginx(stack, place, "site_proxy.conf", upstream=bind)


def ours_keys(stack: Stack, place: Place, *budget: str) -> None:
    bind = f"unix:{place.directory}/app.sock"
    redis_port = start_redis(stack, place)
    create = [sys.executable, "-m", "pixel.keys", "create", "bench", "--scopes=paint", *budget]
    environment = {**os.environ, "PIXEL_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0"}
    created = subprocess.run(create, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    stack.token = created.stdout.strip()
    start_ours(stack, place, bind, redis_port)
    start_nginx(stack, place, "site_proxy.conf", upstream=bind)


def ours_budgets(stack: Stack, place: Place) -> None:
    ours_keys(stack, place, "--per-minute=10000000")


def nginx_lua(stack: Stack, place: Place, events: bool = True) -> None:
    redis_port = start_redis(stack, place)
    start_nginx(
        stack,
        place,
        "site_lua.conf",
        ("ndk_http_module", "ngx_http_lua_module"),
        redis_port=redis_port,
        events=str(events).lower(),
    )


def nginx_lua_bare(stack: Stack, place: Place) -> None:
    nginx_lua(stack, place, events=False)


def nchan(stack: Stack, place: Place) -> None:
    start_nginx(stack, place, "site_nchan.conf", ["ngx_nchan_module"])


def floor_nginx(stack: Stack, place: Place) -> None:
    start_nginx(stack, place, "site_floor.conf")


def floor_asgi(stack: Stack, place: Place) -> None:
    stack.port = start_peer(stack, place, "floor_asgi", "UvicornWorker")


EVERYTHING = frozenset({"write", "batch100", "mix90"})
OURS = EVERYTHING | {"browser", "viewers"}
READS = frozenset({"write", "mix90"})
VIEWERS = frozenset({"viewers"})

VARIANTS = {
    variant.name: variant
    for variant in [
        Variant("literal", "FastAPI, stores nothing, Nginx over TCP", literal, stores=False),
        Variant("usual", "FastAPI + redis-py, Nginx over TCP", usual, workloads=EVERYTHING),
        Variant("ours_tcp", "ours, Nginx over TCP", ours_tcp),
        Variant("ours_unix", "ours, Nginx over a unix socket", ours_unix, workloads=OURS),
        Variant("ours_keys", "ours_unix, every client has a key", ours_keys),
        Variant("ours_budgets", "ours_keys, the key has a budget", ours_budgets),
        Variant("ours_direct", "ours, without Nginx", ours_direct),
        Variant("nginx_lua", "Nginx + Lua, write and event", nginx_lua, workloads=READS),
        Variant("nginx_lua_bare", "Nginx + Lua, write without event", nginx_lua_bare),
        Variant(
            "nchan", "Nchan, only for viewers", nchan, stores=False, workloads=VIEWERS, publish="/publish"
        ),
        Variant("floor_nginx", "Nginx answers a constant", floor_nginx, stores=False),
        Variant("floor_asgi", "Uvicorn answers a constant", floor_asgi, stores=False),
    ]
}


@contextmanager
def running(variant: Variant, place: Place) -> Iterator[Stack]:
    """Starts the variant's programs, and stops them at the end."""
    stack = Stack()
    place.directory.mkdir(parents=True)
    try:
        variant.start(stack, place)
        yield stack
    finally:
        for program in stack.programs.values():
            program.stop()
