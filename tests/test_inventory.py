"""What the first play says to an inventory that won't do. No host is asked for that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

GOOD: dict[str, Any] = {
    "redis": {"hosts": {"a": {"private_address": "10.0.0.1"}}},
    "pixel_app": {"hosts": {"a": {}, "b": {"private_address": "10.0.0.2"}}},
    "nginx_lb": {"hosts": {"a": {}}},
}


def validate(tmp_path: Path, inventory: dict[str, Any]) -> str:
    """The output of the first play alone: hosts of group `all` are not connected to."""
    # The second play asks the hosts; here they don't answer.
    deaf = {"ansible_connection": "local", "ansible_python_interpreter": "/nonexistent"}
    path = tmp_path / "hosts.yml"
    path.write_text(json.dumps(inventory))
    done = subprocess.run(
        [
            *(Path(sys.prefix, "bin", "ansible-playbook"), "--inventory", path, "playbooks/validate.yml"),
            *("--extra-vars", json.dumps(deaf)),
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    return done.stdout.split("PLAY [Validate the hosts]")[0] if done.returncode else done.stdout


def test_a_good_one_passes(tmp_path: Path) -> None:
    assert "fatal" not in validate(tmp_path, GOOD)


def test_a_managed_redis_takes_the_place_of_the_group(tmp_path: Path) -> None:
    managed = {name: group for name, group in GOOD.items() if name != "redis"}
    managed["pixel_app"] = {
        "hosts": {"a": {"private_address": "10.0.0.1"}, "b": {"private_address": "10.0.0.2"}},
        "vars": {"pixel_app_redis_url": "rediss://redis.example:6379/0"},
    }
    assert "fatal" not in validate(tmp_path, managed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"redis": None}, "no host in group 'redis'"),
        ({"pixel_app": {"hosts": {}}}, "no host in group 'pixel_app'"),
        ({"nginx_lb": None}, "no host in group 'nginx_lb'"),
        ({"redis": {"hosts": {"a": {}, "b": {}}}}, "Group 'redis' has 2 hosts (a, b)"),
        ({"pixel_app": {"hosts": {"a": {}, "c": {}}}}, "No 'private_address' for c."),
        (
            {"pixel_app": {"hosts": {"a": {}, "b": {"private_address": "b.example"}}}},
            "'b.example' of b is not",
        ),
        (
            {"pixel_app": {"hosts": {"a": {}, "b": {"private_address": "10.0.0.1"}}}},
            "that only this host has",
        ),
    ],
)
def test_a_wrong_one_is_told_what_to_mend(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    inventory = {name: group for name, group in (GOOD | change).items() if group is not None}
    assert says in " ".join(validate(tmp_path, inventory).split())


def test_an_empty_one_is_told_so(tmp_path: Path) -> None:
    assert "no host in group 'redis'" in " ".join(validate(tmp_path, {"all": {}}).split())


def test_the_example_has_all_that_is_needed(tmp_path: Path) -> None:
    # As it is once the passwords have been made.
    shutil.copytree(ROOT / "inventory" / "example", tmp_path / "example")
    (tmp_path / "example" / "credentials").mkdir()
    (tmp_path / "example" / "credentials" / "redis_app").write_text("abcdefgh\n")
    listing = subprocess.run(
        [Path(sys.prefix, "bin", "ansible-inventory"), "--inventory", tmp_path / "example", "--list"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    groups = json.loads(listing.stdout)
    variables = groups["_meta"]["hostvars"]
    for group in GOOD:
        assert groups[group]["hosts"]
        assert all(variables[host]["private_address"] for host in groups[group]["hosts"])
