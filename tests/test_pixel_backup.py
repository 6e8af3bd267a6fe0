"""pixel-backup, with real Redis servers and a restic repository in moto's S3 on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pixel_backup
import pytest
import yaml
from pixel_backup import Backup, Problem, Repository, Server, Settings, Status

from bench.compare.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
PASSWORD, KEY_ID, KEY = "a-long-password-of-tests", "AKIABACKUP", "a-long-secret-key-of-tests"
SCRIPTS = yaml.safe_load((ROOT / "roles/redis/vars/main.yml").read_text())
BUCKET = "backups"


@dataclass
class Place:
    """A host's directories, its settings, and commands of pixel-backup there."""

    path: Path
    values: dict[str, Any]

    @property
    def settings(self) -> Settings:
        return Settings.read(self.write())

    def write(self, **changes: Any) -> Path:
        file = self.path / "settings.json"
        file.write_text(json.dumps(self.values | changes))
        return file

    def metrics(self) -> dict[str, float]:
        lines = (self.path / "metrics" / "pixel_backup.prom").read_text().splitlines()
        return {name: float(value) for name, value in map(str.split, lines)}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    output = tmp_path_factory.mktemp("moto") / "output"
    with output.open("w") as log:
        command = [f"{sys.prefix}/bin/moto_server", "--host", "127.0.0.1", "--port", str(port)]
        moto = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(200):
            assert moto.poll() is None, output.read_text()
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{url}/moto-api/").close()
                break
            time.sleep(0.1)
        yield url
    finally:
        moto.terminate()
        moto.wait(10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Place:
    path = tmp_path_factory.mktemp("host")
    for name in ("home", "metrics", "redis"):
        (path / name).mkdir()
    values = {
        "repository": f"s3:{s3}/{BUCKET}/fleets",
        "password": PASSWORD,
        "environment": {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": KEY},
        "fleet": "tests",
        "keep": {"hourly": 0, "daily": 2, "weekly": 0, "monthly": 0},
        "log": str(path / "redis" / "appendonlydir"),
        "history": "",
        "scripts": {
            "digests": SCRIPTS["_redis_script_digests"],
            "occupied": SCRIPTS["_redis_script_occupied"].replace(
                "{{ _redis_maintenance_key }}", SCRIPTS["_redis_maintenance_key"]
            ),
        },
        "home": str(path / "home"),
        "metrics": str(path / "metrics"),
        "user": None,
    }
    return Place(path, values)


@pytest.fixture(scope="module")
def redis(place: Place) -> Iterator[Server]:
    """The running Redis, with keys of each type that the app uses."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with Server(place.settings, place.path / "redis", *options) as server:
        server.run("SETRANGE", "pixel:0:0", "1000", "abc")
        server.run("XADD", "pixel:events", "*", "c", "1")
        server.run("SET", "pixel:viewers", "3", "EX", "100")
        # Fields of a hash of this size have a different order in every server.
        for number in range(5):
            server.run("HSET", "pixel:keys", f"name{number}", "x" * 100)
        yield server


@pytest.fixture(scope="module")
def made(place: Place, redis: Server, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    """Make the first backup, with a history; return the commands that were started."""
    started: list[tuple[str, ...]] = []
    start = Settings.start

    def record(self: Settings, *command: str, **options: Any) -> subprocess.Popen[str]:
        started.append(command)
        return start(self, *command, **options)

    history = place.path / "history"
    history.mkdir()
    with contextlib.closing(sqlite3.connect(history / "history.sqlite")) as database:
        database.execute("CREATE TABLE changes (id TEXT)")
        database.commit()
    program = tmp_path_factory.mktemp("bin") / "pixel-history"
    program.write_text(f'#!/bin/sh\n[ "$1" = backup ] && cp {history}/history.sqlite "$2"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "start", record)
        patch.setattr(pixel_backup, "PIXEL_HISTORY", str(program))
        assert pixel_backup.main(["run"], place.write(history=str(history))) == 0
    assert [path.name for path in history.iterdir()] == ["history.sqlite"]
    return started


@pytest.fixture
def fails(place: Place, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, with changed settings; return its message on one line."""

    def run(*arguments: str, **changes: Any) -> str:
        assert pixel_backup.main([*arguments], place.write(**changes)) == 1
        return " ".join(capsys.readouterr().err.split())

    return run


def test_a_backup_is_verified_and_measured(made: Any, place: Place) -> None:
    status = Status.read(place.settings.home)
    assert status.error == ""
    assert status.time == status.verified
    assert abs(status.verified - time.time()) < 120
    assert place.metrics() == {
        "pixel_backup_timestamp_seconds": status.time,
        "pixel_backup_verified_timestamp_seconds": status.time,
        "pixel_backup_size_bytes": status.size,
        "pixel_backup_duration_seconds": status.seconds,
    }
    assert (place.path / "metrics" / "pixel_backup.prom").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in place.settings.home.iterdir()) == ["lock", "status.json"]


def test_no_secret_is_in_a_command(made: list[tuple[str, ...]]) -> None:
    assert {command[0] for command in made} == {"redis-server", "redis-cli", "restic"}
    words = " ".join(word for command in made for word in command)
    assert not [secret for secret in (PASSWORD, KEY_ID, KEY) if secret in words]


def test_the_latest_backup_is_the_canvas(
    made: Any, place: Place, redis: Server, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert pixel_backup.main(["dump", "latest", "canvas.rdb"], place.write()) == 0
    (tmp_path / "canvas.rdb").write_bytes(capfdbinary.readouterr().out)
    with Server(place.settings, tmp_path) as restored:
        assert restored.digests() == redis.digests()
        assert restored.run("GETRANGE", "pixel:0:0", "1000", "-1") == "abc"


def test_a_wrong_password_is_named(made: Any, fails: Any, place: Place) -> None:
    message = fails("run", password="another-long-password")
    assert "redis_backup_password is not the password of the repository s3:http://" in message
    assert Status.read(place.settings.home).error in f"pixel-backup: {message}"


def test_a_backup_that_does_not_exist_is_answered_with_those_that_do(made: Any, fails: Any) -> None:
    message = fails("list", "00000000")
    assert re.search(
        r"no backup matches '00000000'. s3:\S+ has: ID TIME VERIFIED FILES"
        r" [0-9a-f]{8} 20\d\d-\d\d-\d\d \d\d:\d\dZ yes canvas.rdb, history.sqlite$",
        message,
    )


def test_the_backups_of_another_fleet_are_not_restored(made: Any, fails: Any) -> None:
    assert "has: nothing of 'others'" in fails("list", "latest", fleet="others")


def test_an_empty_canvas_does_not_replace_a_backup(
    made: Any, place: Place, tmp_path: Path, fails: Any
) -> None:
    with Server(place.settings, tmp_path, "--appendonly", "yes") as empty:
        # As readiness probes do.
        empty.run("SETRANGE", "pixel:0:0", "100", "\\0")
        empty.run("EXPIRE", "pixel:0:0", "100")
        assert "the canvas is empty, and there are backups of it" in fails(
            "run", log=str(tmp_path / "appendonlydir")
        )


def test_a_damaged_backup_is_not_verified_and_the_next_one_replaces_it(
    made: Any, place: Place, redis: Server, s3: str, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Status.read(place.settings.home)
    login = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=s3, **login)

    def packs() -> set[str]:
        listing = client.list_objects_v2(Bucket=BUCKET, Prefix="fleets/data/")["Contents"]
        return {one["Key"] for one in listing}

    save = Repository.save

    def damage(self: Repository, directory: Path) -> str:
        known = packs()
        snapshot = save(self, directory)
        for key in packs() - known:
            data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            data[: len(data) // 2] = bytes(len(data) // 2)
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
        return snapshot

    redis.run("SETRANGE", "pixel:1:1", "5000", "new")
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "save", damage)
        assert "restic dump failed" in fails("run")
    status = Status.read(place.settings.home)
    assert (status.time > before.time, status.verified) == (True, before.verified)
    assert place.metrics()["pixel_backup_verified_timestamp_seconds"] == before.verified

    redis.run("SETRANGE", "pixel:1:1", "5000", "newer")
    assert pixel_backup.main(["run"], place.write()) == 0
    # Of the three backups of this day, the last is kept.
    [kept] = Repository(place.settings).snapshots()
    assert kept["tags"] == ["pixel", "verified"]


def test_a_restored_canvas_with_other_content_is_not_verified(
    made: Any, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Server(place.settings, other) as server:
        server.run("SETRANGE", "pixel:0:0", "1000", "abd")
        server.save()
    backup = Backup(place.settings, tmp_path)
    backup.take(may_be_empty=False)
    monkeypatch.setattr(
        Repository, "dump", lambda *arguments: shutil.copy(other / "canvas.rdb", arguments[-1].name)
    )
    with pytest.raises(Problem, match=r"differs from the one that was backed up: pixel:0:0, pixel:"):
        backup.verify(Repository(place.settings), "")


def test_a_repository_that_does_not_answer_is_named(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_backup, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}/bucket"
        message = fails("run", repository=f"s3:http://user:secret@{address}")
    assert f"the repository s3:http://{address} didn't answer within 0.5 s: check the address" in message


def test_a_history_that_fails_does_not_keep_the_canvas_from_being_backed_up(
    place: Place, redis: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pixel-history").write_text("#!/bin/sh\necho no release >&2; exit 1\n")
    (tmp_path / "pixel-history").chmod(0o755)
    monkeypatch.setattr(pixel_backup, "PIXEL_HISTORY", str(tmp_path / "pixel-history"))
    backup = Backup(Settings.read(place.write(history=str(tmp_path))), tmp_path)
    backup.take(may_be_empty=False)
    assert str(backup.history_problem) == "pixel-history backup failed: no release"
    assert [path.name for path in backup.files.iterdir()] == ["canvas.rdb"]


def test_a_command_that_fails_is_not_taken_for_a_digest(place: Place, tmp_path: Path) -> None:
    scripts = place.values["scripts"] | {"digests": "return redis.error_reply('no')"}
    with (
        Server(Settings.read(place.write(scripts=scripts)), tmp_path) as server,
        pytest.raises(Problem, match="answered EVAL with an error: "),
    ):
        server.digests()


def test_a_directory_that_is_not_mounted_is_not_filled(
    place: Place, tmp_path: Path, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the disk, there is no directory, or an empty one."""
    values = {"repository": str(tmp_path / "disk"), "home": str(tmp_path)}
    message = fails("run", **values)
    assert f"{tmp_path}/disk is not a directory that user" in message
    assert f"-m 0700 {tmp_path}/disk" in message
    (tmp_path / "disk").mkdir()
    used = Status(repository="")
    Repository(Settings.read(place.write(**values))).open(used)
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    used.write(Settings.read(place.write(**values)))
    assert f"the repository {tmp_path}/disk can't be opened. Can this host reach it" in fails("run", **values)
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(Problem, match=r"has \d+ MB free, and the backup needs \d+ MB: free some"):
        pixel_backup.check_space(free + 1, tmp_path)
    pixel_backup.check_space(0, tmp_path)


def test_two_backups_are_not_made_at_once(place: Place, fails: Any) -> None:
    with pixel_backup.working_directory(place.settings):
        assert "another backup is being made" in fails("run")


def test_a_damaged_log_is_reported(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "appendonlydir"
    log.mkdir()
    settings = Settings.read(place.write(log=str(log)))
    with pytest.raises(Problem, match="has no complete log: does Redis run"):
        Backup(settings, tmp_path).take(may_be_empty=False)
    (log / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    (log / "appendonly.aof.1.incr.aof").write_text("*1\r\nnonsense")
    shutil.rmtree(tmp_path / "files")
    with pytest.raises(Problem, match=r"a second Redis can't load the data: .*Bad file format"):
        Backup(settings, tmp_path).take(may_be_empty=False)


def test_a_second_redis_that_is_killed_needs_more_memory(place: Place, tmp_path: Path) -> None:
    with Server(place.settings, tmp_path) as server:
        server._process.kill()
        server._process.wait()
        with pytest.raises(Problem, match="needs more memory than redis_backup_memory_max"):
            server.run("PING")


def test_a_log_is_copied_as_it_is_at_one_moment(place: Place, tmp_path: Path) -> None:
    """It has all acknowledged transactions, and none in part, while the log is written and rewritten."""
    (tmp_path / "redis").mkdir()
    options = ("--appendonly", "yes", "--appendfsync", "always")
    directory = os.open(tmp_path / "redis", os.O_RDONLY)
    acknowledged, stop = 0, threading.Event()
    with Server(place.settings, tmp_path / "redis", *options) as server:
        server.run("SET", "ballast", "x" * 100_000)

        def write() -> None:
            nonlocal acknowledged
            with socket.socket(socket.AF_UNIX) as connection:
                # The length of a socket's path is limited, that of a directory is not.
                connection.connect(f"/proc/self/fd/{directory}/socket")
                while not stop.is_set():
                    connection.sendall(b"MULTI\r\nINCR a\r\nINCR b\r\nEXEC\r\n")
                    answer = b""
                    while not (found := re.search(rb"\*2\r\n:(\d+)\r\n:\d+\r\n$", answer)):
                        answer += connection.recv(1000)
                    acknowledged = int(found[1])

        def rewrite() -> None:
            while not stop.wait(0.02):
                # One may still be in progress.
                with contextlib.suppress(Problem):
                    server.run("BGREWRITEAOF")

        threads = [threading.Thread(target=write), threading.Thread(target=rewrite)]
        for thread in threads:
            thread.start()
        try:
            settings = Settings.read(place.write(log=str(tmp_path / "redis" / "appendonlydir")))
            for number in range(5):
                work = tmp_path / str(number)
                work.mkdir()
                least = acknowledged
                backup = Backup(settings, work)
                backup.take(may_be_empty=False)
                with Server(settings, backup.files) as copied:
                    counts = copied.run("MGET", "a", "b").splitlines()
                assert counts[0] == counts[1]
                assert int(counts[0]) >= least
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            os.close(directory)
    assert acknowledged > 100
