"""The callback plugin that records runs, and the hooks. Scenario default tests the lines on the hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.callback import audit

ROOT = Path(__file__).resolve().parents[1]
CHANGE = {"name": "Change", "ansible.builtin.command": "/bin/true"}
KEEP = {"name": "Keep", "ansible.builtin.command": "/bin/true", "changed_when": False}


class Project:
    """A copy of the plugins as a collection of its own, with one playbook."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("callback", "filter"):
            shutil.copytree(ROOT / "plugins" / name, root / "plugins" / name)
        shutil.copy(ROOT / "galaxy.yml", root)
        place = root / "collections/ansible_collections/pixel"
        place.mkdir(parents=True)
        (place / "endpoint").symlink_to(root)
        (root / "inventory/small").mkdir(parents=True)
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts = {"all": {"hosts": {"a": None, "b": None}, "vars": local}}
        (root / "inventory/small/hosts.yml").write_text(yaml.safe_dump(hosts))
        (root / "playbooks").mkdir()
        self.log = root / "audit/small.jsonl"

    def run(self, tasks: list[dict[str, Any]], *arguments: str) -> subprocess.CompletedProcess[str]:
        play = {"name": "Play", "hosts": "all", "gather_facts": False, "tasks": tasks}
        (self.root / "playbooks/change.yml").write_text(yaml.safe_dump([play]))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {
            "ANSIBLE_COLLECTIONS_PATH": str(self.root / "collections"),
            "ANSIBLE_CALLBACKS_ENABLED": "pixel.endpoint.audit",
            "GITHUB_ACTOR": "alice",
            "SSH_CLIENT": "203.0.113.7 1 22",
        }
        program = Path(sys.prefix, "bin/ansible-playbook")
        command: list[str | Path] = [program, "-i", "inventory/small", "playbooks/change.yml", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_run_that_changes_something_is_one_line_without_secrets(project: Project) -> None:
    arguments = ("--limit", "a", "-e", "host=a", "-e", "redis_app_password=secret")
    done = project.run([CHANGE], *arguments)
    assert done.returncode == 0, done.stdout
    assert "PLAY [Audit]" not in done.stdout
    (line,) = project.lines()
    assert line.pop("seconds") < 60
    assert line.pop("time").endswith("Z")
    assert line.pop("from").endswith("(203.0.113.7)")
    assert line == {
        "who": "alice",
        "commit": "",
        "command": "playbooks/change.yml --limit a -e host=a -e redis_app_password",
        "inventory": "small",
        "release": "",
        "hosts": ["a"],
        "changed": 1,
        "failed": [],
        "result": "ok",
    }
    assert project.log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("tasks", "arguments"),
    [([KEEP], ()), ([CHANGE], ("--check",)), ([CHANGE | {"check_mode": True}], ())],
    ids=["unchanged", "dry run", "dry task"],
)
def test_a_run_that_changes_nothing_leaves_no_line(
    project: Project, tasks: list[dict[str, Any]], arguments: tuple[str, ...]
) -> None:
    assert project.run(tasks, *arguments).returncode == 0
    assert project.lines() == []


def test_a_failure_after_a_change_is_recorded_with_its_hosts(project: Project) -> None:
    fail = {"name": "Fail", "ansible.builtin.fail": {"msg": "x"}, "when": "inventory_hostname == 'b'"}
    assert project.run([CHANGE, fail]).returncode != 0
    assert project.run([fail]).returncode != 0
    (line,) = project.lines()
    assert (line["result"], line["hosts"], line["failed"]) == ("failed", ["a", "b"], ["b"])


def test_a_playbook_of_others_is_not_recorded(project: Project, tmp_path: Path) -> None:
    other = tmp_path.parent / f"{tmp_path.name}-other"
    other.mkdir()
    (project.root / "playbooks").rmdir()
    (project.root / "playbooks").symlink_to(other)
    assert project.run([CHANGE]).returncode == 0
    assert project.lines() == []


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        name = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, capture_output=True, check=True)

    assert audit.commit(tmp_path) == ""
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--message", "One")
    clean = audit.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("b")
    assert audit.commit(tmp_path) == f"{clean}-dirty"


def test_the_operator_is_the_user_before_sudo() -> None:
    assert audit.who({"SUDO_USER": "bob"}) == "bob"
    assert audit.who({"GITHUB_ACTOR": "alice", "SUDO_USER": "runner"}) == "alice"
