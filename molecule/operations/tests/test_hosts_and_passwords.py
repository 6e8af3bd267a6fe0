"""Passwords that are replaced, and a host that leaves a group, while clients write."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

testinfra_hosts = ["c5"]

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def writes(client: Any) -> Callable[[], Any]:
    """A context in which four threads write pixels; returns a counter of the statuses answered."""

    @contextmanager
    def write() -> Iterator[Counter[int]]:
        statuses: Counter[int] = Counter()
        done = threading.Event()

        def run() -> None:
            number = 0
            while not done.wait(0.02):
                number = (number + 1) % 256
                body = json.dumps({"x": number, "y": 7, "channel": "G", "value": number})
                statuses[client.ask("/pixel", body.encode())[0]] += 1

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield statuses
        finally:
            done.set()
            for thread in threads:
                thread.join()

    return write


def test_a_redis_password_is_rotated_without_a_failed_write(play: Any, writes: Any) -> None:
    """The new password contains every character that needs quoting somewhere; then change it back."""
    odd = r"""'"quo\ted"\\#%$&{-ü-€-'""" + "x" * 8
    with writes() as statuses:
        assert play("site.yml", "--tags", "redis,pixel_app", redis_app_password=odd).returncode == 0
        assert play("site.yml", "--tags", "redis,pixel_app").returncode == 0
    assert set(statuses) == {200}
    assert statuses[200] > 500


def test_all_passwords_are_replaced_without_a_failed_write(
    play: Any, writes: Any, shell: Any, password: Any, state: Path
) -> None:
    users = ("app", "admin", "monitor")
    former = {user: password(user) for user in users}
    started = shell("systemctl show -P ExecMainStartTimestamp redis-server")
    with writes() as statuses:
        done = play("playbooks/rotate.yml")
    assert done.returncode == 0, done.words
    assert set(statuses) == {200}
    assert statuses[200] > 500
    assert shell("systemctl show -P ExecMainStartTimestamp redis-server") == started
    assert not list((state / "credentials").glob("*.former"))
    for user, name in zip(users, ("pixel", "admin", "monitor"), strict=True):
        assert password(user) != former[user]
        for word, answer in ((former[user], "WRONGPASS"), (password(user), "PONG")):
            ping = f"printf '%s\\n' '{word}' PING | redis-cli -h $(hostname -I) --user {name} --askpass 2>&1"
            assert answer in shell(ping)
    assert play("site.yml").changes() == {"c5": 0, "t2": 0}


def test_a_host_that_leaves_a_group_is_cleaned_up_without_a_failed_write(
    play: Any, writes: Any, shell: Any, tmp_path: Path
) -> None:
    inventory = tmp_path / "smaller"
    shutil.copytree(ROOT / "inventory" / "local", inventory)
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    hosts["pixel_app"]["hosts"].pop("t2")
    (inventory / "hosts.yml").write_text(json.dumps(hosts))
    left = "t2 is not in pixel_app and still has its services"
    try:
        assert left in play("playbooks/status.yml", hosts=str(inventory)).words
        with writes() as statuses:
            done = play("site.yml", "--tags", "nginx_lb,cleanup", hosts=str(inventory), nginx_lb_clusters={})
        assert done.returncode == 0, done.words
        assert "t2 has left pixel_app: its services are stopped and disabled." in done.words
        assert set(statuses) == {200}
        assert "active" not in shell("systemctl is-active pixel.socket pixel.service", on="t2").split()
        assert shell("ls -d /etc/systemd/system/pixel.* /etc/pixel", on="t2") == ""
        assert left not in play("playbooks/status.yml", hosts=str(inventory)).words
    finally:
        assert play("site.yml", "--tags", "pixel_app,nginx_lb").returncode == 0
