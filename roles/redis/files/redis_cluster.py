#!/usr/bin/python3
"""Form, watch and change the Redis Cluster of three hosts. Standard library only.

    redis-cluster form               make the configured processes one cluster, and fill an empty machine
    redis-cluster status             print the processes with their roles, as JSON
    redis-cluster restart UNIT...    restart units of this host without a failed write
    redis-cluster leave              prepare this host for a stop without a failed write
    redis-cluster rejoin             undo that, and wait until this host's replica is ready
    redis-cluster promote            make this host's replica the master after the master is lost
    redis-cluster check-ready        fail if this host doesn't have all data, as after a start
    redis-cluster agent              the service: return the master role to the preferred host
    redis-cluster check-log DIR      fail if the cluster's data should be in DIR and is not

One *data* process on each host holds the canvas: a master and two replicas of it. Each host but the
preferred one has a second process, a *voter*: a master of one spare slot without keys. The three masters
elect a replica when the data master's host is lost.

A replica is *ready* when it has all data and its own log is on disk. Redis starts with
`cluster-replica-no-failover yes`, which the agent sets to `no` when the replica is ready. Until then the
replica has the flag `nofailover`: it is not elected, and the app waits for it only while it acknowledges, so
that a replica that starts delays no write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

CONFIG = "/etc/redis-cluster.json"
AGENT = "redis-cluster.service"
SLOTS = 16384
# The slot of all keys of the app, which contain {0}.
DATA_SLOT = 13907
# Slots of the voters, in their order. All others belong to the data master.
SPARE_SLOTS = (16382, 16383)

CALL_TIMEOUT = 2.0
INTERVAL = 0.5
# Seconds that the preferred host must have been ready before it takes the master role back.
STABLE = 5.0
# Seconds until the app has noticed a flag that its master knows.
SETTLE = 2.0
FORM_TIMEOUT = 60.0
SWITCH_TIMEOUT = 10.0
SYNC_TIMEOUT = 300.0
LEAVE_TIMEOUT = 5.0
# A host that boots is ready within this time, unless it copies all data.
READY_TIMEOUT = 60.0
# systemd starts Redis again at once.
CHECK_PAUSE = 5.0


class Problem(Exception):
    """Something that an operator has to fix; the message says how."""


class ReplyError(Exception):
    """An error reply of Redis."""


@dataclass(frozen=True)
class Member:
    """A process as a member of the cluster sees it: one line of CLUSTER NODES."""

    id: str
    address: str
    flags: frozenset[str]
    master: str
    epoch: int
    is_connected: bool
    slots: tuple[tuple[int, int], ...]

    def owns(self, slot: int) -> bool:
        return any(first <= slot <= last for first, last in self.slots)

    @property
    def has_failed(self) -> bool:
        return bool(self.flags & {"fail", "fail?", "noaddr"})


def parse_members(text: str) -> dict[str, Member]:
    """Parse the answer to CLUSTER NODES, or the file nodes.conf; returns the members by their IDs."""
    members = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 8 or words[0] == "vars":
            continue
        # A slot that is being moved has the form [slot->-id].
        spans = [word.split("-") for word in words[8:] if not word.startswith("[")]
        members[words[0]] = Member(
            id=words[0],
            address=words[1].partition("@")[0],
            flags=frozenset(words[2].split(",")),
            master="" if words[3] == "-" else words[3],
            epoch=int(words[6]),
            is_connected=words[7] == "connected",
            slots=tuple((int(span[0]), int(span[-1])) for span in spans),
        )
    return members


class Process:
    """A connection to one Redis process, with TLS if `ca` has the certificates of its authorities (PEM)."""

    def __init__(
        self, address: str, user: str, password: str, ca: str = "", timeout: float = CALL_TIMEOUT
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._login = (user, password)
        self._tls = ssl.create_default_context(cadata=ca) if ca else None
        self._socket: socket.socket | None = None
        self._buffer = b""

    def call(self, *words: str | int) -> Any:
        """Send a command and return its reply.

        Raises OSError if the process doesn't answer, ReplyError if it refuses the command.
        """
        try:
            if self._socket is None:
                self._connect()
            return self._exchange(*words)
        except OSError:
            self.close()
            raise

    def _connect(self) -> None:
        host, _, port = self.address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), self._timeout)
        if self._tls:
            self._socket = self._tls.wrap_socket(self._socket, server_hostname=host)
        self._buffer = b""
        if self._login[1]:
            try:
                self._exchange("AUTH", *self._login)
            except ReplyError:
                self.close()
                raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(self, *words: str | int) -> Any:
        assert self._socket is not None
        parts = [str(word).encode() for word in words]
        command = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(command)
        return self._reply()

    def _reply(self) -> Any:
        line = self._line()
        kind, text = line[:1], line[1:].decode()
        if kind == b"-":
            raise ReplyError(text)
        if kind == b":":
            return int(text)
        if kind == b"$":
            return None if text == "-1" else self._bytes(int(text) + 2)[:-2].decode(errors="replace")
        if kind == b"*":
            return [self._reply() for _ in range(int(text))]
        return text

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._receive()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _bytes(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._receive()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _receive(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("the connection was closed")
        self._buffer += data

    def members(self) -> dict[str, Member]:
        return parse_members(self.call("CLUSTER", "NODES"))

    def myself(self) -> Member:
        return _myself(self.members())

    def cluster_state(self) -> str:
        return _fields(self.call("CLUSTER", "INFO"))["cluster_state"]

    def info(self) -> dict[str, str]:
        """Return the sections of INFO about replication and the log."""
        return _fields(self.call("INFO", "replication", "persistence"))


def _fields(text: str) -> dict[str, str]:
    """Parse lines of the form `name:value`."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def is_synced(info: dict[str, str]) -> bool:
    """Tell whether a replica has all data that its master had sent, and its log is on disk."""
    wanted = {
        "role": "slave",
        "loading": "0",
        "master_link_status": "up",
        "master_sync_in_progress": "0",
        "aof_enabled": "1",
        "aof_rewrite_in_progress": "0",
        "aof_rewrite_scheduled": "0",
        "aof_last_bgrewrite_status": "ok",
        "aof_last_write_status": "ok",
    }
    return all(info.get(name) == value for name, value in wanted.items())


@dataclass
class Cluster:
    """The configured processes. The first data process is the preferred master."""

    data: list[str]
    voters: list[str]
    local: str = ""
    user: str = ""
    password: str = ""
    ca: str = ""
    events: str = "pixel:{0}:events"
    done: list[str] = field(default_factory=list)

    @cached_property
    def processes(self) -> dict[str, Process]:
        """All configured processes by address."""
        addresses = [*self.data, *self.voters]
        return {address: Process(address, self.user, self.password, self.ca) for address in addresses}

    @property
    def mine(self) -> Process:
        """This host's data process."""
        return self.processes[self.local]

    def answering(self) -> dict[str, dict[str, Member]]:
        """Return the members that each process sees; processes that don't answer are left out."""
        views = {}
        for address, process in self.processes.items():
            with contextlib.suppress(OSError):
                try:
                    views[address] = process.members()
                except ReplyError as error:
                    raise Problem(f"Redis at {address} refuses CLUSTER NODES: {error}") from error
        return views

    def master(self) -> str:
        """Return the address of the data master; raise Problem if there is none that answers."""
        for address in self.data:
            with contextlib.suppress(OSError, ReplyError):
                if (me := self.processes[address].myself()).owns(DATA_SLOT) and "master" in me.flags:
                    return address
        raise Problem(
            "No data master answers. If its host will not come back soon, run redis-cluster promote on"
            " another one."
        )

    def note(self, message: str) -> None:
        self.done.append(message)


def load(path: str) -> Cluster:
    return Cluster(**json.loads(Path(path).read_text()))


def wait(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Wait until a condition holds; raise Problem with the failure after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ReplyError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise Problem(failure)
        time.sleep(0.1)


def ranges(slots: Iterator[int]) -> list[tuple[int, int]]:
    """Join successive slots into pairs of first and last."""
    joined: list[tuple[int, int]] = []
    for slot in slots:
        if joined and joined[-1][1] == slot - 1:
            joined[-1] = (joined[-1][0], slot)
        else:
            joined.append((slot, slot))
    return joined


# Forming


def form(cluster: Cluster) -> None:
    """Make the processes that answer one cluster. Every step is taken only if it is needed."""
    views = cluster.answering()
    ids = {address: _myself(view).id for address, view in views.items()}
    owner = _owner(cluster, views)
    if owner is None:
        # A process that doesn't answer may belong to a cluster with data.
        for address in cluster.processes:
            if address not in views:
                raise Problem(
                    f"Redis at {address} doesn't answer; a new cluster begins with all processes. Start it."
                )
        owner = cluster.data[0]
        _check_empty(cluster, [address for address in views if address != owner])
    _give_slots(cluster, owner)
    _forget(cluster, owner, views, ids)
    _meet(cluster, owner, views, ids)
    for voter, slot in zip(cluster.voters, SPARE_SLOTS, strict=False):
        if voter in ids:
            _give_spare_slot(cluster, voter, slot)
    for address in cluster.data:
        if address in ids and address != owner:
            _replicate(cluster, address, ids[owner])
    wait(
        lambda: _is_complete(cluster, ids),
        SYNC_TIMEOUT,
        f"The cluster is not complete after {SYNC_TIMEOUT:.0f} s: see redis-cluster status, and whether the"
        " hosts reach each other's Redis ports and those 10000 above.",
    )


def _myself(view: dict[str, Member]) -> Member:
    return next(member for member in view.values() if "myself" in member.flags)


def _owner(cluster: Cluster, views: dict[str, dict[str, Member]]) -> str | None:
    """Return the address of the process that owns the data; None if there is no data yet."""
    claims: dict[str, Member] = {}
    for view in views.values():
        for member in view.values():
            if member.owns(DATA_SLOT) and member.epoch >= claims.get(member.id, member).epoch:
                claims[member.id] = member
    if not claims:
        return None
    best = max(claims.values(), key=lambda member: member.epoch)
    found = [address for address, view in views.items() if _myself(view).id == best.id]
    if not found:
        raise Problem(
            f"The data belongs to {best.address}, which doesn't answer. Start Redis there; if that host is"
            " lost, run redis-cluster promote on another one first."
        )
    for other in claims.values():
        # A member that hasn't yet seen an election is known to the owner; another Redis with data is not.
        if other.id not in views[found[0]]:
            raise Problem(
                f"{other.address} and {best.address} both have data of their own. Empty the one that is not"
                " wanted."
            )
    return found[0]


def _give_slots(cluster: Cluster, owner: str) -> None:
    """Give a process all slots that nobody has, but for those of the voters."""
    process = cluster.processes[owner]
    for slot in SPARE_SLOTS:
        if process.myself().owns(slot):
            raise Problem(f"Redis at {owner} has keys in slot {slot}, which is a voter's. Remove them.")
    taken = process.members().values()
    free = ranges(
        slot for slot in range(SLOTS) if slot not in SPARE_SLOTS and not any(m.owns(slot) for m in taken)
    )
    if free:
        process.call("CLUSTER", "ADDSLOTSRANGE", *[slot for span in free for slot in span])
        cluster.note(f"{owner} is the data master")


def _check_empty(cluster: Cluster, addresses: list[str]) -> None:
    for address in addresses:
        keys = cluster.processes[address].call("DBSIZE")
        if keys:
            raise Problem(
                f"Redis at {address} has {keys} keys of its own. If they are not wanted: stop Redis there,"
                " remove appendonlydir and nodes.conf in /var/lib/redis, and start it."
            )


def _forget(cluster: Cluster, owner: str, views: dict[str, dict[str, Member]], ids: dict[str, str]) -> None:
    """Remove dead members in whose place another process answers, or which are no longer configured."""
    known = {member.id: member for view in views.values() for member in view.values()}
    for stale in known.values():
        is_away = stale.address in cluster.processes and stale.address not in ids
        if stale.id in ids.values() or is_away or "handshake" in stale.flags:
            continue
        if stale.address not in ids:
            # It may have been stopped a moment ago.
            wait(
                partial(_has_left, cluster.processes[owner], stale.id),
                LEAVE_TIMEOUT,
                f"{stale.address} is a running member of the cluster, and is not configured. Stop it.",
            )
        for address, view in views.items():
            if stale.id in view:
                with contextlib.suppress(ReplyError):  # It may have been removed in the meantime.
                    cluster.processes[address].call("CLUSTER", "FORGET", stale.id)
        cluster.note(f"{stale.address} ({stale.id[:8]}) is removed")


def _has_left(process: Process, member_id: str) -> bool:
    member = process.members().get(member_id)
    return member is None or member.has_failed


def _meet(cluster: Cluster, owner: str, views: dict[str, dict[str, Member]], ids: dict[str, str]) -> None:
    """Introduce new processes to the data master."""
    new = [address for address, member in ids.items() if member not in views[owner]]
    for address in new:
        if len(views[address]) > 1 and ids[owner] not in views[address]:
            raise Problem(
                f"Redis at {address} belongs to another cluster. Stop it, remove nodes.conf and appendonlydir"
                " in its directory, and start it."
            )
    _check_empty(cluster, new)
    for address in new:
        host, _, port = address.rpartition(":")
        cluster.processes[owner].call("CLUSTER", "MEET", host, port, int(port) + 10000)
        cluster.note(f"{address} joins")
    wait(
        lambda: all(
            set(ids.values()) <= {member.id for member in process.members().values() if member.is_connected}
            for address, process in cluster.processes.items()
            if address in ids
        ),
        FORM_TIMEOUT,
        "The processes don't find each other: do the hosts reach each other's cluster bus, the Redis ports"
        " plus 10000?",
    )


def _give_spare_slot(cluster: Cluster, voter: str, slot: int) -> None:
    process = cluster.processes[voter]
    owner = next((member for member in process.members().values() if member.owns(slot)), None)
    if owner is None:
        process.call("CLUSTER", "ADDSLOTS", slot)
        cluster.note(f"{voter} votes")
    elif "myself" not in owner.flags:
        raise Problem(f"Slot {slot} of the voter {voter} belongs to {owner.address}.")


def _replicate(cluster: Cluster, address: str, master: str) -> None:
    process = cluster.processes[address]
    if process.myself().master != master:
        process.call("CLUSTER", "REPLICATE", master)
        cluster.note(f"{address} is a replica")


def _is_complete(cluster: Cluster, ids: dict[str, str]) -> bool:
    """Tell whether all processes that answer see each other, and the replicas have the data."""
    for address in ids:
        process = cluster.processes[address]
        members = process.members()
        present = {member.id for member in members.values() if member.is_connected and not member.has_failed}
        if not set(ids.values()) <= present or process.cluster_state() != "ok":
            return False
        if address in cluster.data and process.info()["role"] == "slave" and not is_synced(process.info()):
            return False
    return True


# Planned changes


def status(cluster: Cluster) -> list[dict[str, Any]]:
    """Describe every configured process."""
    rows: list[dict[str, Any]] = []
    for address, process in cluster.processes.items():
        row: dict[str, Any] = {"address": address, "kind": "data" if address in cluster.data else "voter"}
        try:
            me, info = process.myself(), process.info()
            row |= {
                "id": me.id,
                "role": "master" if "master" in me.flags else "replica",
                "state": process.cluster_state(),
                "owns_data": me.owns(DATA_SLOT),
            }
            if info["role"] == "slave":
                row |= {"is_ready": is_synced(info) and "nofailover" not in me.flags}
        except (OSError, ReplyError) as error:
            row |= {"role": "unknown", "error": str(error)}
        rows.append(row)
    return rows


def check_ready(cluster: Cluster) -> None:
    """Raise Problem unless this host has all data, as the working master or as a ready replica."""

    def has_all_data() -> bool:
        row = next(row for row in status(cluster) if row["address"] == cluster.local)
        if row["role"] == "unknown" or row["state"] != "ok":
            return False
        return bool(row["owns_data"] or row.get("is_ready"))

    wait(
        has_all_data,
        READY_TIMEOUT,
        f"Redis at {cluster.local} is neither the working master nor a ready replica, so it may lack data:"
        " see redis-cluster status.",
    )


def _check_others(cluster: Cluster) -> None:
    """Raise Problem unless the cluster works without this host."""
    host = cluster.local.rpartition(":")[0]
    for row in status(cluster):
        if row["address"].rpartition(":")[0] == host:
            continue
        if row["role"] == "unknown" or row["state"] != "ok":
            raise Problem(f"Redis at {row['address']} does not work; nothing was changed. Repair it first.")
        if not row.get("is_ready", True):
            raise Problem(
                f"The replica at {row['address']} is not ready yet; nothing was changed. Wait for it."
            )


def switch(cluster: Cluster, target: str) -> None:
    """Make a replica the master. Writes wait meanwhile, up to 0.2 s; none is lost."""
    cluster.processes[target].call("CLUSTER", "FAILOVER")
    wait(
        lambda: cluster.master() == target,
        SWITCH_TIMEOUT,
        f"{target} did not become the master within {SWITCH_TIMEOUT:.0f} s; the former master still serves.",
    )
    cluster.note(f"{target} is the master")


def leave(cluster: Cluster) -> None:
    """Prepare this host for a stop: it has no master, and the app doesn't wait for its replica.

    The agent is stopped, because it would undo that. It starts when the host boots, or with `rejoin`.
    """
    _check_others(cluster)
    _systemctl("stop", AGENT)
    if cluster.master() == cluster.local:
        other = next(address for address in cluster.data if address != cluster.local)
        switch(cluster, other)
    me = cluster.mine.myself().id
    cluster.mine.call("CONFIG", "SET", "cluster-replica-no-failover", "yes")
    wait(
        lambda: "nofailover" in cluster.processes[cluster.master()].members()[me].flags,
        SWITCH_TIMEOUT,
        "The master does not learn that this replica leaves.",
    )
    time.sleep(SETTLE)


def restart(cluster: Cluster, units: list[str]) -> None:
    """Restart units of this host, one host at a time, and wait until its replica is ready again."""
    data_unit = "redis-server.service"
    if not _is_member(cluster):
        _systemctl("restart", *units)
    else:
        try:
            if data_unit in units:
                leave(cluster)
            _systemctl("restart", *units)
        finally:
            _systemctl("start", AGENT)
        rejoin(cluster)
    cluster.note(f"restarted {', '.join(units)}")


def rejoin(cluster: Cluster) -> None:
    """Wait until this host's processes work, and its data process is the master or a ready replica."""
    _systemctl("start", AGENT)
    host = cluster.local.rpartition(":")[0]
    here = [process for address, process in cluster.processes.items() if address.startswith(f"{host}:")]

    def is_ready() -> bool:
        # A master that was restarted works after two seconds.
        if any(process.cluster_state() != "ok" for process in here):
            return False
        me = cluster.mine.myself()
        if me.owns(DATA_SLOT):
            return True
        seen = cluster.processes[cluster.master()].members()[me.id]
        return is_synced(cluster.mine.info()) and "nofailover" not in me.flags | seen.flags

    wait(is_ready, SYNC_TIMEOUT, f"The replica at {cluster.local} is not ready: journalctl -u redis-server")


def _is_member(cluster: Cluster) -> bool:
    """Tell whether this host's data process is in a cluster with others."""
    with contextlib.suppress(OSError, ReplyError):
        return len(cluster.mine.members()) > 1
    return False


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["/usr/bin/systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Problem(f"systemctl {' '.join(arguments)}: {done.stderr.strip()}")


def promote(cluster: Cluster) -> None:
    """Make this host's replica the master without the former one, whose later writes are lost."""
    me = cluster.mine.myself()
    if "master" in me.flags:
        raise Problem(f"{cluster.local} is a master already.")
    for row in status(cluster):
        if row["role"] == "master" and row["owns_data"]:
            raise Problem(f"{row['address']} is the master and answers; nothing was changed.")
    mine = _last_event(cluster, cluster.local)
    for address in cluster.data:
        if address == cluster.local:
            continue
        with contextlib.suppress(OSError):
            if _last_event(cluster, address) > mine:
                raise Problem(f"{address} has later events: run redis-cluster promote there.")
    # Both voters elect the replica. Without one of them it takes the role without an election.
    has_quorum = set(cluster.voters) <= set(cluster.answering())
    way = "FORCE" if has_quorum else "TAKEOVER"
    cluster.mine.call("CLUSTER", "FAILOVER", way)
    wait(
        lambda: cluster.mine.myself().owns(DATA_SLOT),
        SWITCH_TIMEOUT,
        f"CLUSTER FAILOVER {way} had no effect: journalctl -u redis-server",
    )
    cluster.note(f"{cluster.local} is the master ({way})")


def _last_event(cluster: Cluster, address: str) -> tuple[int, ...]:
    """Return the ID of the last event that a data process has."""
    process = cluster.processes[address]
    process.call("READONLY")
    try:
        fields = process.call("XINFO", "STREAM", cluster.events)
    except ReplyError:  # No event yet, or reads are refused because most of the cluster is away.
        return ()
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    return tuple(map(int, values["last-generated-id"].split("-")))


# The service


class Agent:
    """Clears the flag nofailover of this host's replica, and takes the master role to the preferred host."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ready_since: float | None = None

    def step(self) -> str | None:
        """Take one look, and one action at most; returns what was done."""
        mine = self._cluster.mine
        info, me = mine.info(), mine.myself()
        is_out = "nofailover" in me.flags
        if not me.master or info["master_sync_in_progress"] == "1":
            self._ready_since = None
            # A master that is deposed, or a replica without all data, must become ready first.
            return None if is_out else self._set_out("yes")
        if not is_synced(info):
            self._ready_since = None
            return None
        if not self._has_caught_up(me.master):
            return None
        if is_out:
            return self._set_out("no")
        now = time.monotonic()
        self._ready_since = self._ready_since or now
        if self._cluster.local == self._cluster.data[0] and now - self._ready_since >= STABLE:
            self._ready_since = None
            switch(self._cluster, self._cluster.local)
            return f"{self._cluster.local} has the master role again"
        return None

    def _has_caught_up(self, master: str) -> bool:
        """Tell whether the replica has what its master had a moment ago."""
        source = self._cluster.mine.members()[master].address
        offset = int(self._cluster.processes[source].info()["master_repl_offset"])
        deadline = time.monotonic() + INTERVAL
        while int(self._cluster.mine.info().get("slave_repl_offset", -1)) < offset:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _set_out(self, value: str) -> str:
        self._cluster.mine.call("CONFIG", "SET", "cluster-replica-no-failover", value)
        return f"cluster-replica-no-failover {value}"


def run_agent(cluster: Cluster) -> None:
    agent = Agent(cluster)
    fault = ""
    while True:
        try:
            if done := agent.step():
                print(done, flush=True)
            fault = ""
        except (OSError, ReplyError, Problem, KeyError) as error:
            # The same fault may last; log it once.
            if str(error) != fault:
                print(f"{type(error).__name__}: {error}", flush=True)
            fault = str(error)
        time.sleep(INTERVAL)


def check_log(folder: Path) -> None:
    """Raise Problem if nodes.conf names other processes, so that there must be a log, and there is none.

    A data master that starts without its log would be empty, and its replicas would delete their data.
    """
    nodes = folder / "nodes.conf"
    if not nodes.exists() or len(parse_members(nodes.read_text())) < 2:
        return
    if not any((folder / "appendonlydir").glob("*.manifest")):
        raise Problem(
            f"Redis does not start: {nodes} says that it belongs to a cluster, but there is no log in"
            f" {folder}/appendonlydir, so it would delete the data of the others. Put the log back, or, to"
            f" copy the data from the others, remove {nodes} and run playbooks/redis.yml."
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # systemd passes the service its configuration as a credential.
    passed = os.environ.get("CREDENTIALS_DIRECTORY")
    default = f"{passed}/redis-cluster.json" if passed else CONFIG
    parser.add_argument("--config", default=default)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("form", "status", "leave", "rejoin", "promote", "check-ready", "agent"):
        commands.add_parser(name)
    commands.add_parser("restart").add_argument("units", nargs="+", metavar="UNIT")
    commands.add_parser("check-log").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "check-log":
            check_log(arguments.folder)
            return 0
        cluster = load(arguments.config)
        if arguments.command == "status":
            print(json.dumps(status(cluster), indent=1))
            return 0
        actions: dict[str, Callable[[], None]] = {
            "form": lambda: form(cluster),
            "restart": lambda: restart(cluster, arguments.units),
            "leave": lambda: leave(cluster),
            "rejoin": lambda: rejoin(cluster),
            "promote": lambda: promote(cluster),
            "check-ready": lambda: check_ready(cluster),
            "agent": lambda: run_agent(cluster),
        }
        actions[arguments.command]()
        print(json.dumps({"done": cluster.done}))
    except (Problem, ReplyError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        if arguments.command == "check-log":
            time.sleep(CHECK_PAUSE)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
