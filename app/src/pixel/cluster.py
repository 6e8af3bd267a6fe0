"""Where the canvas is: one Redis, or the master of its slot in a Redis Cluster.

Several addresses in ``PIXEL_REDIS_URL`` are nodes of a cluster; the others are found through them.
After a failover, the nodes disagree for a while. Each claim to the slot has a configuration epoch, and
the claim with the highest one is the latest. See docs/adr/0043-redis-cluster.md.
"""

import asyncio
import logging
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from pixel import metrics
from pixel.names import MAINTENANCE, SLOT
from pixel.resp import Command, Connection, NotMasterError, ReplyError, Server
from pixel.settings import Settings

ANSWER = 0.3
"""Seconds that a node has to answer when the master is searched, or its log is checked."""

CHECK = 0.25
"""Seconds after which the replicas of the master are checked again."""

CONFIRM = 2.0
"""Seconds for which an operator's command waits for the replicas."""

SILENT = 2
"""Seconds without an acknowledgement after which a replica that can't be elected is not waited for."""

log = logging.getLogger(__name__)

_C = TypeVar("_C", bound=Connection)


class Node(NamedTuple):
    """A node of a cluster, as described by a node (CLUSTER NODES)."""

    name: str
    host: str
    port: int
    flags: frozenset[str]
    master: str
    """Name of its master; ``-`` if it has none."""
    epoch: int
    has_slots: bool
    is_owner: bool
    """Whether it claims the canvas's slot."""
    address: str
    """IP address and port, also of a node that announces a name."""

    @classmethod
    def parse(cls, line: str) -> "Node":
        """Parse a line of CLUSTER NODES."""
        name, address, flags, master, _, _, epoch, _, *slots = line.split(" ")
        endpoint, *further = address.split(",")
        host, _, port = endpoint.partition("@")[0].rpartition(":")
        ranges = [tuple(map(int, part.split("-"))) for part in slots if not part.startswith("[")]
        return cls(
            name=name,
            # A name, if the node announces one: certificates are issued for names.
            host=further[0] if further and "=" not in further[0] and further[0] else host,
            port=int(port),
            flags=frozenset(flags.split(",")),
            master=master,
            epoch=int(epoch),
            has_slots=bool(ranges),
            is_owner=any(part[0] <= SLOT <= part[-1] for part in ranges),
            address=endpoint.partition("@")[0],
        )


class Master(NamedTuple):
    """The server that holds the canvas, and the configuration epoch of its claim."""

    server: Server
    epoch: int = 0


class Redis:
    """Finds the server that holds the canvas, and connects to it."""

    def __init__(self, settings: Settings) -> None:
        self._seeds = [Server.of(settings, address) for address in settings.redis_url.split(",")]
        self.is_cluster = len(self._seeds) > 1
        self._nodes: list[Server] = []
        self._search: asyncio.Task[Master] | None = None

    async def open(self, kind: type[_C]) -> _C:
        """Connect to the server that holds the canvas.

        Raises OSError if it can't be found or reached, ReplyError if it refuses.
        """
        if not self.is_cluster:
            return await kind.open(self._seeds[0])
        server, epoch = await self.find()
        async with asyncio.timeout(ANSWER):
            connection = await kind.open(server)
        connection.epoch = epoch
        try:
            # A node that has lost the majority, or is a replica by now, refuses this.
            await connection.ask(("GET", MAINTENANCE))
        except BaseException:
            connection.close()
            raise
        return connection

    async def find(self) -> Master:
        """Search the master of the canvas; concurrent searches are one. Raises OSError."""
        if self._search is None:
            self._search = asyncio.create_task(self._find(), name="search of the master")
            self._search.add_done_callback(self._end_search)
        return await asyncio.shield(self._search)

    async def confirm(self, connection: Connection) -> None:
        """Wait until the writes of a connection are on the disks of the replicas.

        For commands of operators; ``commit`` does this for each transaction. Raises OSError.
        """
        if not self.is_cluster:
            return
        replicas = Replicas(self)
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * CONFIRM):
                for _ in range(2):  # a replica that is waited for may go
                    await replicas.check(connection)
                    if replicas.suffice(*await connection.ask(*replicas.wait(CONFIRM / 2))):
                        return
        raise ConnectionError("the change was made, but too few replicas have it on their disks")

    async def nodes(self, server: Server) -> list[Node] | None:
        """The nodes of the cluster, as a server describes them; None if it doesn't answer."""
        try:
            [text] = await self.ask_node(server, ("CLUSTER", "NODES"))
        except (OSError, ReplyError):
            return None
        nodes = [Node.parse(line) for line in text.decode().splitlines()]
        # A node that has not met another one yet doesn't know its own address.
        return [node if node.host else node._replace(host=server.host) for node in nodes]

    def server(self, node: Node) -> Server:
        """The server of a node."""
        return replace(self._seeds[0], host=node.host, port=node.port)

    async def ask_node(self, server: Server, *commands: Command) -> list[Any]:
        """Ask any node, on a connection of its own. Raises OSError or ReplyError."""
        async with asyncio.timeout(ANSWER):
            connection = await Connection.open(server)
            try:
                return await connection.ask(*commands)
            finally:
                connection.close()

    async def _find(self) -> Master:
        servers = {(server.host, server.port): server for server in (*self._seeds, *self._nodes)}
        views = await asyncio.gather(*map(self.nodes, servers.values()))
        claims = [(node.epoch, node, nodes) for nodes in views if nodes for node in nodes if node.is_owner]
        if not claims:
            raise ConnectionError("no node of the cluster names a master of the canvas")
        epoch, owner, nodes = max(claims, key=lambda claim: claim[0])
        self._nodes = [self.server(node) for node in nodes if not node.flags & {"noaddr", "handshake"}]
        return Master(self.server(owner), epoch)

    def _end_search(self, search: asyncio.Task[Master]) -> None:
        self._search = None
        if not search.cancelled():
            search.exception()  # whoever asked has it


class Replicas:
    """Which replicas must acknowledge a write.

    These are all replicas of the master that can be elected, and at least one. A replica can't be elected
    if the majority of the cluster calls it failed (flag ``fail``; ``fail?`` is the opinion of one node),
    or if it doesn't stand for election (``nofailover``), as it has not all data yet. While such a replica
    acknowledges all the same, it must do so too: WAIT counts, and it must not stand in for another one.
    The log of at least one replica must be complete on its disk: after a full resynchronisation, a
    replica acknowledges writes while its log still has to be rewritten.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._electable = 0
        self._needed = 1
        self._counted = -1  # the value of the metric; none yet
        self.has_spare = False
        """Whether a replica that can't be elected has to acknowledge."""
        self.acknowledged = 0
        """How many have acknowledged the last write."""
        self._logged: set[str] = set()  # names of replicas whose logs are complete
        self._resyncs = -1  # full resynchronisations that the master had served by then
        self._checked = -inf
        self._checks: dict[str, asyncio.Task[None]] = {}

    @property
    def are_short(self) -> bool:
        """Whether too few replicas acknowledge, by the last reply to ``wait`` and by their logs."""
        return self.acknowledged < self._needed or not self._logged

    @property
    def may_suffice(self) -> bool:
        """Whether enough may be found to acknowledge by another check: a spare one has gone, or logs are
        complete.
        """
        return self.has_spare or (self.acknowledged >= self._needed and not self._logged)

    @property
    def is_due(self) -> bool:
        """Whether the replicas have to be checked before the next write."""
        return self.are_short or monotonic() - self._checked > CHECK

    def wait(self, seconds: float) -> list[Command]:
        """The commands that wait for the replicas."""
        wait: Command = ("WAIT", self._needed, max(int(seconds * 1000), 1))
        # If all depends on one replica, it must not have been resynchronised meanwhile. WAIT is the last
        # command, as a master that becomes a replica closes the connection after WAIT's reply.
        return [("INFO", "stats"), wait] if len(self._logged) == 1 else [wait]

    def suffice(self, *replies: Any) -> bool:
        """Whether enough replicas have acknowledged, by the replies to ``wait``."""
        *stats, acknowledged = replies
        for text in stats:
            self._count_resyncs(text)
        self.acknowledged = acknowledged if isinstance(acknowledged, int) else 0
        # A replica that doesn't stand for election acknowledges too.
        counted = min(self.acknowledged, self._electable)
        if counted != self._counted:
            self._counted = counted
            metrics.REPLICAS.set(counted)
        return not self.are_short

    async def check(self, connection: Connection) -> None:
        """Ask the master for its replicas, and new replicas whether their logs are complete.

        Raises OSError, or ReplyError if the connection is not to the master.
        """
        text, stats, links = await connection.ask(
            ("CLUSTER", "NODES"), ("INFO", "stats"), ("INFO", "replication")
        )
        nodes = [Node.parse(line) for line in text.decode().splitlines()]
        if not any(node.is_owner and "myself" in node.flags for node in nodes):
            raise NotMasterError("the canvas has another master")
        masters = {node.name for node in nodes if node.has_slots and not node.is_owner}
        # Just after a failover, a replica may still be one of the former master.
        all_replicas = [node for node in nodes if "slave" in node.flags and node.master not in masters]
        replicas = {node.name: node for node in all_replicas if not node.flags & {"fail", "noaddr"}}
        electable = {node.address for node in replicas.values() if "nofailover" not in node.flags}
        spare = _spare(_linked(links), electable, {node.address for node in all_replicas})
        self.has_spare = spare > 0
        self._electable = len(electable)
        self._needed = max(len(electable) + spare, 1)
        self._count_resyncs(stats)
        self._logged &= replicas.keys()
        self._checked = monotonic()
        for name in replicas.keys() - self._logged - self._checks.keys():
            self._checks[name] = asyncio.create_task(self._check_log(replicas[name], self._resyncs))
        while not self._logged and self._checks:
            await asyncio.wait(self._checks.values(), return_when=asyncio.FIRST_COMPLETED)

    def _count_resyncs(self, stats: bytes) -> None:
        """After a full resynchronisation of a replica, the logs of all have to be checked again."""
        resyncs = int(_fields(stats)["sync_full"])
        if resyncs != self._resyncs:
            self._resyncs = resyncs
            self._logged.clear()

    async def _check_log(self, node: Node, resyncs: int) -> None:
        try:
            replies = await self._redis.ask_node(
                self._redis.server(node), ("INFO", "replication"), ("INFO", "persistence")
            )
            info = _fields(*replies)
            if resyncs == self._resyncs and all(info.get(key) == value for key, value in _COMPLETE.items()):
                self._logged.add(node.name)
        except (OSError, ReplyError) as error:
            log.debug("replica %s can't be asked: %s", node.name, error)
        finally:
            del self._checks[node.name]


_COMPLETE = {
    "master_link_status": "up",
    "loading": "0",
    "aof_enabled": "1",
    "aof_rewrite_in_progress": "0",
    "aof_rewrite_scheduled": "0",
    "aof_last_write_status": "ok",
}
"""Fields of INFO of a replica whose log is complete on its disk."""


def _linked(replication: bytes) -> list[str]:
    """The addresses of the replicas that acknowledge writes now, by the master's INFO.

    A replica that has copied all data and loads it is called online, but has acknowledged nothing yet.
    """
    replicas = [
        dict(part.split("=", 1) for part in value.split(","))
        for name, value in _fields(replication).items()
        if name.removeprefix("slave").isdigit()
    ]
    return [
        f"{replica['ip']}:{replica['port']}"
        for replica in replicas
        if replica["state"] == "online" and replica["offset"] != "0" and int(replica["lag"]) < SILENT
    ]


def _spare(linked: Sequence[str], electable: Set[str], known: Set[str]) -> int:
    """How many of the linked replicas can't be elected.

    A master may know a replica by another address than the cluster does, behind NAT for example. Such
    ones are taken for those that can be elected, as far as these are not found.
    """
    others = sum(address not in electable for address in linked)
    unknown = sum(address not in known for address in linked)
    return others - min(unknown, len(electable - set(linked)))


def _fields(*replies: bytes) -> dict[str, str]:
    """The fields in replies to INFO."""
    lines = b"\r\n".join(replies).decode().split("\r\n")
    return dict(line.split(":", 1) for line in lines if ":" in line)
