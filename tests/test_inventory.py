"""What the first play says to an inventory that won't do. No host is asked for that."""

from __future__ import annotations

import json
import os
import re
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


MANAGED = {
    "pixel_app": {
        "hosts": {"a": {"private_address": "10.0.0.1"}, "b": {"private_address": "10.0.0.2"}},
        "vars": {"pixel_app_redis_url": "rediss://redis.example:6379/0"},
    },
    "nginx_lb": GOOD["nginx_lb"],
}


def play(
    tmp_path: Path, inventory: dict[str, Any], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    # Plays may ask the hosts; here they don't answer.
    deaf = {"ansible_connection": "local", "ansible_python_interpreter": "/nonexistent"}
    path = tmp_path / "hosts.yml"
    path.write_text(json.dumps(inventory))
    return subprocess.run(
        [
            *(Path(sys.prefix, "bin", "ansible-playbook"), "--inventory", path, *arguments),
            *("--extra-vars", json.dumps(deaf)),
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
        text=True,
        capture_output=True,
        check=False,
    )


def validate(tmp_path: Path, inventory: dict[str, Any]) -> str:
    """The output of the first play alone: hosts of group `all` are not connected to."""
    done = play(tmp_path, inventory, "playbooks/validate.yml")
    return done.stdout.split("PLAY [Validate the hosts]")[0] if done.returncode else done.stdout


def test_a_good_one_passes(tmp_path: Path) -> None:
    assert "fatal" not in validate(tmp_path, GOOD)


def test_a_managed_redis_takes_the_place_of_the_group(tmp_path: Path) -> None:
    assert "fatal" not in validate(tmp_path, MANAGED)
    site = play(tmp_path, MANAGED, "site.yml", "--list-hosts")
    assert site.returncode == 0
    hosts = {name: int(count) for name, count in re.findall(r": (.+?)\tTAGS[^(]*\((\d+)\):", site.stdout)}
    assert hosts["Redis"] == 0
    assert hosts["Prepare the app"] == hosts["Roll the app over"] == 2
    assert hosts["Balancer"] == 1


@pytest.mark.parametrize("playbook", ["backup", "restore"])
def test_backups_of_a_managed_redis_are_its_providers(tmp_path: Path, playbook: str) -> None:
    done = play(tmp_path, MANAGED, f"playbooks/{playbook}.yml")
    assert done.returncode != 0
    assert "its provider makes the backups and restores them" in " ".join(done.stdout.split())


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


def test_a_dry_run_keeps_no_password(tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    told = {
        "ansible.builtin.debug": {
            "msg": "<{{ lookup('credential', '" + str(tmp_path / "new" / "one") + "') }}>"
        }
    }
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [told]}]))

    def password(*arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "ansible",
            "playbook",
            "--inventory=localhost,",
            *arguments,
            str(playbook),
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search("<([A-Za-z0-9]{40})>", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    password("--check")
    assert not (tmp_path / "new").exists()
    kept = password()
    assert (tmp_path / "new" / "one").read_text().strip() == kept
    # What is there is what a dry run has as well.
    assert password("--check") == kept
