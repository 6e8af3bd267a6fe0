"""A Redis Cluster of five processes on loopback, and writers that find lost and undone writes."""

import asyncio
import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
import yaml
from conftest import APP_USER, PASSWORD, REDIS_ROLE, RedisProcess, free_ports, wait_until

from pixel.canvas import locate
from pixel.names import SLOT
from pixel.pixel import Change
from pixel.problems import Problem
from pixel.settings import Settings
from pixel.store import Store

CLUSTER_COMMANDS: list[str] = yaml.safe_load(REDIS_ROLE.read_text())["_redis_app_cluster_commands"]

MASTER, REPLICAS, VOTERS = 0, (1, 2), (3, 4)
"""Places of the nodes: the data master, its replicas, and the masters that only vote."""

NODE_TIMEOUT = 1000


class ClusterNode(RedisProcess):
    """A node, which a test can pause, kill and restart."""

    def __init__(self, number: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="px-"))
        self.port, self.bus_port = free_ports(2)
        self.name = f"{number:x}" * 40

    def start(self, *options: str) -> None:
        arguments = f"""
            --port {self.port} --cluster-port {self.bus_port} --bind 127.0.0.1 --dir {self.directory}
            --save "" --appendonly yes --appendfsync always
            --cluster-enabled yes --cluster-node-timeout {NODE_TIMEOUT} --cluster-allow-replica-migration no
            --cluster-require-full-coverage no --cluster-allow-reads-when-down no
            --repl-timeout 3 --repl-diskless-sync-delay 0 --masteruser replica --masterauth {PASSWORD}
            --user default off resetpass ~* &* +@all
            --user admin on nopass ~* &* +@all
            --user replica on >{PASSWORD} resetchannels -@all +psync +replconf +ping
            --user pixel on >{PASSWORD} {APP_USER} +{" +".join(CLUSTER_COMMANDS)}
        """
        log = (self.directory / "log").open("ab")
        self.process = subprocess.Popen(["redis-server", *shlex.split(arguments), *options], stdout=log)
        log.close()
        wait_until(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.ask("PING"))
        return False

    def flags(self, other: "ClusterNode") -> list[str]:
        """The flags of a node, as this one knows them."""
        lines = [line.split() for line in self.ask("CLUSTER", "NODES").decode().splitlines()]
        return next(line[2].split(",") for line in lines if line[0] == other.name)

    def ask(self, *command: Any) -> Any:
        """The reply to a command, with all permissions; raises redis.RedisError."""
        with redis.Redis(
            port=self.port, username="admin", password="", protocol=2, socket_timeout=5
        ) as admin:
            return admin.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        info: dict[str, Any] = self.ask("INFO", section)
        return info


class RedisCluster:
    """A data master, two replicas and two masters that only vote, with a spare slot each."""

    def __init__(self) -> None:
        self.nodes = [ClusterNode(number + 1) for number in range(5)]
        slots = {MASTER: "2-16383", VOTERS[0]: "0", VOTERS[1]: "1"}
        lines = []
        for place, node in enumerate(self.nodes):
            master = self.nodes[MASTER].name if place in REPLICAS else "-"
            kind, epoch = ("slave", 1) if place in REPLICAS else ("master", place + 1)
            lines.append(
                f"{node.name} 127.0.0.1:{node.port}@{node.bus_port} {kind} {master} 0 0 {epoch}"
                f" connected {slots.get(place, '')}".rstrip()
            )
        for node, line in zip(self.nodes, lines, strict=True):
            own = line.replace(" slave ", " myself,slave ").replace(" master ", " myself,master ")
            others = [other for other in lines if other != line]
            content = [own, *others, "vars currentEpoch 5 lastVoteEpoch 0", ""]
            (node.directory / "nodes.conf").write_text("\n".join(content))
        try:
            for node in self.nodes:
                node.start()
            wait_until(self.is_complete, 20)
        except BaseException:
            self.remove()
            raise

    @property
    def url(self) -> str:
        return ",".join(f"redis://127.0.0.1:{node.port}" for node in self.nodes[:3])

    def settings(self, **others: object) -> Settings:
        """Settings of a service that uses this cluster."""
        return Settings(redis_url=self.url, redis_username="pixel", redis_password=PASSWORD, **others)

    def master(self) -> ClusterNode:
        """The master of the canvas, as a voter knows it."""
        slots = next(node for node in self.nodes[3:] if node.process.poll() is None).ask("CLUSTER", "SLOTS")
        port = next(master[1] for first, last, master, *_ in slots if first <= SLOT <= last)
        return next(node for node in self.nodes if node.port == port)

    def is_complete(self) -> bool:
        """Whether the canvas has a master with two replicas in sync, and all nodes know it."""
        with contextlib.suppress(redis.RedisError, StopIteration):
            master = self.master()
            info = master.info("replication")
            views = [node.ask("CLUSTER", "INFO") for node in self.nodes]
            return (
                info["role"] == "master"
                and sum(info.get(f"slave{n}", {}).get("state") == "online" for n in range(2)) == 2
                and all(b"cluster_state:ok" in view for view in views)
                and not any(re.search(rb"\bfail\b", node.ask("CLUSTER", "NODES")) for node in self.nodes)
            )
        return False

    def remove(self) -> None:
        for node in self.nodes:
            if hasattr(node, "process"):
                node.resume()
                node.kill()
            shutil.rmtree(node.directory)


class Ledger:
    """Sequential writers with rising values in a pixel each, and a cell for each write."""

    WRITERS = 8

    def __init__(self, *stores: Store) -> None:
        self._stores = stores
        self._cells: dict[int, bool] = {}  # whether the write of this cell was acknowledged
        self._acknowledged = [0] * self.WRITERS
        self._sent = [0] * self.WRITERS
        self._tasks = [asyncio.create_task(self._write(number)) for number in range(self.WRITERS)]
        self._stopping = False
        self.failures: list[str] = []
        self.successes: list[float] = []
        """Times at which writes were acknowledged."""
        self.longest = 0.0
        """Longest time until a write was answered, in seconds."""

    async def _write(self, writer: int) -> None:
        while not self._stopping:
            self._sent[writer] += 1
            value = self._sent[writer]
            cell = len(self._cells)
            self._cells[cell] = False
            changes = [Change(writer, 0, channel, value >> 8 * channel & 255) for channel in range(3)]
            changes.append(Change(cell % 1000, 1 + cell // 1000, 0, 255))
            started = time.monotonic()
            try:
                await self._stores[writer % len(self._stores)].write(changes)
            except Problem as problem:
                self.failures.append(str(problem))
                await asyncio.sleep(0.02)
            else:
                self._acknowledged[writer] = value
                self._cells[cell] = True
                self.successes.append(time.monotonic())
            self.longest = max(self.longest, time.monotonic() - started)
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Let the writers finish."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def outage(self) -> float:
        """The longest time without an acknowledged write, in seconds."""
        return max(later - before for before, later in zip(self.successes, self.successes[1:], strict=False))

    def check(self, master: ClusterNode) -> None:
        """Check that the canvas has every acknowledged write, and that none was undone."""
        tiles: dict[str, bytes] = {}

        def stored(change: Change) -> int:
            key, place = locate(change.x, change.y)
            if key not in tiles:
                tiles[key] = master.ask("GET", key)
            return tiles[key][place + change.channel]

        for writer, acknowledged in enumerate(self._acknowledged):
            value = sum(stored(Change(writer, 0, channel, 0)) << 8 * channel for channel in range(3))
            assert acknowledged <= value <= self._sent[writer]
        cells = [cell for cell, acknowledged in self._cells.items() if acknowledged]
        lost = [cell for cell in cells if stored(Change(cell % 1000, 1 + cell // 1000, 0, 0)) != 255]
        assert lost == []
        assert len(cells) > 50
