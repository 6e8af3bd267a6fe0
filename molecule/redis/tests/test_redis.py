"""Role redis: users and rights, durability, passwords, and existing data."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["debian12", "debian13"]


@pytest.fixture
def redis(shell: Any, address: str, password: Any) -> Any:
    """Run a command as a Redis user; `None` means without authentication."""

    def run(user: str | None, *command: str) -> str:
        login = ""
        if user:
            name = {"app": "pixel", "admin": "admin"}[user]
            login = f"REDISCLI_AUTH={password(user)} "
            command = ("--user", name, *command)
        words = " ".join(f"'{word}'" for word in command)
        output: str = shell(f"{login}redis-cli -h {address} {words}").strip()
        return output

    return run


def test_redis_runs_and_starts_at_boot(host: Any) -> None:
    service = host.service("redis-server")
    assert service.is_running
    assert service.is_enabled


def test_redis_listens_on_loopback_and_the_private_address_only(host: Any, address: str) -> None:
    listening = [socket for socket in host.socket.get_listening_sockets() if socket.endswith(":6379")]
    assert sorted(listening) == sorted([f"tcp://{address}:6379", "tcp://127.0.0.1:6379"])


@pytest.mark.parametrize(
    "command", [("ping",), ("get", "pixel:{0}:tile:0:0"), ("info",), ("auth", "default", "")]
)
def test_an_unauthenticated_client_may_run_no_command(redis: Any, command: tuple[str, ...]) -> None:
    assert redis(None, *command).startswith(("NOAUTH", "WRONGPASS"))


def test_the_apps_user_may_use_its_keys(redis: Any) -> None:
    assert redis("app", "bitfield", "pixel:test", "set", "u8", "0", "97") in ("0", "97")
    assert redis("app", "getrange", "pixel:test", "0", "-1") == "a"
    assert redis("app", "xadd", "pixel:test:events", "MAXLEN", "~", "10", "*", "c", "x")


@pytest.mark.parametrize(
    "command",
    [
        ("set", "other", "1"),
        ("del", "pixel:test"),
        ("rename", "pixel:test", "pixel:test:2"),
        ("scan", "0"),
        ("setrange", "pixel:test", "536870911", "a"),
        ("keys", "*"),
        ("flushall",),
        ("config", "get", "*"),
        ("acl", "list"),
        ("shutdown",),
        ("eval", "return redis.call('get', KEYS[1])", "1", "other"),
        ("evalsha", 40 * "0", "0"),
        ("publish", "channel", "x"),
    ],
)
def test_the_apps_user_may_run_no_other_command(redis: Any, command: tuple[str, ...]) -> None:
    assert redis("app", *command).startswith("NOPERM")


def test_a_script_of_the_apps_user_has_no_further_rights(redis: Any) -> None:
    assert redis("app", "eval", "return 1", "0") == "1"
    answer = redis("app", "eval", 'return redis.call("flushall")', "0")
    # The words of Redis 7 and of Redis 8.
    assert "can't run this command" in answer or "ACL failure in script" in answer


def test_acknowledged_writes_are_configured_to_be_on_disk(redis: Any) -> None:
    for name, value in [("appendonly", "yes"), ("appendfsync", "always"), ("maxmemory-policy", "noeviction")]:
        assert redis("admin", "config", "get", name).split() == [name, value]


def test_slow_commands_are_recorded_by_the_latency_monitor(redis: Any) -> None:
    wait = """
        local began = redis.call("time")
        repeat local now = redis.call("time") until (now[1] - began[1]) * 1e6 + now[2] - began[2] > 2e5
    """
    redis("admin", "eval", wait, "0")
    moment, milliseconds = redis("admin", "latency", "history", "command").split()[-2:]
    assert abs(int(moment) - time.time()) < 60
    assert 200 <= int(milliseconds) < 60_000


def test_maxmemory_is_derived_from_the_hosts_memory(host: Any, redis: Any) -> None:
    limit = int(redis("admin", "config", "get", "maxmemory").split()[1])
    total = int(host.run("awk '/MemTotal/ {print $2}' /proc/meminfo").stdout) * 1024
    assert 0.3 * total < limit < 0.5 * total


KILL = "systemctl kill --signal=KILL redis-server"


def stop_and_wait(host: Any, redis: Any, way: str) -> None:
    """Restart or kill Redis, and wait until a new process answers."""

    def main_pid() -> str:
        return str(host.service("redis-server").systemd_properties["MainPID"])

    before = main_pid()
    host.run_expect([0], way)
    for _ in range(50):
        if main_pid() not in (before, "0") and redis("app", "ping") == "PONG":
            return
        time.sleep(0.2)
    raise AssertionError(f"Redis did not come back within 10 s after `{way}`")


@pytest.mark.parametrize("way", ["systemctl restart redis-server", KILL])
def test_a_restart_or_a_crash_loses_nothing(host: Any, redis: Any, way: str) -> None:
    assert redis("app", "set", "pixel:test:kept", way) == "OK"
    stop_and_wait(host, redis, way)
    assert redis("app", "get", "pixel:test:kept") == way


def test_transactions_survive_a_restart(
    host: Any, shell: Any, redis: Any, address: str, password: Any
) -> None:
    """While it replays the log, Redis checks the rights of the default user at each EXEC."""
    session = f"AUTH pixel {password('app')}\nMULTI\nSET pixel:test:transaction kept\nEXEC\n"
    assert shell(f"printf '{session}' | redis-cli -h {address}").splitlines()[-1] == "OK"
    host.run_expect([0], "systemctl restart redis-server")
    assert redis("app", "get", "pixel:test:transaction") == "kept"


def test_configuration_files_belong_to_redis(host: Any) -> None:
    for path in ("/etc/redis/redis.conf", "/etc/redis/users.acl"):
        file = host.file(path)
        assert (file.user, file.group, oct(file.mode)) == ("redis", "redis", "0o640")


@pytest.mark.parametrize("user", ["app", "admin"])
def test_passwords_are_not_stored_in_clear(host: Any, password: Any, user: str) -> None:
    secret = password(user)
    places = (
        "cat /etc/redis/*",
        "systemctl show redis-server",
        "ps -eo args",
        "journalctl --no-pager",
        "cat /proc/$(systemctl show -P MainPID redis-server)/environ",
    )
    for place in places:
        assert secret not in host.run(f"sh -c '{place}'").stdout, place


def test_the_unit_is_sandboxed(host: Any) -> None:
    rating = host.run("systemd-analyze security redis-server.service").stdout
    exposure = float(rating.strip().splitlines()[-1].split(":")[1].split()[0])
    assert exposure <= 2.0


def test_a_truncated_log_is_repaired_and_the_repair_is_logged(
    host: Any, shell: Any, redis: Any, address: str, password: Any
) -> None:
    """As after a power cut: the last transaction is incomplete, and so was never acknowledged."""

    def write(name: str) -> None:
        commands = f"MULTI\nSET pixel:test:{name} kept\nSET pixel:test:{name}:2 kept\nEXEC"
        login = f"AUTH pixel {password('app')}"
        assert shell(f"printf '{login}\n{commands}\n' | redis-cli -h {address}").splitlines()[-1] == "OK"

    def repairs() -> int:
        """Count repairs since Redis was started, as playbooks/status.yml does."""
        started = "_SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID redis-server)"
        journal: str = shell(f"journalctl --output=cat --no-pager {started}")
        return len(re.findall("!!! Truncating the AOF|bytes cut off", journal))

    host.run_expect([0], "systemctl restart redis-server")
    assert repairs() == 0
    write("whole")
    write("cut")
    host.run_expect([0], "systemctl stop redis-server")
    shell("cd /var/lib/redis/appendonlydir && truncate --size=-5 $(ls -t *.incr.aof | head -n 1)")
    host.run_expect([0], "systemctl start redis-server")
    assert redis("admin", "exists", "pixel:test:whole", "pixel:test:whole:2") == "2"
    assert redis("admin", "exists", "pixel:test:cut", "pixel:test:cut:2") == "0"
    assert repairs() == 1
    # Writes acknowledged after the repair are kept as well, and the log is valid.
    write("later")
    assert "All AOF files and manifest are valid" in shell(
        "redis-check-aof /var/lib/redis/appendonlydir/appendonly.aof.manifest"
    )
    stop_and_wait(host, redis, KILL)
    assert redis("admin", "exists", "pixel:test:whole", "pixel:test:later", "pixel:test:later:2") == "3"
    assert repairs() == 0


@dataclass
class Repair:
    """Three runs on hosts whose running Redis differs from its files, and Redis' PIDs by host in between."""

    healed: Any
    finished: Any
    repeated: Any
    first: dict[str, str]
    before: dict[str, str]
    after: dict[str, str]
    later: dict[str, str]


@pytest.fixture(scope="module")
def repair(play: Any, state: Path, fleet: dict[str, Any], password: Any) -> Repair:
    """An earlier run ended before it restarted Redis. Prepared once for both hosts, to save time."""

    def on_all(script: str) -> dict[str, str]:
        outputs = {}
        for name in testinfra_hosts:
            ssh = ["ssh", "-F", str(state / "ssh_config"), name, "sudo sh -s"]
            text = script.replace("ADDRESS", fleet["hosts"][name]["address"])
            outputs[name] = subprocess.run(ssh, input=text, text=True, capture_output=True).stdout.strip()
        return outputs

    pids = "systemctl show --property=MainPID --value redis-server"
    login = f"REDISCLI_AUTH={password('admin')} redis-cli -h ADDRESS --user admin"
    assert set(on_all(f"{login} acl setuser pixel resetpass").values()) == {"OK"}
    first = on_all(pids)
    healed = play("molecule/redis/converge.yml")
    before = on_all(pids)
    on_all("touch /etc/redis/redis.conf")
    finished = play("molecule/redis/converge.yml")
    after = on_all(pids)
    repeated = play("molecule/redis/converge.yml")
    return Repair(healed, finished, repeated, first, before, after, on_all(pids))


def test_the_next_run_completes_a_run_that_ended_before_the_restart(
    host: Any, repair: Repair, redis: Any
) -> None:
    name = host.backend.hostname
    # Users are corrected without a restart.
    assert repair.healed.changes()[name] == 1
    assert repair.before[name] == repair.first[name]
    assert repair.finished.returncode == 0
    assert repair.after[name] != repair.before[name]
    assert redis("app", "ping") == "PONG"
    assert repair.repeated.changes()[name] == 0
    assert repair.later[name] == repair.after[name]
