"""redis_cluster forms a cluster, replaces machines, returns the master role, and restarts hosts.

Real servers on loopback: host 1 is 127.0.0.1, and so on, with the ports of one base that is free.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis_cluster
import yaml
from redis_cluster import DATA_SLOT, SPARE_SLOTS, Agent, Cluster, Problem, Process, ReplyError
from writer import KEY, Writer

pytestmark = pytest.mark.timing

ROLE = Path(__file__).resolve().parents[1] / "roles/redis"
RULES = yaml.safe_load((ROLE / "vars/main.yml").read_text())["_redis_cluster_rules"]
PASSWORD = "p" * 20


class Machines:
    """Three hosts with a data process each, and a voter on two of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: list[Process] = []
        port = _free_port()
        self.data = [f"127.0.0.{host}:{port}" for host in (1, 2, 3)]
        self.voters = [f"127.0.0.{host}:{port + 1}" for host in (2, 3)]

    def cluster(self, host: int) -> Cluster:
        """The cluster as the programs of a host know it."""
        local = self.data[host - 1]
        cluster = Cluster(self.data, self.voters, local=local, user="cluster", password=PASSWORD)
        self._connections += cluster.processes.values()
        return cluster

    def on(self, host: int) -> list[str]:
        return [address for address in [*self.data, *self.voters] if address.startswith(f"127.0.0.{host}:")]

    def start(self, *addresses: str, cluster: bool = True) -> None:
        for address in addresses:
            folder = self._folder / address
            folder.mkdir(exist_ok=True)
            (folder / "users.acl").write_text(
                f"user default on nopass ~* &* +@all\nuser cluster on >{PASSWORD} {RULES}\n"
            )
            (folder / "redis.conf").write_text(self._configuration(address, cluster))
            with (folder / "log").open("ab") as log:
                command = ["redis-server", str(folder / "redis.conf")]
                self._running[address] = subprocess.Popen(command, stdout=log, stderr=log)
        for address in addresses:
            process = self.ask(address)
            redis_cluster.wait(lambda: process.call("PING") == "PONG", 10, f"{address} does not start")  # noqa: B023

    def _configuration(self, address: str, cluster: bool) -> str:
        host, _, port = address.rpartition(":")
        folder = self._folder / address
        lines = f"""
            bind {host}
            port {port}
            dir {folder}
            aclfile {folder}/users.acl
            appendonly {"no" if address in self.voters else "yes"}
            appendfsync always
            save ""
            repl-diskless-sync-delay 0
            repl-timeout 3
        """
        if cluster:
            lines += f"""
            cluster-enabled yes
            cluster-node-timeout 1000
            cluster-announce-ip {host}
            cluster-require-full-coverage no
            cluster-allow-replica-migration no
            cluster-replica-no-failover yes
            masteruser cluster
            masterauth {PASSWORD}
            """
        return lines.replace("            ", "")

    def kill(self, *addresses: str) -> None:
        for address in addresses:
            process = self._running.pop(address)
            process.kill()
            process.wait()

    def empty(self, *addresses: str) -> None:
        for address in addresses:
            shutil.rmtree(self._folder / address)

    def folder(self, address: str) -> Path:
        return self._folder / address

    def ask(self, address: str) -> Process:
        """A connection of the default user, which may run every command."""
        self._connections.append(Process(address, "", ""))
        return self._connections[-1]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.kill(*self._running)


def _free_port() -> int:
    """Return a port that is free with the next one and their bus ports, on all hosts.

    They are below the ports that connections get by themselves, which begin at 32768.
    """
    while True:
        port = random.randrange(10_000, 22_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in (port, port + 1, port + 10000, port + 10001):
                for host in (1, 2, 3):
                    stack.enter_context(socket.create_server((f"127.0.0.{host}", number)))
            return port


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_cluster, "STABLE", 0.5)
    monkeypatch.setattr(redis_cluster, "SETTLE", 0.5)
    monkeypatch.setattr(redis_cluster, "LEAVE_TIMEOUT", 0.5)
    monkeypatch.setattr(redis_cluster, "READY_TIMEOUT", 2.0)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    started = Machines(tmp_path)
    yield started
    started.close()


@pytest.fixture
def formed(machines: Machines) -> Machines:
    """A cluster with ready replicas and one key."""
    machines.start(*machines.data, *machines.voters)
    redis_cluster.form(machines.cluster(1))
    for host in (2, 3):
        run_agent(machines, host, until=lambda row: row["is_ready"])
    machines.ask(machines.data[0]).call("SET", KEY, "kept")
    assert machines.ask(machines.data[0]).call("WAIT", 2, 2000) == 2
    return machines


def state(machines: Machines) -> dict[str, dict[str, Any]]:
    return {row["address"]: row for row in redis_cluster.status(machines.cluster(1))}


def run_agent(machines: Machines, host: int, until: Any, seconds: float = 20) -> None:
    """Run the agent of a host until a condition on its row of the status holds."""
    agent = Agent(machines.cluster(host))
    address = machines.data[host - 1]
    deadline = time.monotonic() + seconds
    while not until(state(machines)[address]):
        assert time.monotonic() < deadline, state(machines)
        with contextlib.suppress(OSError, ReplyError, Problem, KeyError):
            agent.step()
        time.sleep(0.1)


def wait_for_master(machines: Machines, *hosts: int) -> str:
    """Wait until one of the hosts has the master role; returns its address."""
    candidates = [machines.data[host - 1] for host in hosts]
    found: list[str] = []

    def is_elected() -> bool:
        rows = state(machines)
        found[:] = [address for address in candidates if rows[address].get("owns_data")]
        return bool(found)

    redis_cluster.wait(is_elected, 15, "no replica was elected")
    return found[0]


def test_the_slots_are_those_of_the_keys(machines: Machines) -> None:
    machines.start(machines.data[0])
    assert machines.ask(machines.data[0]).call("CLUSTER", "KEYSLOT", KEY) == DATA_SLOT
    assert DATA_SLOT not in SPARE_SLOTS


def test_forming_again_changes_nothing(machines: Machines) -> None:
    machines.start(*machines.data, *machines.voters)
    first = machines.cluster(2)
    redis_cluster.form(first)
    assert len(first.done) == 9
    rows = state(machines)
    assert [rows[address]["role"] for address in machines.data] == ["master", "replica", "replica"]
    assert [rows[address]["role"] for address in machines.voters] == ["master", "master"]
    assert {row["state"] for row in rows.values()} == {"ok"}
    again = machines.cluster(3)
    redis_cluster.form(again)
    assert again.done == []
    # A replica counts only after the agent has seen that it is in sync.
    assert not rows[machines.data[1]]["is_ready"]
    run_agent(machines, 2, until=lambda row: row["is_ready"])


def test_an_interrupted_run_is_completed(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forming stops after each of its steps once, and the next run goes on."""
    machines.start(*machines.data, *machines.voters)
    steps = ["_meet", "_give_spare_slot", "_replicate", "_is_complete"]
    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(redis_cluster, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                redis_cluster.form(machines.cluster(1))
    cluster = machines.cluster(1)
    redis_cluster.form(cluster)
    assert cluster.done == []
    assert {row["state"] for row in state(machines).values()} == {"ok"}


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_one_redis_becomes_a_cluster_with_its_data(machines: Machines) -> None:
    """Whichever host has the data: the preferred one takes the master role when it is in sync."""
    single = machines.data[1]
    machines.start(single, cluster=False)
    machines.ask(single).call("SET", KEY, "kept")
    machines.ask(single).call("SET", "another", "kept")
    machines.kill(single)
    machines.start(*machines.data, *machines.voters)
    redis_cluster.form(machines.cluster(1))
    assert state(machines)[single]["owns_data"]
    run_agent(machines, 1, until=lambda row: row.get("owns_data"))
    assert machines.ask(machines.data[0]).call("GET", KEY) == "kept"
    assert machines.ask(machines.data[0]).call("GET", "another") == "kept"
    # And back: its log is that of one Redis.
    machines.kill(*machines.data)
    machines.start(machines.data[0], cluster=False)
    assert machines.ask(machines.data[0]).call("GET", KEY) == "kept"


def test_two_hosts_with_data_are_refused(machines: Machines) -> None:
    for address, key in ((machines.data[0], KEY), (machines.data[1], KEY), (machines.data[2], "a")):
        machines.start(address, cluster=False)
        machines.ask(address).call("SET", key, "1")
        machines.kill(address)
    machines.start(*machines.data, *machines.voters)
    with pytest.raises(Problem, match="both have data of their own"):
        redis_cluster.form(machines.cluster(1))
    machines.ask(machines.data[1]).call("FLUSHALL")
    machines.ask(machines.data[1]).call("CLUSTER", "RESET")
    with pytest.raises(Problem, match="has 1 keys of its own"):
        redis_cluster.form(machines.cluster(1))


def test_a_new_cluster_begins_with_all_processes(formed: Machines) -> None:
    """An empty machine doesn't become a second, empty cluster while the others can't be reached."""
    formed.kill(*formed.data, *formed.voters)
    formed.empty(formed.data[0])
    formed.start(formed.data[0])
    with pytest.raises(Problem, match=f"Redis at {formed.data[1]} doesn't answer; a new cluster begins"):
        redis_cluster.form(formed.cluster(1))
    formed.empty(*formed.data[1:], *formed.voters)
    formed.start(*formed.data[1:], formed.voters[0])
    with pytest.raises(Problem, match=f"Redis at {formed.voters[1]} doesn't answer; a new cluster begins"):
        redis_cluster.form(formed.cluster(1))
    assert not any(row.get("owns_data") for row in state(formed).values())


def test_an_empty_machine_replaces_a_dead_one(formed: Machines) -> None:
    dead = formed.on(3)
    before = {row["id"] for row in state(formed).values()}
    formed.kill(*dead)
    # A dead host that is still missing is left alone.
    time.sleep(2)
    cluster = formed.cluster(1)
    redis_cluster.form(cluster)
    assert cluster.done == []
    formed.empty(*dead)
    formed.start(*dead)
    redis_cluster.form(cluster)
    rows = state(formed)
    assert rows[formed.data[2]]["role"] == "replica"
    now = {row["id"] for row in rows.values()}
    assert len(now - before) == 2
    for address in [*formed.data, *formed.voters]:
        assert set(formed.ask(address).members()) == now
    replica = formed.ask(formed.data[2])
    assert replica.call("READONLY") == "OK"
    assert replica.call("GET", KEY) == "kept"
    again = formed.cluster(1)
    redis_cluster.form(again)
    assert again.done == []


def test_the_preferred_host_takes_the_master_role_back(formed: Machines) -> None:
    """Killed, and replaced by an empty machine: a replica is elected, and later the role returns."""
    for is_empty in (False, True):
        first = formed.data[0]
        formed.kill(first)
        elected = wait_for_master(formed, 2, 3)
        formed.ask(elected).call("SET", KEY, f"later {is_empty}")
        if is_empty:
            formed.empty(first)
        formed.start(first)
        redis_cluster.form(formed.cluster(1))
        assert state(formed)[first]["role"] == "replica"
        run_agent(formed, 1, until=lambda row: row.get("owns_data"))
        assert formed.ask(first).call("GET", KEY) == f"later {is_empty}"
        for host in (2, 3):
            run_agent(formed, host, until=lambda row: row.get("is_ready"))


def test_only_a_host_with_all_data_is_ready(formed: Machines) -> None:
    """A backup of another host would be an old state."""
    for host in (1, 2, 3):
        redis_cluster.check_ready(formed.cluster(host))
    problem = "^Redis at 127.0.0.{}:.* is neither the working master nor a ready replica"
    formed.kill(formed.data[1])
    with pytest.raises(Problem, match=problem.format(2)):
        redis_cluster.check_ready(formed.cluster(2))
    formed.start(formed.data[1])
    # It may not have all data until its agent has looked.
    with pytest.raises(Problem, match=problem.format(2)):
        redis_cluster.check_ready(formed.cluster(2))
    run_agent(formed, 2, until=lambda row: row["is_ready"])
    redis_cluster.check_ready(formed.cluster(2))
    # A replica that is cut off from the others has what there was before.
    formed.kill(*formed.on(1), *formed.on(2))
    with pytest.raises(Problem, match=problem.format(3)):
        redis_cluster.check_ready(formed.cluster(3))


def test_a_replica_without_all_data_is_not_elected(formed: Machines) -> None:
    formed.kill(formed.data[1])
    formed.start(formed.data[1])
    redis_cluster.wait(
        lambda: redis_cluster.is_synced(formed.ask(formed.data[1]).info()), 10, "no synchronisation"
    )
    formed.kill(formed.data[0], formed.data[2])
    time.sleep(4)
    # It was in sync, but the app had not been told to wait for it.
    assert not state(formed)[formed.data[1]]["owns_data"]


def test_after_a_cold_start_without_the_master_an_operator_promotes_a_replica(formed: Machines) -> None:
    formed.ask(formed.data[0]).call("XADD", "pixel:{0}:events", "*", "a", "1")
    formed.kill(formed.data[2])
    time.sleep(2)
    formed.ask(formed.data[0]).call("XADD", "pixel:{0}:events", "*", "a", "2")
    formed.kill(formed.data[0], formed.data[1], *formed.voters)
    alive = [*formed.on(2), *formed.on(3)]
    formed.start(*alive)
    time.sleep(4)
    assert not any(row.get("owns_data") for row in state(formed).values())
    with pytest.raises(Problem, match=r"^The data belongs to 127.0.0.1:\d+, which doesn't answer"):
        redis_cluster.form(formed.cluster(2))
    with pytest.raises(Problem, match="has later events"):
        redis_cluster.promote(formed.cluster(3))
    cluster = formed.cluster(2)
    redis_cluster.promote(cluster)
    assert "(FORCE)" in cluster.done[0]
    assert wait_for_master(formed, 2) == formed.data[1]
    assert formed.ask(formed.data[1]).call("XLEN", "pixel:{0}:events") == 2
    with pytest.raises(Problem, match="is the master and answers"):
        redis_cluster.promote(formed.cluster(3))


def test_the_last_host_is_promoted_without_an_election(formed: Machines) -> None:
    formed.kill(*formed.on(1), *formed.on(3))
    cluster = formed.cluster(2)
    redis_cluster.promote(cluster)
    assert "(TAKEOVER)" in cluster.done[0]
    # It serves when most masters answer again.
    formed.start(*formed.on(3))
    redis_cluster.wait(
        lambda: formed.ask(formed.data[1]).call("GET", KEY) == "kept", 10, "the promoted host does not serve"
    )


class Services:
    """Takes the place of systemd: the agents run as threads, and a restart is that of a host's processes."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._stopped = threading.Event()
        self._agents: list[threading.Thread] = []
        self.host = 0

    def systemctl(self, verb: str, *_: str) -> None:
        if verb == "restart":
            self._machines.kill(*self._machines.on(self.host))
            self._machines.start(*self._machines.on(self.host))
        elif verb == "start":
            self._agents.append(threading.Thread(target=self._follow, args=(self.host,)))
            self._agents[-1].start()

    def _follow(self, host: int) -> None:
        agent = Agent(self._machines.cluster(host))
        while not self._stopped.wait(0.1):
            with contextlib.suppress(OSError, ReplyError, Problem, KeyError):
                agent.step()

    def close(self) -> None:
        self._stopped.set()
        for thread in self._agents:
            thread.join()


def test_a_rolling_restart_delays_no_write_and_loses_none(
    formed: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = Services(formed)
    monkeypatch.setattr(redis_cluster, "_systemctl", services.systemctl)
    with contextlib.closing(services), Writer(formed.data, formed.ask) as writer:
        for services.host in (3, 2, 1):
            redis_cluster.restart(formed.cluster(services.host), ["redis-server.service"])
        redis_cluster.wait(lambda: formed.ask(formed.data[0]).myself().owns(DATA_SLOT), 20, "no failback")
    assert writer.acknowledged > 100
    assert writer.slowest < 1, "a write waited for a restart"
    assert int(formed.ask(formed.data[0]).call("GET", KEY)) >= writer.acknowledged


def test_a_host_that_has_left_may_be_off(formed: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    services = Services(formed)
    monkeypatch.setattr(redis_cluster, "_systemctl", services.systemctl)
    services.host = 1
    with contextlib.closing(services), Writer(formed.data, formed.ask) as writer:
        redis_cluster.leave(formed.cluster(1))
        formed.kill(formed.data[0])
        time.sleep(2)
        formed.start(formed.data[0])
        redis_cluster.rejoin(formed.cluster(1))
        redis_cluster.wait(lambda: formed.ask(formed.data[0]).myself().owns(DATA_SLOT), 20, "no failback")
    assert writer.slowest < 1, "a write waited for the host"
    assert int(formed.ask(formed.data[0]).call("GET", KEY)) >= writer.acknowledged > 100


def test_a_host_is_not_restarted_while_another_one_is_away(formed: Machines) -> None:
    formed.kill(*formed.on(3))
    with pytest.raises(Problem, match=f"Redis at {formed.data[2]} does not work; nothing was changed"):
        redis_cluster.leave(formed.cluster(2))


def test_a_member_without_its_log_does_not_start(formed: Machines) -> None:
    folder = formed.folder(formed.data[0])
    redis_cluster.check_log(folder)
    formed.kill(formed.data[0])
    shutil.rmtree(folder / "appendonlydir")
    with pytest.raises(Problem, match="there is no log"):
        redis_cluster.check_log(folder)
    (folder / "nodes.conf").unlink()
    redis_cluster.check_log(folder)


def test_a_process_that_never_joined_may_start_without_a_log(machines: Machines) -> None:
    """As after a crash between the first writes of nodes.conf and of the log."""
    machines.start(machines.data[0])
    shutil.rmtree(machines.folder(machines.data[0]) / "appendonlydir")
    redis_cluster.check_log(machines.folder(machines.data[0]))


def test_a_running_member_that_is_no_longer_configured_is_named(formed: Machines) -> None:
    smaller = formed.cluster(1)
    smaller.data, smaller.voters = formed.data[:2], formed.voters[:1]
    for address in formed.on(3):
        del smaller.processes[address]
    with pytest.raises(Problem, match="is a running member of the cluster, and is not configured"):
        redis_cluster.form(smaller)


def test_a_refused_password_is_reported(machines: Machines) -> None:
    machines.start(machines.data[0])
    cluster = Cluster(machines.data, machines.voters, user="cluster", password="wrong")
    with pytest.raises(Problem, match="refuses CLUSTER NODES: WRONGPASS"):
        redis_cluster.form(cluster)
