"""Backup and restore while the fleet is in use."""

from __future__ import annotations

import gzip
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["c5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backup directory of these tests."""
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def play(play: Any, folder: Path) -> Callable[..., Any]:
    """Run a playbook with `redis_backup_dir` set to that directory."""

    def run(playbook: str, *arguments: str, **variables: Any) -> Any:
        return play(playbook, *arguments, **{"redis_backup_dir": str(folder)} | variables)

    return run


@pytest.fixture
def redis(shell: Any, address: str, password: Any) -> Callable[[str], str]:
    """Run a shell script in which `$redis` is redis-cli as the admin user."""

    def run(script: str) -> str:
        login = f"export REDISCLI_AUTH={password('admin')}; redis='redis-cli -h {address} --user admin'"
        output: str = shell(f"{login}\n{script}").strip()
        return output

    return run


@pytest.fixture
def contents(redis: Any) -> Callable[[], list[str]]:
    """Return each key without a TTL and its digest, computed differently from the role."""
    script = (
        'for key in $($redis keys "*"); do [ "$($redis ttl $key)" != -1 ]'
        " || echo $key $($redis dump $key | sha256sum); done | sort"
    )

    def digests() -> list[str]:
        keys: list[str] = redis(script).splitlines()
        assert keys
        return keys

    return digests


@pytest.fixture
def former(shell: Any) -> Iterator[Callable[[], list[str]]]:
    """List the former data that restores keep on the host; remove it before and after the test."""
    shell("rm -rf /var/lib/redis/former-*")
    yield lambda: shell("ls -d /var/lib/redis/former-*").splitlines()
    shell("rm -rf /var/lib/redis/former-*")


@pytest.fixture
def paint(client: Any) -> Callable[[int], None]:
    """Set a pixel; fails unless the app is connected to Redis."""

    def set_cell(value: int) -> None:
        pixel = {"x": 700, "y": 300, "channel": "B", "value": value}
        assert client.ask("/pixel", json.dumps(pixel).encode())[0] == 200

    return set_cell


def backups(folder: Path) -> list[Path]:
    return sorted(folder.glob("pixel-*.rdb"))


def with_checksum(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    Path(f"{path}.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    return path


@pytest.fixture(scope="module")
def backup(folder: Path, play: Any, client: Any) -> Path:
    """A backup of a canvas that is not empty."""
    pixel = {"x": 700, "y": 300, "channel": "B", "value": 77}
    assert client.ask("/pixel", json.dumps(pixel).encode())[0] == 200
    done = play("playbooks/backup.yml", "-vvv")
    assert done.returncode == 0, done.words
    [made] = backups(folder)
    made.with_suffix(".log").write_text(done.stdout)
    return made


def test_the_history_is_part_of_the_backup(backup: Path, folder: Path, tmp_path: Path) -> None:
    [made] = folder.glob("history-*.sqlite.gz")
    assert made.stat().st_mode & 0o777 == 0o600
    (tmp_path / "history").write_bytes(gzip.decompress(made.read_bytes()))
    with closing(sqlite3.connect(tmp_path / "history")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        [changes] = database.execute("SELECT count(*) FROM changes").fetchone()
    assert changes > 0


def test_a_backup_is_complete_and_readable_by_its_owner_only(backup: Path, folder: Path) -> None:
    checksum = Path(f"{backup}.sha256")
    assert checksum.read_text() == f"{hashlib.sha256(backup.read_bytes()).hexdigest()}  {backup.name}\n"
    assert {oct(path.stat().st_mode & 0o777) for path in (backup, checksum)} == {"0o600"}
    assert not list(folder.glob(".partial*"))


@pytest.mark.parametrize("user", ["app", "admin"])
def test_a_backup_leaves_no_password_and_no_file_behind(
    backup: Path, shell: Any, password: Any, user: str
) -> None:
    assert password(user) not in backup.with_suffix(".log").read_text()
    assert password(user) not in shell("journalctl --no-pager")
    assert shell("ls -d /var/tmp/pixel-backup.*") == ""


def test_a_dry_run_makes_no_backup_and_another_one_removes_the_oldest_but_never_itself(
    backup: Path, tmp_path: Path, play: Any
) -> None:
    """Files named while the clock was ahead sort after the new backup. Files with other names stay."""
    ahead = [f"pixel-20990101T00000{second}Z.rdb" for second in range(7)]
    for name in (*ahead, "pixel-20200101T000000Z.rdb", "pixel-before-launch.rdb"):
        with_checksum(tmp_path / name, backup.read_bytes())
    where = {"redis_backup_dir": f"{tmp_path}/", "redis_backup_keep": 3}
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "changed=0 " in play("playbooks/backup.yml", "--check", **where).words
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    done = play("playbooks/backup.yml", **where)
    assert done.returncode == 0, done.words
    left = [path.name for path in backups(tmp_path)]
    (made,) = set(left) - {*ahead, "pixel-before-launch.rdb"}
    assert left == [made, *ahead[5:], "pixel-before-launch.rdb"]
    assert made > backup.name
    assert len(list(tmp_path.glob("pixel-*.sha256"))) == 4
    assert f"{made}: " in done.words
    assert f"Removed: pixel-20200101T000000Z.rdb, {', '.join(ahead[:5])}" in done.words
    assert f"These names are ahead of this clock: {', '.join(ahead[5:])}." in done.words
    checksum = hashlib.sha256((tmp_path / made).read_bytes()).hexdigest()
    assert Path(f"{tmp_path / made}.sha256").read_text().split()[0] == checksum
    done = play("playbooks/restore.yml", "--check", redis_backup_dir=str(tmp_path))
    assert done.returncode != 0
    assert f"the newest backup is unknown: {ahead[5]}" in done.words


def test_a_missing_backup_is_reported_in_one_line(play: Any, tmp_path: Path) -> None:
    done = play("playbooks/restore.yml", backup="1999.rdb", redis_backup_dir=str(tmp_path / "none"))
    assert done.returncode != 0
    assert "No backup matches '1999.rdb'. Nothing was changed." in done.words
    assert "WARNING" not in done.words


def test_a_canvas_that_is_not_empty_is_not_overwritten(backup: Path, play: Any, contents: Any) -> None:
    before = contents()
    done = play("playbooks/restore.yml")
    assert done.returncode != 0
    assert "The canvas on c5 is not empty" in done.words
    assert "-e restore_overwrite=true" in done.words
    assert contents() == before


# Each restore is refused; the reasons are collected, because a run for each would take long.
REFUSED = """
- hosts: redis
  tasks:
    - ansible.builtin.include_tasks: attempt.yml
      loop: {{ names }}
      loop_control: {loop_var: name}
"""
ATTEMPT = """
- block:
    - ansible.builtin.include_role: {name: redis, tasks_from: restore.yml}
      vars: {redis_restore_backup: "{{ name }}", redis_restore_overwrite: true}
    - ansible.builtin.debug: {msg: "REFUSED no"}
  rescue:
    - ansible.builtin.debug: {msg: "REFUSED {{ ansible_failed_result.msg }}"}
"""


def test_invalid_backups_are_refused_and_nothing_changes(
    backup: Path, tmp_path: Path, play: Any, host: Any, contents: Any, state: Path
) -> None:
    data = backup.read_bytes()
    for name in ("unsigned", "several-2", "several-3"):
        with_checksum(tmp_path / f"pixel-{name}.rdb", data)
    Path(f"{tmp_path}/pixel-unsigned.rdb.sha256").unlink()
    with_checksum(tmp_path / "pixel-foreign.rdb", b"This is a letter.")
    with_checksum(tmp_path / "pixel-changed.rdb", data).write_bytes(data[:-1] + b"!")
    messages = {
        "1999": "No backup matches",
        "several": "Several backups match",
        "changed": "was changed after the backup",
        "unsigned": "has no checksum file beside it",
        "foreign": "was not restored to c5: redis-server failed: Wrong signature",
    }
    (state / "refused.yml").write_text(REFUSED.replace("{{ names }}", json.dumps(list(messages))))
    (state / "attempt.yml").write_text(ATTEMPT)
    before, running = contents(), host.service("redis-server").systemd_properties["MainPID"]
    done = play(str(state / "refused.yml"), redis_backup_dir=str(tmp_path))
    assert done.returncode == 0, done.words
    reasons = done.words.split("REFUSED ")[1:]
    assert len(reasons) == len(messages), done.words
    for reason, message in zip(reasons, messages.values(), strict=True):
        assert message in reason
    assert contents() == before
    assert host.service("redis-server").systemd_properties["MainPID"] == running
    assert not host.file("/var/lib/redis/restore").exists


def test_a_restore_restores_every_byte_and_the_append_only_log_stays_enabled(
    backup: Path, play: Any, redis: Any, contents: Any, client: Any, paint: Any, host: Any, former: Any
) -> None:
    paint(77)
    done = play("playbooks/backup.yml")
    assert done.returncode == 0, done.words
    saved = contents()
    paint(78)
    state = '{"state":"read-only","message":"Restoring"}'
    redis(f"$redis set pixel:{{0}}:maintenance '{state}'")
    done = play("playbooks/restore.yml", restore_overwrite="true")
    assert done.returncode == 0, done.words
    # Maintenance goes on, although the backup doesn't contain it.
    assert redis("$redis get pixel:{0}:maintenance") == state
    assert client.ask("/pixel", b"{}")[0] == 503
    redis("$redis del pixel:{0}:maintenance")
    time.sleep(2)
    assert contents() == saved
    assert json.loads(client.ask("/pixel/700/300")[2])["B"] == 77
    # The log contains writes made after the restore; the former data is kept beside it.
    paint(79)
    assert "aof_enabled:1" in redis("$redis info persistence")
    host.run_expect([0], "systemctl kill --signal=KILL redis-server")
    host.run_expect([0], "sleep 3; systemctl is-active redis-server")
    assert json.loads(client.ask("/pixel/700/300")[2])["B"] == 79
    assert len(former()) == 1
    assert not host.file("/var/lib/redis/restore").exists


def test_an_empty_redis_is_restored_while_requests_come_in(
    backup: Path, play: Any, redis: Any, client: Any, former: Any
) -> None:
    """Requests while Redis is stopped are answered 503; the app reconnects without a restart."""
    redis("$redis flushall")
    answers: list[tuple[float, int]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.05):
            started = time.monotonic()
            status = client.ask("/pixel/700/300")[0]
            answers.append((time.monotonic() - started, status))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        played = play("playbooks/restore.yml", backup=str(backup))
        time.sleep(2)
    finally:
        done.set()
        asking.join()
    assert played.returncode == 0, played.words
    assert {status for _, status in answers} == {200, 503}
    assert answers[-1][1] == 200
    assert max(seconds for seconds, _ in answers) < 3
    assert json.loads(client.ask("/pixel/700/300")[2])["B"] == 77
    # There was no former data to keep.
    assert former() == []


def test_a_failed_restore_puts_the_former_data_back(
    backup: Path, play: Any, contents: Any, paint: Any, client: Any, host: Any, former: Any
) -> None:
    paint(80)
    before = contents()
    # A log that Redis refuses, as after a disk error.
    missing = "file missing.rdb seq 1 type b\n"
    done = play("playbooks/restore.yml", restore_overwrite=True, _redis_log_manifest=missing)
    assert done.returncode != 0
    assert "The former data was restored" in done.words, done.words
    assert host.service("redis-server").is_running
    assert contents() == before
    assert former() == []
    assert not host.file("/var/lib/redis/restore").exists
    for _ in range(30):
        if client.ask("/pixel/700/300")[0] == 200:
            break
        time.sleep(0.1)
    paint(81)
