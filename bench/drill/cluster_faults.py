"""The events of the drill on three hosts (`inventory/ha`), any one of which may die.

All hosts are balancers, app hosts and Redis hosts. c5 has the data master whenever it is available; t2 and
m5 each have a replica and a voter. Requests go to the address that moves between the balancers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from bench.drill.commands import expect_releases
from bench.drill.events import ANYTHING, AWAY, Act, Event, Scene
from bench.drill.hosts import BALANCER, OTHER, THIRD, WHOLE_SECONDS, FleetError, until

OFF_SECONDS = 20
CUT_OFF_SECONDS = 20
DARK_SECONDS = 5
DEGRADED_SECONDS = 10  # from a host's death until an operator deploys
OUTAGE = 6.0  # seconds without an acknowledged write, after the loss of any one host
MAXCLIENTS = 9000  # instead of the role's 10,000


def lose(host: str, state: str) -> Act:
    """Kills a host (`off`), or cuts its power (`cut`), and starts it later."""

    async def act(scene: Scene, _: int) -> None:
        await lose_and_return(scene, host, state)

    return act


async def lose_and_return(scene: Scene, host: str, state: str) -> None:
    await strike(scene, state, host)
    await asyncio.sleep(OFF_SECONDS)
    await scene.fleet.power("on", host)
    await scene.fleet.until_whole()


async def strike(scene: Scene, state: str, *hosts: str) -> None:
    with scene.blow():
        await scene.fleet.power(state, *hosts)


def freeze(host: str, seconds: float) -> Act:
    """Stops all processes of a host for some seconds; nothing closes their connections."""

    async def act(scene: Scene, _: int) -> None:
        await strike(scene, "freeze", host)
        await asyncio.sleep(seconds)
        await strike(scene, "on", host)
        await scene.fleet.until_whole()

    return act


def kill_redis(host: str) -> Act:
    """Kills the data process of a host, which systemd starts again."""

    async def act(scene: Scene, _: int) -> None:
        with scene.blow():
            await scene.fleet.ssh(host, "systemctl kill --signal=KILL redis-server.service")
        await scene.fleet.until_whole()

    return act


def cut_off(host: str) -> Act:
    async def act(scene: Scene, _: int) -> None:
        with scene.blow():
            await scene.fleet.cut(host)
        await asyncio.sleep(CUT_OFF_SECONDS)
        with scene.blow():
            await scene.fleet.join()
        await scene.fleet.until_whole()

    return act


def return_stale(seconds: float) -> Act:
    """Cuts off t2, whose replica is not waited for soon, and joins it again as the master's host dies."""

    async def act(scene: Scene, _: int) -> None:
        fleet = scene.fleet
        with scene.blow():
            await fleet.cut(OTHER)
        await asyncio.sleep(seconds)
        with scene.blow():
            await asyncio.gather(fleet.power("cut", BALANCER), fleet.join(OTHER, THIRD))
        await asyncio.sleep(OFF_SECONDS)
        await fleet.power("on", BALANCER)
        await fleet.until_whole()

    return act


async def lose_one_after_another(scene: Scene, _: int) -> None:
    """Loses c5, and after its return the host that was master meanwhile."""
    await strike(scene, "off", BALANCER)
    await asyncio.sleep(OFF_SECONDS)
    rows = await scene.fleet.cluster_status(OTHER)
    successors = [row["host"] for row in rows if row.get("owns_data")]
    await scene.fleet.power("on", BALANCER)
    await scene.fleet.until_whole()
    if len(successors) != 1:
        raise FleetError(f"without {BALANCER}, the data master was on {successors or 'no host'}")
    await lose_and_return(scene, successors[0], "off")


async def switch(scene: Scene, _: int) -> None:
    """Hands the master role over as before a reboot; it returns by itself."""
    await scene.fleet.ssh(BALANCER, "redis-cluster leave")
    await scene.fleet.ssh(BALANCER, "redis-cluster rejoin")
    await scene.fleet.until_whole()


async def change_redis(scene: Scene, _: int) -> None:
    """Changes a setting of Redis, and back; each time all hosts are restarted one after another."""
    await scene.fleet.must_play("redis.yml", redis_maxclients=MAXCLIENTS)
    await scene.fleet.must_play("redis.yml")
    await scene.fleet.until_whole()


async def deploy_degraded(scene: Scene, _: int) -> None:
    """Deploys to two hosts while the third is off, and to all when it is back."""
    fleet, release = scene.fleet, scene.next_release()
    await strike(scene, "off", THIRD)
    await asyncio.sleep(DEGRADED_SECONDS)
    await fleet.must_play("pixel_app.yml", limit=f"!{THIRD}", pixel_app_release=release)
    await expect_releases(fleet, dict.fromkeys((BALANCER, OTHER), release))
    await fleet.power("on", THIRD)
    await fleet.until_whole()
    await fleet.must_play("pixel_app.yml", pixel_app_release=release)
    await expect_releases(fleet, dict.fromkeys(fleet.addresses, release))


async def replace(scene: Scene, _: int) -> None:
    """Puts an empty machine in m5's place, which `site.yml` fills; the others keep their release."""
    former = await scene.fleet.releases()
    await strike(scene, "cut", THIRD)
    await asyncio.sleep(OFF_SECONDS)
    await scene.fleet.replace(THIRD)
    await scene.fleet.must_play("site.yml", pixel_app_release=former[BALANCER])
    await scene.fleet.until_whole()
    await expect_releases(scene.fleet, former)


def start_cold(missing: str) -> Act:
    """Cuts the power of all hosts, and starts them without one of them, which is started later."""

    async def act(scene: Scene, _: int) -> None:
        fleet = scene.fleet
        hosts = [host for host in fleet.addresses if host != missing]
        with scene.blow():
            await fleet.power("cut", *fleet.addresses)
            await asyncio.sleep(DARK_SECONDS)
            await fleet.power("on", *hosts)
            if missing == BALANCER:
                await promote(scene, hosts)
            await fleet.until_whole(missing)
        await asyncio.sleep(OFF_SECONDS)
        await fleet.power("on", missing)
        await fleet.until_whole()

    return act


async def promote(scene: Scene, hosts: list[str]) -> None:
    """Promotes a replica as an operator does: the one with the last events."""
    fleet = scene.fleet

    async def lack() -> str:
        """Returns why nobody can be promoted yet."""
        rows = await fleet.cluster_status(hosts[0])
        off = [row["address"] for row in rows if row["host"] in hosts and row.get("state") != "ok"]
        return f"Redis at {', '.join(off)} does not work" if off else ""

    await until(lack, WHOLE_SECONDS)
    for host in hosts:
        try:
            await fleet.ssh(host, "redis-cluster promote")
        except FleetError as error:
            if "has later events" not in str(error):
                raise
        else:
            return
    raise FleetError(f"none of {', '.join(hosts)} can be promoted")


def address_on(host: str) -> Callable[[Scene], Awaitable[None]]:
    """Moves the balancers' address to a host before the event."""

    async def prepare(scene: Scene) -> None:
        await scene.fleet.move_address(host)

    return prepare


def event(name: str, act: Act, address: str = BALANCER, **others: Any) -> Event:
    """An event with the limits of three hosts; `address` is the host that holds the balancers' address."""
    usual: dict[str, Any] = {"runs": 5, "grace": OUTAGE, "outage": OUTAGE, "patience": 180.0}
    return Event(name, act, prepare=address_on(address), **(usual | others))


EVENTS = (
    event("c5 killed", lose("c5", "off"), runs=10, excused=ANYTHING),
    event("t2 killed", lose("t2", "off"), address="t2", excused=ANYTHING),
    event("m5 killed", lose("m5", "off"), excused=AWAY),
    event("c5 power cut", lose("c5", "cut"), excused=ANYTHING),
    event("t2 power cut", lose("t2", "cut"), address="t2", excused=ANYTHING),
    event("m5 power cut", lose("m5", "cut"), excused=AWAY),
    event("data master killed", kill_redis("c5"), excused=AWAY),
    event("replica killed", kill_redis("t2"), excused=AWAY),
    event("c5 frozen 3 s", freeze("c5", 3), excused=ANYTHING),
    event("c5 frozen 10 s", freeze("c5", 10), excused=ANYTHING),
    event("m5 frozen 3 s", freeze("m5", 3), excused=AWAY),
    event("m5 frozen 10 s", freeze("m5", 10), excused=AWAY),
    event("c5 cut off", cut_off("c5"), excused=ANYTHING, apart="c5"),
    event("t2 cut off", cut_off("t2"), excused=AWAY, apart="t2"),
    event("t2 returns after 6 s as c5 dies", return_stale(6), excused=ANYTHING),
    event("t2 returns after 13 s as c5 dies", return_stale(13), excused=ANYTHING),
    event("two hosts in turn", lose_one_after_another, excused=ANYTHING, patience=300.0),
    event("planned switch", switch, planned=True),
    event("rolling change", change_redis, planned=True, patience=600.0),
    event("deploy while degraded", deploy_degraded, excused=AWAY, patience=600.0),
    event("m5 replaced", replace, excused=AWAY, patience=900.0),
    event("cold start without c5", start_cold("c5"), excused=ANYTHING, outage=math.inf, patience=300.0),
    event("cold start without m5", start_cold("m5"), excused=ANYTHING, outage=math.inf, patience=300.0),
)
QUICK = ("c5 power cut", "planned switch")
