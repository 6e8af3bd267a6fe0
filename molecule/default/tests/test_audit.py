"""Hooks of a deploy, and the lines that a run leaves on the hosts and on the control node."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

testinfra_hosts = ["c5"]

ROOT = Path(__file__).resolve().parents[3]
HOOKS = ROOT / "hooks"
LOG = "/var/log/pixel-audit.log"


@pytest.fixture
def hook() -> Iterator[Callable[[str, str], None]]:
    """Return a function that installs a hook; an operator's own hooks must not run in tests."""
    names = ("pre-deploy", "post-deploy")
    assert not [name for name in names if (HOOKS / name).exists()]

    def install(name: str, script: str) -> None:
        (HOOKS / name).write_text(f"#!/bin/sh\n{script}\n")
        (HOOKS / name).chmod(0o755)

    yield install
    for name in names:
        (HOOKS / name).unlink(missing_ok=True)


def test_a_failing_hook_stops_a_deploy_before_anything_is_changed(play: Any, shell: Any, hook: Any) -> None:
    hook("pre-deploy", 'echo "not on a Friday" >&2; exit 3')
    hook("post-deploy", "exit 1")
    before = shell(f"cat {LOG}")
    done = play("playbooks/pixel_app.yml", pixel_app_log_level="debug")
    assert done.returncode != 0
    assert "refused release" in done.words
    assert "not on a Friday" in done.words
    assert not [count for count in range(1, 9) if f"changed={count}" in done.stdout]
    for host in ("c5", "t2"):
        assert shell("ls -d /etc/pixel/staged /run/pixel-deploy.lock", on=host) == ""
    # Nothing would change: the hook does not run.
    assert play("playbooks/pixel_app.yml").changes() == {"c5": 0, "t2": 0}
    assert shell(f"cat {LOG}") == before


def test_a_deploy_runs_its_hooks_and_is_recorded(play: Any, shell: Any, hook: Any, tmp_path: Path) -> None:
    for name in ("pre-deploy", "post-deploy"):
        hook(name, f"env | grep ^PIXEL_ | sort >{tmp_path}/{name}")
    release = shell("basename $(readlink /opt/pixel/current)").strip()
    try:
        assert play("playbooks/pixel_app.yml", pixel_app_log_level="debug").returncode == 0
        hooked = {
            name: dict(line.split("=", 1) for line in (tmp_path / name).read_text().splitlines())
            for name in ("pre-deploy", "post-deploy")
        }
    finally:
        assert play("playbooks/pixel_app.yml").returncode == 0
    for name, result in (("pre-deploy", ""), ("post-deploy", "ok")):
        found = hooked[name]
        expected = {
            "PIXEL_HOOK": name,
            "PIXEL_COMMAND": "deploy",
            "PIXEL_INVENTORY": "local",
            "PIXEL_HOSTS": "c5,t2",
            "PIXEL_RELEASE": release,
            "PIXEL_FORMER_RELEASE": release,
            "PIXEL_RESULT": result,
        }
        assert found | expected == found

    first, second = (json.loads(line) for line in shell(f"tail -2 {LOG}").splitlines())
    assert first["command"] == "playbooks/pixel_app.yml -e pixel_app_log_level"
    assert (first["release"], first["hosts"], first["result"]) == (release, ["c5", "t2"], "ok")
    assert second["command"] == "playbooks/pixel_app.yml"
    own = (ROOT / "audit/local.jsonl").read_text().splitlines()[-2:]
    assert [json.loads(line) for line in own] == [first, second]
    for host in ("c5", "t2"):
        assert shell(f"stat -c '%U %a' {LOG}", on=host) == "root 600\n"
        assert json.loads(shell("journalctl -t pixel-audit -o cat -n 1", on=host)) == second
    shown = play("playbooks/audit.yml", lines=2)
    assert shown.changes() == {"c5": 0, "t2": 0}
    assert "playbooks/pixel_app.yml -e pixel_app_log_level" in shown.words
