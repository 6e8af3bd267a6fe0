"""The events of the drill: what is done to the fleet, and what its users may notice of it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hosts import BALANCER, OTHER, ROOT, Fleet, FleetError, tail

FROZEN_SECONDS = 20
AWAY_SECONDS = 5
EVEN = {"c5": 1, "t2": 1}
# Appended to the app's module: everything works but the answer that a deploy waits for.
REFUSAL = "This release is never ready."
NEVER_READY = f'''

_ready_app = app


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """A release that its gate must refuse."""
    if scope.get("path") != "/readyz":
        await _ready_app(scope, receive, send)
        return
    await send({{"type": "http.response.start", "status": 503, "headers": []}})
    await send({{"type": "http.response.body", "body": b"{REFUSAL}"}})
'''


class Scene:
    """The fleet under drill, and what an event has to know of those before it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.label = time.strftime("drill-%Y%m%d-%H%M%S")
        self.releases = 0
        self.may_roll_back = False

    def next_release(self) -> str:
        self.releases += 1
        return f"{self.label}-{self.releases}"

    def host(self, turn: int) -> str:
        """The hosts by turns."""
        return (BALANCER, OTHER)[turn % 2]


Act = Callable[[Scene, int], Awaitable[None]]


@dataclass(frozen=True)
class Event:
    """Something that happens, and what it may cost.

    `excused` are the failures that users may see while something is away: that is, until
    `grace` seconds after the act is over. Anything else is a fault.
    """

    name: str
    act: Act
    runs: int = 3
    planned: bool = False  # it begins when capacity first is short, not when the command is given
    excused: frozenset[str] = frozenset()
    grace: float = 0.0
    patience: float = 60.0  # seconds in all, after which the fleet counts as not recovered
    prepare: Callable[[Scene], Awaitable[None]] | None = None


# Releases and configuration


async def deploy(scene: Scene, _: int) -> None:
    release = scene.next_release()
    await scene.fleet.must_play("pixel_app.yml", pixel_app_release=release)
    await expect_releases(scene.fleet, dict.fromkeys(scene.fleet.addresses, release))
    scene.may_roll_back = True


async def bad_deploy(scene: Scene, _: int) -> None:
    former = await scene.fleet.releases()
    with never_ready_source() as source:
        variables = {
            "pixel_app_release": f"{scene.next_release()}-bad",
            "pixel_app_source": str(source),
            "pixel_app_ready_timeout": 10,
        }
        status, output = await scene.fleet.play("pixel_app.yml", variables)
    if status == 0:
        raise FleetError("the deploy of a release that is never ready did not fail")
    if REFUSAL not in output:
        raise FleetError(f"the deploy failed, but not at its gate:\n{tail(output, 25)}")
    await expect_releases(scene.fleet, former)


@contextmanager
def never_ready_source() -> Iterator[Path]:
    """A copy of the app that works, and never says that it is ready."""
    with tempfile.TemporaryDirectory(prefix="pixel-drill-") as folder:
        source = Path(folder) / "app"
        junk = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "tests", ".*")
        shutil.copytree(ROOT / "app", source, ignore=junk)
        module = source / "src" / "pixel" / "app.py"
        module.write_text(module.read_text() + NEVER_READY)
        yield source


async def roll_back(scene: Scene, _: int) -> None:
    former = await scene.fleet.releases()
    await scene.fleet.must_play("rollback.yml")
    scene.may_roll_back = False
    now = await scene.fleet.releases()
    if len(set(now.values())) != 1 or set(now) != set(former) or now == former:
        raise FleetError(f"after the rollback from {former} the hosts run {now}")


async def something_to_roll_back(scene: Scene) -> None:
    if not scene.may_roll_back:
        await deploy(scene, 0)


async def expect_releases(fleet: Fleet, wanted: dict[str, str]) -> None:
    now = await fleet.releases()
    if now != wanted:
        raise FleetError(f"the hosts should run {wanted}, and run {now}")


async def change_weights(scene: Scene, _: int) -> None:
    former = await weights(scene.fleet)
    await scene.fleet.must_play("nginx_lb.yml", nginx_lb_factors=EVEN)
    even = await weights(scene.fleet)
    await asyncio.sleep(2)
    await scene.fleet.must_play("nginx_lb.yml")
    now = await weights(scene.fleet)
    if len(set(even.values())) != 1 or now != former:
        raise FleetError(f"the weights were {former}, then {even}, then {now}")


async def weights(fleet: Fleet) -> dict[str, int]:
    return {host: said["weight"] for host, said in (await fleet.balancer_status()).items()}


async def drain(scene: Scene, _: int) -> None:
    await scene.fleet.must_play("drain.yml", host=OTHER)
    await asyncio.sleep(AWAY_SECONDS)
    await scene.fleet.must_play("undrain.yml", host=OTHER)


async def reload_nginx(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(BALANCER, "systemctl reload nginx")


# Processes


async def kill_worker(scene: Scene, turn: int) -> None:
    await scene.fleet.ssh(
        scene.host(turn),
        """
        master=$(systemctl show --property MainPID --value pixel.service)
        set -- $(cat "/proc/$master/task/$master/children")
        kill -KILL "$1"
        """,
    )


async def kill_master(scene: Scene, turn: int) -> None:
    await scene.fleet.ssh(
        scene.host(turn),
        'kill -KILL "$(systemctl show --property MainPID --value pixel.service)"',
    )


async def freeze(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(OTHER, "systemctl kill --signal=STOP pixel.service")
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.ssh(OTHER, "systemctl kill --signal=CONT pixel.service")


async def restart_redis(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(BALANCER, "systemctl restart redis-server.service")


async def kill_redis(scene: Scene, _: int) -> None:
    """The act is over when systemd has started it anew and it has read its log."""
    await scene.fleet.ssh(
        BALANCER,
        """
        pid() { systemctl show --property MainPID --value redis-server.service; }
        former=$(pid)
        kill -KILL "$former"
        until now=$(pid) && [ "$now" != 0 ] && [ "$now" != "$former" ] \
            && systemctl --quiet is-active redis-server.service; do sleep 0.05; done
        """,
    )


# Hosts and the network


async def stop_host(scene: Scene, _: int) -> None:
    """An orderly stop, as before a resize; and a start."""
    with suppress(FleetError):  # the connection may end before the command does
        await scene.fleet.ssh(OTHER, "systemctl poweroff")
    await until_off(scene.fleet.ssh_ports[OTHER])
    await asyncio.sleep(AWAY_SECONDS)
    await scene.fleet.power(OTHER, "on")


async def until_off(port: int, patience: float = 60) -> None:
    """The ports of a host are open for as long as it runs."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return
        await asyncio.sleep(0.2)
    raise FleetError(f"{OTHER} did not power off within {patience:.0f} s")


async def cut_off(scene: Scene, _: int) -> None:
    await scene.fleet.cut()
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.join()


async def cut_power(scene: Scene, _: int) -> None:
    await scene.fleet.power(BALANCER, "off")
    await asyncio.sleep(AWAY_SECONDS)
    await scene.fleet.power(BALANCER, "on")


AWAY = frozenset({"503"})
ANYTHING = frozenset(
    {"502", "503", "504", "cannot connect", "connection lost", "no answer in time"}
    | {"no free connection in time"}
)
EVENTS = (
    Event("deploy", deploy, runs=10, planned=True, patience=180),
    Event("bad deploy", bad_deploy, planned=True, patience=180),
    Event("rollback", roll_back, planned=True, patience=120, prepare=something_to_roll_back),
    Event("drain", drain, planned=True, patience=120),
    Event("weight change", change_weights, planned=True, patience=120),
    Event("reload", reload_nginx, planned=True),
    Event("worker killed", kill_worker, runs=10),
    Event("master killed", kill_master),
    Event("t2 frozen", freeze, patience=90),
    Event("t2 stopped", stop_host, patience=120),
    Event("t2 cut off", cut_off, patience=90),
    Event("redis restart", restart_redis, excused=AWAY, grace=2),
    Event("redis killed", kill_redis, runs=10, excused=AWAY, grace=2),
    Event("c5 power cut", cut_power, excused=ANYTHING, grace=10, patience=120),
)
QUICK = ("deploy", "bad deploy", "rollback", "worker killed", "redis killed")


def clear_cache(label: str) -> None:
    """Removes what the control node keeps of the drill's releases."""
    for folder in (ROOT / ".cache" / "releases").glob(f"{label}-*"):
        shutil.rmtree(folder, ignore_errors=True)  # what is left only takes room
