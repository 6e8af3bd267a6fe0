"""The events of three hosts, without hosts."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from bench.drill import __main__ as drill
from bench.drill import hosts
from bench.drill.cluster_faults import EVENTS, OUTAGE, QUICK
from bench.drill.events import ANYTHING, AWAY, Event, Scene
from bench.drill.hosts import Fleet, FleetError, lack_of_cluster

ADDRESSES = {"c5": "192.0.2.10", "t2": "192.0.2.11", "m5": "192.0.2.12"}


def rows(master: str = "c5", unready: str = "", dead: str = "") -> list[dict[str, Any]]:
    """The output of `redis-cluster status`, with hosts."""
    found: list[dict[str, Any]] = []
    for kind, names in (("data", ["c5", "t2", "m5"]), ("voter", ["t2", "m5"])):
        for host in names:
            port = 6379 if kind == "data" else 6380
            row: dict[str, Any] = {"address": f"{ADDRESSES[host]}:{port}", "kind": kind, "host": host}
            if host == dead:
                found.append(row | {"role": "unknown", "error": "timed out"})
                continue
            row |= {"state": "ok", "owns_data": kind == "data" and host == master}
            if kind == "data" and host != master:
                row["is_ready"] = host != unready
            found.append(row)
    return found


class Cluster(Fleet):
    """Three hosts that do nothing, and a cluster that is always complete."""

    commands: list[str]
    holder: str

    async def _run(self, *command: str, patience: float, text: str = "") -> tuple[int, str]:
        line = " ".join((*command, text))
        self.commands.append(line)
        if "redis-cluster status" in line:
            master = "t2" if self.is_off("c5") else "c5"
            off = next((host for host in ADDRESSES if self.is_off(host)), "")
            return 0, json.dumps(rows(master, dead=off))
        if "pixel-lb status" in line:
            held = {"held": f" {self.holder} " in line}
            backends = {host: {"state": "up", "weight": 1} for host in ADDRESSES}
            return 0, json.dumps({"address": held, "backends": backends})
        return 0, ""

    def is_off(self, host: str) -> bool:
        changes = [line for line in self.commands if "fleet.py" in line and f" {host} " in line]
        return bool(changes) and changes[-1].split()[-1] in ("off", "cut")

    async def releases(self) -> dict[str, str]:
        plays = [line for line in self.commands if "pixel_app.yml" in line]
        release = plays[-1].partition('"pixel_app_release": "')[2].partition('"')[0] if plays else "former"
        return {host: release for host in ADDRESSES if not self.is_off(host)}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    async def no_time(_: float) -> None:
        pass

    monkeypatch.setattr("bench.drill.cluster_faults.asyncio.sleep", no_time)
    # What is not there at once never comes.
    monkeypatch.setattr("bench.drill.hosts.WHOLE_SECONDS", 0)
    monkeypatch.setattr("bench.drill.cluster_faults.WHOLE_SECONDS", 0)
    fleet = Cluster("nobody", "http://192.0.2.254", ADDRESSES, {}, "ha")
    object.__setattr__(fleet, "commands", [])
    object.__setattr__(fleet, "holder", "c5")
    return fleet


def test_the_fleet_decides_which_events_there_are(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Fleet, "load", lambda: cluster)
    assert [event.name for event in drill.parse_arguments(["--quick"]).events] == list(QUICK)
    assert drill.parse_arguments([]).events == list(EVENTS)
    with pytest.raises(SystemExit):
        drill.main(["--events", "redis killed"])
    assert "the events are c5 killed, t2 killed" in capsys.readouterr().err


def test_every_event_has_its_limits() -> None:
    assert len({event.name for event in EVENTS}) == len(EVENTS) == 23
    assert len(QUICK) <= 2
    for event in EVENTS:
        assert event.runs == (10 if event.name == "c5 killed" else 5)
        assert event.outage == (math.inf if event.name.startswith("cold start") else OUTAGE)
        assert event.excused in (frozenset(), AWAY, ANYTHING)
        assert event.planned == (not event.excused)
    assert {event.name for event in EVENTS if not event.excused} == {"planned switch", "rolling change"}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_every_event_ends_its_faults(event: Event, cluster: Cluster) -> None:
    scene = Scene(cluster)
    asyncio.run(event.act(scene, 0))
    assert not any(cluster.is_off(host) for host in ADDRESSES)
    done = cluster.commands
    cuts = [number for number, line in enumerate(done) if "ip neigh replace" in line]
    joins = [number for number, line in enumerate(done) if "ip neigh flush" in line]
    assert bool(cuts) == bool(joins)
    assert all(cut < max(joins) for cut in cuts)
    assert bool(scene.blows) == bool(event.excused)
    assert "redis-cluster status" in done[-1] or "pixel_app.yml" in done[-1]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("c5 killed", ["power c5 off", "power c5 on"]),
        ("m5 power cut", ["power m5 cut", "power m5 on"]),
        ("c5 frozen 3 s", ["power c5 freeze", "power c5 on"]),
        ("two hosts in turn", ["power c5 off", "power c5 on", "power t2 off", "power t2 on"]),
        ("planned switch", ["redis-cluster leave", "redis-cluster rejoin"]),
        (
            "rolling change",
            [
                'inventory/ha --extra-vars {"redis_maxclients": 9000} playbooks/redis.yml',
                "ha playbooks/redis.yml",
            ],
        ),
        ("deploy while degraded", ["power m5 off", "ha --limit !m5", "power m5 on", "ha --extra-vars"]),
        ("m5 replaced", ["power m5 cut", "replace m5", '"pixel_app_release": "former"} playbooks/site.yml']),
        (
            "cold start without c5",
            ["power c5 t2 m5 cut", "power t2 m5 on", "redis-cluster promote", "power c5 on"],
        ),
        ("cold start without m5", ["power c5 t2 m5 cut", "power c5 t2 on", "power m5 on"]),
    ],
)
def test_what_an_event_does(name: str, lines: list[str], cluster: Cluster) -> None:
    (event,) = (event for event in EVENTS if event.name == name)
    asyncio.run(event.act(Scene(cluster), 0))
    remaining = iter(cluster.commands)
    for line in lines:
        assert any(line in command for command in remaining), line


def test_a_stale_host_returns_as_the_masters_host_dies(cluster: Cluster) -> None:
    (event,) = (event for event in EVENTS if event.name == "t2 returns after 13 s as c5 dies")
    asyncio.run(event.act(Scene(cluster), 0))
    [cut] = [number for number, line in enumerate(cluster.commands) if "power c5 cut" in line]
    joined = [line for line in cluster.commands[cut - 2 : cut + 3] if "ip neigh flush" in line]
    assert [line.split(" sudo ")[0].split()[-1] for line in joined] == ["t2", "m5"]


def test_a_cut_is_in_both_directions_and_spares_the_drill(cluster: Cluster) -> None:
    asyncio.run(cluster.cut("t2"))
    cut = {line.split(" sudo ")[0].split()[-1]: line for line in cluster.commands}
    assert {host: [a for a in ADDRESSES.values() if a in line] for host, line in cut.items()} == {
        "c5": [ADDRESSES["t2"]],
        "m5": [ADDRESSES["t2"]],
        "t2": [ADDRESSES["c5"], ADDRESSES["m5"]],
    }
    assert [host for host, line in cut.items() if "--signal=STOP keepalived" in line] == ["t2"]


def test_the_address_is_moved_by_stopping_the_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*command: str, patience: float, text: str = "") -> tuple[int, str]:
        if "systemctl stop keepalived" in text:
            object.__setattr__(cluster, "holder", "m5")
        return await Cluster._run(cluster, *command, patience=patience, text=text)

    object.__setattr__(cluster, "_run", run)
    asyncio.run(cluster.move_address("m5"))
    stopped = [line.split(" sudo ")[0].split()[-1] for line in cluster.commands if "stop keepalived" in line]
    assert stopped == ["c5", "t2"]
    assert sum("start keepalived" in line for line in cluster.commands) == 2
    cluster.commands.clear()
    asyncio.run(cluster.move_address("m5"))
    assert not any("keepalived" in line for line in cluster.commands)


def test_the_replica_with_the_last_events_is_promoted(cluster: Cluster) -> None:
    async def run(*command: str, patience: float, text: str = "") -> tuple[int, str]:
        status, output = await Cluster._run(cluster, *command, patience=patience, text=text)
        if "promote" in text and " t2 " in " ".join(command):
            return 1, "192.0.2.12:6379 has later events: run redis-cluster promote there."
        return status, output

    object.__setattr__(cluster, "_run", run)
    (event,) = (event for event in EVENTS if event.name == "cold start without c5")
    asyncio.run(event.act(Scene(cluster), 0))
    promoted = [line.split(" sudo ")[0].split()[-1] for line in cluster.commands if "promote" in line]
    assert promoted == ["t2", "m5"]


@pytest.mark.parametrize(
    ("found", "away", "lack"),
    [
        (rows(), (), ""),
        (rows(dead="t2"), (), "Redis at 192.0.2.11:6379: timed out"),
        (rows(dead="t2"), ("t2",), ""),
        (rows(master="t2"), (), "the data master is on t2"),
        (rows(master="t2", dead="c5"), ("c5",), ""),
        (rows(dead="c5"), ("c5",), "the data master is on no host"),
        (rows(unready="m5"), (), "the replica on m5 is not ready"),
    ],
)
def test_a_cluster_is_whole_when_all_processes_have_their_roles(
    found: list[dict[str, Any]], away: tuple[str, ...], lack: str
) -> None:
    assert lack_of_cluster(found, away) == lack


def test_what_is_waited_for_in_vain_is_named() -> None:
    def answers(*texts: str) -> Callable[[], Any]:
        remaining = iter(texts)

        async def lack() -> str:
            return next(remaining)

        return lack

    asyncio.run(hosts.until(answers("m5 is away", ""), 5))
    with pytest.raises(FleetError, match="after 0 s: m5 is away"):
        asyncio.run(hosts.until(answers("m5 is away"), 0))
