"""The events of the drill that are an operator's commands."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.drill.events import ANYTHING, AWAY, Act, Event, Scene
from bench.drill.hosts import BALANCER, OTHER, Fleet, FleetError, tail
from bench.drill.sources import LATE_FAULTS, REFUSAL, bad_after, never_ready

AWAY_SECONDS = 5
BAKE_SECONDS = 60
BAD_AFTER_SECONDS = 20
EVEN = {"c5": 1, "t2": 1}
LONG = 600.0  # seconds
CORNER = "1023,1023,1,1"  # an area that the drill doesn't write


async def deploy(scene: Scene, _: int) -> None:
    release = scene.next_release()
    await scene.fleet.must_play("pixel_app.yml", pixel_app_release=release)
    await expect_releases(scene.fleet, dict.fromkeys(scene.fleet.addresses, release))
    scene.may_roll_back = True


async def bad_deploy(scene: Scene, _: int) -> None:
    former = await scene.fleet.releases()
    await must_fail(scene, never_ready, REFUSAL, pixel_app_ready_timeout=10)
    await expect_releases(scene.fleet, former)


async def must_fail(scene: Scene, bad: Callable[[Path], Path], message: str, **variables: Any) -> None:
    """Deploys a bad copy of the app, which must be refused or given up with a message."""
    with tempfile.TemporaryDirectory(prefix="pixel-drill-") as folder:
        release = {"pixel_app_release": f"{scene.next_release()}-bad"}
        source = {"pixel_app_source": str(bad(Path(folder)))}
        status, output = await scene.fleet.play("pixel_app.yml", release | source | variables)
    if status == 0:
        raise FleetError("the deploy of a bad release succeeded")
    if message not in output:
        raise FleetError(f"the deploy failed, but not with {message!r}:\n{tail(output, 25)}")


def become_bad(fault: str) -> Act:
    """Deploys a release that passes its trial and becomes bad during the bake time."""

    async def act(scene: Scene, _: int) -> None:
        former = await scene.fleet.releases()
        with scene.blow():
            await must_fail(
                scene,
                lambda folder: bad_after(folder, fault, BAD_AFTER_SECONDS),
                f"was given up on {BALANCER}: ",
                pixel_app_bake=BAKE_SECONDS,
            )
        await expect_releases(scene.fleet, former)

    return act


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
        raise FleetError(f"the hosts run {now}, expected {wanted}")


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


def play(playbook: str, **variables: Any) -> Act:
    async def act(scene: Scene, _: int) -> None:
        await scene.fleet.must_play(playbook, **variables)

    return act


def maintain(state: str) -> Act:
    """Begins maintenance, and ends it."""

    async def act(scene: Scene, _: int) -> None:
        await scene.fleet.must_play("maintenance.yml", state=state)
        await asyncio.sleep(AWAY_SECONDS)
        await scene.fleet.must_play("maintenance.yml", state="off")

    return act


async def use_keys(scene: Scene, _: int) -> None:
    name = scene.next_release()
    await scene.fleet.must_play("keys.yml", create=name, scopes="paint")
    await scene.fleet.must_play("keys.yml", rotate=name)
    await scene.fleet.must_play("keys.yml", revoke=name)


async def moderate(scene: Scene, _: int) -> None:
    """Protects an area, blocks a client that doesn't write, and lifts both."""
    for variables in ({"protect": CORNER}, {"block": "addr:192.0.2.7", "time": "1h"}):
        status, output = await scene.fleet.play("moderate.yml", variables)
        found = re.search(r"\bid: ['\"]?([0-9a-f]+)", output)
        if status != 0 or found is None:
            raise FleetError(f"moderate.yml failed:\n{tail(output, 25)}")
        await scene.fleet.must_play("moderate.yml", lift=found[1])


DEPLOYS = (
    Event("deploy", deploy, runs=10, planned=True, patience=180),
    Event("bad deploy", bad_deploy, planned=True, patience=180),
    Event("rollback", roll_back, planned=True, patience=120, prepare=something_to_roll_back),
    Event("drain", drain, planned=True, patience=120),
    Event("weight change", change_weights, planned=True, patience=120),
    Event("reload", reload_nginx, planned=True),
)
# Commands of the runbook, in an order that ends with the longest. Restoring a backup is not among them, as it
# removes acknowledged writes, nor is what tests do with other inventories.
COMMANDS = (
    Event("site.yml", play("site.yml"), planned=True, patience=LONG),
    *DEPLOYS,
    Event("status", play("status.yml"), planned=True),
    Event("doctor", play("doctor.yml"), planned=True),
    Event("audit", play("audit.yml"), planned=True),
    Event("logs", play("logs.yml", since="1m", status="5xx"), planned=True),
    Event("keys", use_keys, planned=True),
    Event("moderate", moderate, planned=True),
    Event("undo", play("undo.yml", author="key:nobody", apply=True), planned=True),
    Event("backup", play("backup.yml"), planned=True),
    Event("read-only", maintain("read-only"), planned=True, excused=AWAY, grace=2, patience=120),
    Event("maintenance", maintain("on"), planned=True, excused=AWAY, grace=2, patience=120),
    Event("rotate", play("rotate.yml"), planned=True, patience=LONG),
    *(
        Event(f"{fault} later", become_bad(fault), runs=5, planned=True, excused=AWAY, patience=LONG)
        for fault in LATE_FAULTS
    ),
    Event("patch", play("patch.yml", patch_reboot="always"), planned=True, patience=LONG),
    Event(
        "patch with outage",
        play("patch.yml", patch_reboot="always", patch_outage=True),
        planned=True,
        excused=ANYTHING,
        grace=10,
        patience=LONG,
    ),
)
