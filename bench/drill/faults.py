"""The events of the drill on two hosts: what each does to the fleet, and which failures it excuses."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress

from bench.drill.commands import AWAY_SECONDS, DEPLOYS
from bench.drill.events import ANYTHING, AWAY, Event, Scene
from bench.drill.hosts import BALANCER, OTHER, FleetError

FROZEN_SECONDS = 20
REDIS_STOPPED_SECONDS = 3
DELAY_SECONDS = 3
A_FIFTIETH = 0.02  # of a CPU

# Sets the shell's positional parameters to the process IDs of the app's workers.
WORKERS = """\
master=$(systemctl show --property MainPID --value pixel.service)
set -- $(cat "/proc/$master/task/$master/children")"""


# Processes


async def kill_worker(scene: Scene, turn: int) -> None:
    await scene.fleet.ssh(
        scene.host(turn),
        f'{WORKERS}; kill -KILL "$1"',
    )


async def kill_master(scene: Scene, turn: int) -> None:
    await scene.fleet.ssh(
        scene.host(turn),
        'kill -KILL "$(systemctl show --property MainPID --value pixel.service)"',
    )


async def freeze(scene: Scene, _: int) -> None:
    await signal_app(scene, "STOP")
    await asyncio.sleep(FROZEN_SECONDS)
    await signal_app(scene, "CONT")


async def freeze_as_writers_end(scene: Scene, _: int) -> None:
    """Ends the writers during the freeze, so that no newer write hides one that was delayed."""
    await signal_app(scene, "STOP")
    await asyncio.sleep(FROZEN_SECONDS / 2)
    scene.end_writers()
    await asyncio.sleep(FROZEN_SECONDS / 4)
    await signal_app(scene, "CONT")


async def signal_app(scene: Scene, name: str) -> None:
    await scene.fleet.ssh(OTHER, f"systemctl kill --signal={name} pixel.service")


async def stop_a_worker(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(OTHER, f'{WORKERS}; kill -STOP "$1"')
    await asyncio.sleep(FROZEN_SECONDS)
    await signal_app(scene, "CONT")


async def stop_workers(scene: Scene, _: int) -> None:
    """Stops the workers one at a time; the master continues, and the listening socket stays open."""
    script = f'{WORKERS}; for worker; do kill -STOP "$worker"; sleep 2; done'
    await scene.fleet.ssh(OTHER, script)
    await asyncio.sleep(FROZEN_SECONDS / 2)
    await signal_app(scene, "CONT")


async def throttle(scene: Scene, _: int) -> None:
    await scene.fleet.throttle(OTHER, A_FIFTIETH)
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.throttle(OTHER, None)


async def stop_redis(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(
        BALANCER,
        f"""
        systemctl kill --signal=STOP redis-server.service
        sleep {REDIS_STOPPED_SECONDS}
        systemctl kill --signal=CONT redis-server.service
        """,
    )


async def restart_redis(scene: Scene, _: int) -> None:
    await scene.fleet.ssh(BALANCER, "systemctl restart redis-server.service")


async def kill_redis(scene: Scene, _: int) -> None:
    """Returns when systemd has restarted Redis and Redis has loaded its log."""
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
    """Shuts the host down, as before a resize, and starts it again."""
    with suppress(FleetError):  # the connection may end before the command does
        await scene.fleet.ssh(OTHER, "systemctl poweroff")
    await until_off(scene.fleet.ssh_ports[OTHER])
    await asyncio.sleep(AWAY_SECONDS)
    await scene.fleet.power("on", OTHER)


async def until_off(port: int, patience: float = 60) -> None:
    """Waits until a port of a host is closed, which means that the host is off."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return
        await asyncio.sleep(0.2)
    raise FleetError(f"{OTHER} did not power off within {patience:.0f} s")


async def cut_off(scene: Scene, _: int) -> None:
    await scene.fleet.cut(OTHER)
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.restore_network()


async def cut_off_from_redis(scene: Scene, _: int) -> None:
    await scene.fleet.drop("tcp dport 6379 drop; tcp sport 6379 drop;")
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.restore_network()


async def cut_off_from_balancer(scene: Scene, _: int) -> None:
    """Drops requests and answers; the host still reaches Redis."""
    await scene.fleet.drop("tcp dport 8000 drop; tcp sport 8000 drop;")
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.restore_network()


async def delay(scene: Scene, _: int) -> None:
    """Delays packets; those in flight still arrive late after the delay has ended."""
    await scene.fleet.delay(DELAY_SECONDS)
    await asyncio.sleep(FROZEN_SECONDS)
    await scene.fleet.join()
    await asyncio.sleep(DELAY_SECONDS)
    await scene.fleet.restore_network()


async def cut_power(scene: Scene, _: int) -> None:
    await scene.fleet.power("off", BALANCER)
    await asyncio.sleep(AWAY_SECONDS)
    await scene.fleet.power("on", BALANCER)


EVENTS = (
    *DEPLOYS,
    Event("worker killed", kill_worker, runs=10),
    Event("master killed", kill_master),
    Event("t2 frozen", freeze, runs=10, patience=90),
    Event("t2 frozen as writers end", freeze_as_writers_end, patience=90),
    Event("t2 worker stopped", stop_a_worker, patience=90),
    Event("t2 workers stopped", stop_workers, patience=90),
    Event("t2 throttled", throttle, patience=120),
    Event("t2 stopped", stop_host, patience=120),
    Event("t2 cut off", cut_off, patience=90),
    Event("t2 cut off from redis", cut_off_from_redis, runs=10, patience=90),
    Event("t2 cut off from balancer", cut_off_from_balancer, runs=10, patience=90),
    Event("t2 delayed", delay, patience=90),
    Event("redis restart", restart_redis, excused=AWAY, grace=2),
    Event("redis stopped", stop_redis, excused=AWAY, grace=2, patience=90),
    Event("redis killed", kill_redis, runs=10, excused=AWAY, grace=2),
    Event("c5 power cut", cut_power, excused=ANYTHING, grace=10, patience=120),
)
QUICK = ("worker killed", "t2 worker stopped", "redis killed")
