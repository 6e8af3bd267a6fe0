"""Manual changes on a host: a dry run shows them, an ordinary run repairs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# The repair does not depend on the Debian release, so test one.
testinfra_hosts = ["debian12"]


@pytest.fixture
def run(play: Any, host: Any) -> Callable[..., Any]:
    return lambda *arguments: play("playbooks/redis.yml", "--limit", host.backend.hostname, *arguments)


def test_files_and_services_are_repaired(host: Any, shell: Any, run: Callable[..., Any]) -> None:
    before = host.file("/etc/redis/redis.conf").content_string
    shell(
        "echo 'maxclients 5' >>/etc/redis/redis.conf; chmod 0666 /etc/redis/users.acl;"
        " rm /etc/sysctl.d/60-redis.conf; chown redis /usr/local/sbin/redis-trim-log;"
        " systemctl disable --now redis-server"
    )
    shown = run("--check", "--diff")
    # Changed: the set of files, the two handlers that it notifies, and the service.
    assert shown.changes() == {"debian12": 4}
    for part in (
        "-maxclients 5",
        "-mode: 0666",
        "+++ after: /etc/sysctl.d/60-redis.conf",
        "+++ after: /usr/local/sbin/redis-trim-log",
        "TASK [pixel.endpoint.redis : Start and enable Redis]",
    ):
        assert part in shown.stdout, shown.stdout
    # The diff does not show users.acl, which is secret.
    assert "user default" not in shown.stdout
    assert host.file("/etc/redis/redis.conf").contains("maxclients 5")
    assert not host.service("redis-server").is_running

    done = run()
    assert done.changes()["debian12"] > 0
    # Several changed files notify the handler; it runs once.
    assert done.stdout.count("RUNNING HANDLER [pixel.endpoint.redis : Restart Redis]") == 1
    assert host.file("/etc/redis/redis.conf").content_string == before
    assert host.file("/etc/redis/users.acl").mode == 0o640
    assert host.file("/etc/sysctl.d/60-redis.conf").exists
    assert host.file("/usr/local/sbin/redis-trim-log").user == "root"
    assert host.service("redis-server").is_running
    assert host.service("redis-server").is_enabled
    assert run().changes() == {"debian12": 0}


HOLD = """
import fcntl, time
held = [open(path, "w") for path in ("/var/lib/apt/lists/lock", "/var/lib/dpkg/lock-frontend")]
for file in held: fcntl.lockf(file, fcntl.LOCK_EX)
time.sleep(20)
"""


def test_a_removed_package_is_installed_again(host: Any, shell: Any, run: Callable[..., Any]) -> None:
    """Also while another process holds apt's locks, as at a first boot."""
    shell("DEBIAN_FRONTEND=noninteractive apt-get remove --yes redis-server")
    assert not host.package("redis-server").is_installed
    shown = run("--check")
    assert shown.changes() == {"debian12": 1}
    assert not host.package("redis-server").is_installed
    # Lists that are too old have to be read again.
    shell("touch -d '1 day ago' /var/lib/apt/lists /var/lib/apt/periodic/update-success-stamp")
    shell(f"cat >/run/hold.py <<'END'\n{HOLD}END\nsystemd-run --collect --unit=hold python3 /run/hold.py")
    done = run()
    assert done.returncode == 0, done.words
    assert host.package("redis-server").is_installed
    assert host.service("redis-server").is_running
    assert run().changes() == {"debian12": 0}
