"""Backups in a repository (debian12: S3, debian13: SFTP), and the loss of all hosts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

KEY = "a-long-secret-key-of-tests"
# The S3 server of an earlier run of these tests is gone; a host remembers that it was used.
FILL = """
rm -f /var/lib/pixel-backup/status.json
$redis setrange "pixel:{0}:tile:0:0" 1000 canvas >/dev/null
for number in 1 2 3 4 5 6 7 8 9; do
  $redis hset "pixel:{0}:keys" $number "$(printf '%080d' $number)" >/dev/null
done
"""
DIGESTS = """
$redis getrange "pixel:{0}:tile:0:0" 1000 -1
$redis hgetall "pixel:{0}:keys" | paste - - | sort
"""
# The packages stay, to save time.
WIPE = """
systemctl stop pixel-backup.timer redis-server
rm -rf /var/lib/redis/* /etc/redis/* /var/lib/pixel-backup /etc/pixel-backup.json /usr/local/sbin/pixel-backup
rm -rf /etc/systemd/system/pixel-backup.* /etc/systemd/system/redis-server.service.d
userdel pixel-backup
"""


@pytest.fixture(scope="module")
def everywhere(state: Path, fleet: dict[str, Any], password: Any) -> Callable[[str], dict[str, str]]:
    """Run a shell script, in which `$redis` is redis-cli as the admin user, on all hosts at once."""

    def run(script: str) -> dict[str, str]:
        def on(name: str) -> str:
            address = fleet["hosts"][name]["address"]
            login = f"export REDISCLI_AUTH={password('admin')}; redis='redis-cli -h {address} --user admin'"
            ssh = ["ssh", "-F", str(state / "ssh_config"), name, "sudo sh -s 2>&1"]
            return subprocess.run(ssh, input=f"{login}\n{script}", text=True, capture_output=True).stdout

        with ThreadPoolExecutor() as pool:
            return dict(zip(fleet["hosts"], pool.map(on, fleet["hosts"]), strict=True))

    return run


@pytest.fixture(scope="module")
def s3(fleet: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The S3 server of debian12, at an address of this machine that the hosts reach."""
    with (tmp_path_factory.mktemp("moto") / "output").open("w") as output:
        command = [f"{sys.prefix}/bin/moto_server", "--host", fleet["gateway"], "--port", "9000"]
        moto = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    yield
    moto.terminate()
    moto.wait(10)


@pytest.fixture(scope="module")
def backups(s3: None, everywhere: Any) -> dict[str, str]:
    """Fill each Redis and back it up; return its keys."""
    # restic tries again until the server answers.
    started = everywhere(f"{FILL}\nsystemctl start pixel-backup && echo started")
    assert {text.strip() for text in started.values()} == {"started"}, everywhere(
        "journalctl -u pixel-backup"
    )
    kept: dict[str, str] = everywhere(DIGESTS)
    assert all(text.startswith("canvas\n") and text.count("\n") == 10 for text in kept.values()), kept
    return kept


def test_each_host_has_a_verified_backup(backups: Any, everywhere: Any) -> None:
    for text in everywhere("pixel-backup status; pixel-backup list").values():
        status, _, row, *_ = text.splitlines()
        assert (json.loads(status)["error"], json.loads(status)["verified"] > 0) == ("", True)
        assert re.fullmatch(r"[0-9a-f]{8}  20\d\d-\d\d-\d\d \d\d:\d\dZ  yes       canvas.rdb", row)


def test_secrets_are_in_files_of_their_owners_only(backups: Any, everywhere: Any, state: Path) -> None:
    script = """
        home=/var/lib/pixel-backup
        stat -c '%n %U %a' /etc/pixel-backup.json $home $home/.ssh/id_ed25519 2>/dev/null
        systemctl show pixel-backup.service pixel-backup.timer
        systemctl cat pixel-backup.service
        journalctl --no-pager
        """
    found = everywhere(script)
    password = (state / "credentials" / "redis_backup").read_text().strip()
    for text in found.values():
        assert "/etc/pixel-backup.json root 600\n/var/lib/pixel-backup pixel-backup 700\n" in text
        assert not [secret for secret in (password, KEY, "PRIVATE KEY") if secret in text]
    assert "/var/lib/pixel-backup/.ssh/id_ed25519 pixel-backup 600" in found["debian13"]


def test_the_backup_is_scheduled_sandboxed_and_of_low_priority(backups: Any, everywhere: Any) -> None:
    script = """
        systemctl is-enabled pixel-backup.timer
        systemctl show -P TimersCalendar pixel-backup.timer
        systemctl show -P Nice pixel-backup.service
        systemd-analyze security pixel-backup.service | tail -n 1
        """
    for text in everywhere(script).values():
        state, calendar, nice, rating = text.strip().splitlines()
        assert (state, nice) == ("enabled", "19")
        assert calendar.startswith("{ OnCalendar=*-*-* 03:00:00 ;")
        assert float(rating.split(":")[1].split()[0]) <= 3.0


def test_lost_hosts_are_restored_from_the_repository(
    backups: dict[str, str], everywhere: Any, play: Any, state: Path
) -> None:
    everywhere(WIPE)
    roles = [
        {"ansible.builtin.include_role": {"name": "redis"} | part}
        for part in ({}, {"tasks_from": "restore.yml"})
    ]
    (state / "restore.yml").write_text(json.dumps([{"hosts": "redis", "tasks": roles}]))
    done = play(str(state / "restore.yml"), redis_restore_backup="latest")
    assert done.returncode == 0, done.words
    assert "keys are identical to the backup's. The canvas was empty before." in done.words
    assert everywhere(DIGESTS) == backups
