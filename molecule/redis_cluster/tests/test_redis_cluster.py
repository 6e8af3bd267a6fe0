"""Role redis on three hosts: layout, lost hosts, changes, backups, and back to one Redis."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis_cluster import Process, ReplyError, wait
from writer import KEY, Writer

ROOT = Path(__file__).resolve().parents[3]
INVENTORY = ROOT / "molecule/redis_cluster/inventory"
HOSTS = ["n1", "n2", "n3"]


def test_one_host_has_the_master_and_the_others_a_replica_and_a_voter(
    status: Any, addresses: list[str]
) -> None:
    rows = status("n2")
    assert [rows[address]["role"] for address in addresses] == ["master", "replica", "replica"]
    voters = [row for row in rows.values() if row["kind"] == "voter"]
    assert [row["role"] for row in voters] == ["master", "master"]
    assert {row["state"] for row in rows.values()} == {"ok"}
    wait_until_ready(status, "n1", addresses[1:])


def test_the_bus_is_open_to_the_other_redis_hosts_only(addresses: list[str]) -> None:
    """This machine is the operator's, which may use the Redis ports."""
    for address in addresses:
        host = address.partition(":")[0]
        socket.create_connection((host, 6379), timeout=2).close()
        with pytest.raises(TimeoutError):
            socket.create_connection((host, 16379), timeout=0.5)


@pytest.mark.parametrize(
    "command", [["cluster", "reset"], ["cluster", "failover"], ["config", "get", "*"], ["psync", "?", "-1"]]
)
def test_the_apps_user_may_only_read_the_clusters_state(
    connect: Any, addresses: list[str], command: list[str]
) -> None:
    with contextlib.closing(connect(addresses[0])) as process:
        assert process.members()
        with pytest.raises(ReplyError, match="NOPERM"):
            process.call(*command)


def test_the_services_are_sandboxed_and_name_no_password(hosts: dict[str, Any], password: Any) -> None:
    for unit in ("redis-server@voter.service", "redis-cluster.service"):
        rating = hosts["n2"].run(f"systemd-analyze security {unit}").stdout
        assert float(rating.strip().splitlines()[-1].split(":")[1].split()[0]) <= 2.0
    secret = password("cluster")
    for place in ("journalctl --no-pager", "ps -eo args", "systemctl show redis-cluster redis-server"):
        assert secret not in hosts["n2"].run(place).stdout
    assert "secret" not in secret
    for path in ("redis-cluster.json", "redis/redis.conf", "redis/redis-voter.conf", "redis-tls/key.pem"):
        assert not hosts["n2"].file(f"/etc/{path}").mode & 0o007


def test_no_process_speaks_without_tls(addresses: list[str], hosts: dict[str, Any]) -> None:
    with pytest.raises(ConnectionResetError), contextlib.closing(Process(addresses[0], "", "")) as process:
        process.call("PING")
    # The bus has no login: it asks for a certificate of the cluster.
    command = f"python3 - {addresses[1].partition(':')[0]} %s <<'END'\n{BUS}\nEND"
    assert hosts["n1"].run(command % "with").stdout == "waits for a message\n"
    assert "certificate required" in hosts["n1"].run(command % "").stderr


def test_tls_of_a_running_cluster_is_not_changed(play: Any) -> None:
    refused = play("molecule/redis_cluster/converge.yml", "--tags", "redis", redis_tls="false").failures()
    assert set(refused) == set(HOSTS)
    assert "Make the cluster one Redis, change redis_tls, and make it a cluster again" in refused["n1"]


BUS = """
import socket, ssl, sys
context = ssl.create_default_context(cafile="/etc/redis-tls/ca.pem")
if "with" in sys.argv:
    context.load_cert_chain("/etc/redis-tls/certificate.pem", "/etc/redis-tls/key.pem")
connection = socket.create_connection((sys.argv[1], 16379), 2)
with context.wrap_socket(connection, server_hostname=sys.argv[1]) as bus:
    try:
        bus.recv(1)
    except TimeoutError:
        print("waits for a message")
"""


def wait_until_ready(status: Any, host: str, replicas: list[str]) -> None:
    wait(
        lambda: all(status(host)[address].get("is_ready") for address in replicas),
        40,
        "the replicas are not ready",
    )


def wait_for_master(status: Any, host: str, address: str, seconds: float = 40) -> None:
    wait(lambda: bool(status(host)[address].get("owns_data")), seconds, f"{address} is not the master")


def read(connect: Callable[[str], Any], address: str) -> int:
    with contextlib.closing(connect(address)) as process:
        return int(process.call("GET", KEY))


def test_the_masters_host_dies_and_gets_the_role_back(
    power: Any, status: Any, addresses: list[str], connect: Any
) -> None:
    with Writer(addresses, connect) as writer:
        time.sleep(1)
        power("n1", "off")
        time.sleep(8)
        during = writer.acknowledged
        power("n1", "on")
        wait_for_master(status, "n2", addresses[0])
        time.sleep(1)
    assert during > 100
    assert writer.slowest < 6
    assert writer.acknowledged > during
    assert read(connect, addresses[0]) >= writer.acknowledged
    wait_until_ready(status, "n1", addresses[1:])


def test_back_to_one_redis_and_to_three_again(
    play: Any, status: Any, addresses: list[str], connect: Any, password: Any, ca: str, tmp_path: Path
) -> None:
    """The other two hosts are empty when they join again; the canvas stays as it is.

    A run after a complete one continues it. A canvas of a release before 1.1 is refused.
    """
    canvas = random.randbytes(100_000).hex()
    inventory = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
    inventory["redis"]["hosts"] = {"n1": None}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    for name in ("group_vars", "local_fleet.yml"):
        (tmp_path / name).symlink_to(INVENTORY / name)
    with contextlib.closing(connect(addresses[0])) as process:
        process.call("SET", "pixel:{0}:canvas", canvas)
        assert process.call("WAIT", 2, 1000) == 2
    single, three = "playbooks/redis_single.yml", "molecule/redis_cluster/converge.yml"
    for playbook, where in ((single, tmp_path), (single, tmp_path), (three, INVENTORY)):
        if playbook == three:
            with contextlib.closing(connect(addresses[0])) as process:
                process.call("SET", "pixel:{1:2}", "former")
                refused = play(three, hosts=str(where), nginx_lb_clusters={})
                assert "The canvas on n1 is that of a release before 1.1" in refused.words
                process.call("SET", "pixel:{1:2}", "", "PX", 1)
        play(playbook, "--tags", "redis", hosts=str(where), nginx_lb_clusters={}).changes()
        with contextlib.closing(connect(addresses[0])) as process:
            assert process.call("GET", "pixel:{0}:canvas") == canvas
        with contextlib.closing(Process(addresses[0], "admin", password("admin"), ca)) as process:
            assert f"cluster_enabled:{int(where == INVENTORY)}" in process.call("INFO", "cluster")
    wait_until_ready(status, "n1", addresses[1:])


def test_after_a_cold_start_without_the_master_an_operator_promotes_a_replica(
    power: Any, run: Any, status: Any, addresses: list[str], connect: Any
) -> None:
    kept = read(connect, addresses[0])
    for host in HOSTS:
        power(host, "off")
    for host in HOSTS[1:]:
        power(host, "on")
    wait(lambda: status("n2")[addresses[2]].get("state") == "ok", 30, "the hosts don't start")
    time.sleep(4)
    assert not any(row.get("owns_data") for row in status("n2").values())
    assert "(FORCE)" in run("n2", "redis-cluster promote")
    wait_for_master(status, "n3", addresses[1])
    assert read(connect, addresses[1]) == kept
    power("n1", "on")
    wait_for_master(status, "n2", addresses[0])
    assert read(connect, addresses[0]) == kept
    wait_until_ready(status, "n1", addresses[1:])


def test_a_process_without_its_log_does_not_start(
    run: Any, hosts: dict[str, Any], status: Any, addresses: Any
) -> None:
    run("n3", "systemctl stop redis-server; mv /var/lib/redis/appendonlydir /var/lib/redis/away")
    assert hosts["n3"].run("systemctl start redis-server").rc != 0
    assert "there is no log in /var/lib/redis/appendonlydir" in run(
        "n3", "journalctl --unit=redis-server --lines=20"
    )
    run("n3", "mv /var/lib/redis/away /var/lib/redis/appendonlydir; systemctl restart redis-server")
    wait_until_ready(status, "n1", addresses[1:])


def test_a_change_is_rolled_out_without_a_failed_write(
    play: Any, status: Any, addresses: list[str], connect: Any
) -> None:
    with Writer(addresses, connect) as writer:
        changed = play("molecule/redis_cluster/converge.yml", redis_tcp_backlog=400).changed_tasks()
        wait_for_master(status, "n2", addresses[0])
        time.sleep(1)
    tasks = (
        "Apply kernel settings",
        "Configure Redis",
        "Restart them, host by host and without a failed write",
    )
    assert sorted(changed) == sorted(f"{host}: redis : {task}" for host in HOSTS for task in tasks)
    assert writer.acknowledged > 100
    assert writer.slowest < 1.5
    assert read(connect, addresses[0]) >= writer.acknowledged
    wait_until_ready(status, "n1", addresses[1:])


@pytest.fixture
def canvas(addresses: list[str], password: Any, ca: str) -> Callable[[], list[str]]:
    """The digests of all keys; fails unless they are the same on all hosts."""
    script = yaml.safe_load((ROOT / "roles/redis/vars/main.yml").read_text())["_redis_script_digests"]

    def digests() -> list[str]:
        found = []
        for address in addresses:
            with contextlib.closing(Process(address, "admin", password("admin"), ca)) as process:
                process.call("READONLY")
                found.append(process.call("EVAL", script, 0))
        assert found[0] == found[1] == found[2]
        assert len(found[0]) >= 2
        return list(found[0])

    return digests


def paint(connect: Any, address: str, value: int) -> None:
    """Change the canvas, as acknowledged by both replicas."""
    with contextlib.closing(connect(address)) as process:
        process.call("SET", "pixel:{0}:canvas", random.randbytes(100_000).hex())
        process.call("SET", KEY, value)
        assert process.call("WAIT", 2, 1000) == 2


def test_backups_are_restored_to_all_hosts(
    play: Any, run: Any, status: Any, addresses: list[str], connect: Any, canvas: Any, tmp_path: Path
) -> None:
    """From the repository, which is on a replica's host, and not from a damaged file on the control node."""
    folder = tmp_path / "backups"
    run("n3", "install -d -o pixel-backup -g pixel-backup -m 0700 /srv/backups")
    paint(connect, addresses[0], 1)
    wanted = canvas()
    assert play("playbooks/backup.yml").returncode == 0
    # The replica there was ready.
    assert "check-ready" in run("n3", "systemctl show -P ExecStartPre pixel-backup | grep status=0")
    paint(connect, addresses[0], 2)
    before = canvas()
    played = play("playbooks/backup.yml", redis_backup_repository="", redis_backup_dir=str(folder))
    assert [host for host, count in played.changes().items() if count] == ["n3"]
    assert len(list(folder.glob("pixel-*.rdb"))) == 1

    # A log that Redis refuses, as after a disk error.
    missing = "file missing.rdb seq 1 type b\n"
    options = {"redis_backup_repository": "", "redis_backup_dir": str(folder), "restore_overwrite": True}
    failed = play("playbooks/restore.yml", _redis_log_manifest=missing, **options).failures()
    assert "The former data was restored." in failed["n1"]
    assert canvas() == before
    wait_until_ready(status, "n1", addresses[1:])

    played = play("playbooks/restore.yml", restore_overwrite=True)
    assert played.returncode == 0, played.words
    assert f"its {len(wanted)} keys are identical to the backup's" in played.words
    assert canvas() == wanted
    rows = status("n2")
    assert [rows[address]["role"] for address in addresses] == ["master", "replica", "replica"]
    assert [rows[address]["is_ready"] for address in addresses[1:]] == [True, True]
    assert {row["state"] for row in rows.values()} == {"ok"}
    paint(connect, addresses[0], 3)
    canvas()


def test_a_backup_needs_the_host_that_makes_it(play: Any) -> None:
    refused = play("playbooks/backup.yml", "--limit", "n1:n2").failures()
    assert "n3 makes it (redis_backup_host)" in refused["n1"]
