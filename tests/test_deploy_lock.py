"""deploy_lock allows one deploy at a time."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ansible_collections.pixel.endpoint.plugins.action import deploy_lock as action
from ansible_collections.pixel.endpoint.plugins.modules import deploy_lock as module

ME = {"node": "here", "user": "ann", "process": "1", "since": "2026-01-01T00:00:00Z"}
# A process that can't exist.
ENDED = "99999999"


def other(**changes: str) -> str:
    return json.dumps(
        {"node": "there", "user": "bob", "process": "7", "since": "2026-01-01T00:00:00Z"} | changes
    )


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def deploy(lock: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the action, whose module works on the lock of this test."""
    monkeypatch.setattr(platform, "node", lambda: "here")

    def run(check_mode: bool = False, **arguments: Any) -> dict[str, Any]:
        task = SimpleNamespace(
            args={"path": str(lock)} | arguments,
            check_mode=check_mode,
            async_val=0,
            diff=False,
            delegate_to="c5",
        )
        plugin = action.ActionModule(task, Mock(), Mock(), Mock(), Mock(), Mock())

        def on_host(
            module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]
        ) -> dict[str, Any]:
            if module_args["state"] == "released":
                module.release(lock, module_args["text"])
                return {"changed": False}
            return module.take(lock, module_args["text"], module_args.get("replaces"))

        plugin._execute_module = on_host
        result: dict[str, Any] = plugin.run(task_vars={"inventory_hostname": "t2"})
        return result

    return run


def test_a_free_lock_is_taken_and_released(deploy: Any, lock: Path) -> None:
    taken = deploy()
    assert "failed" not in taken
    assert not taken["changed"]
    assert abs(taken["at"] - time.time()) < 5
    held = json.loads(lock.read_text())
    assert held == taken["me"] | {"since": held["since"]}
    assert (held["node"], held["process"]) == ("here", str(os.getppid()))
    assert "failed" not in deploy(state="released")
    assert not lock.exists()


def test_the_lock_of_this_run_is_refreshed(deploy: Any, lock: Path) -> None:
    deploy()
    os.utime(lock, (1, 1))
    text = lock.read_text()
    assert "failed" not in deploy()
    assert lock.read_text() == text
    assert time.time() - lock.stat().st_mtime < 60


@pytest.mark.parametrize("process", ["7", ENDED])
def test_the_lock_of_another_node_is_respected(deploy: Any, lock: Path, process: str) -> None:
    lock.write_text(other(process=process))
    refused = deploy()
    assert refused["failed"]
    assert (
        f"bob on there (process {process}) has been deploying since 2026-01-01T00:00:00Z." in refused["msg"]
    )
    assert f"ansible c5 --become -a 'rm {lock}'; after 15 minutes without progress" in refused["msg"]
    deploy(state="released")
    assert lock.read_text() == other(process=process)


def test_the_lock_of_a_run_of_this_node_is_respected_while_it_runs(deploy: Any, lock: Path) -> None:
    lock.write_text(other(node="here", process=str(os.getpid())))
    assert deploy()["failed"]
    lock.write_text(other(node="here", process=ENDED))
    assert "failed" not in deploy()
    assert json.loads(lock.read_text())["process"] == str(os.getppid())


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_lock_is_respected_until_it_expires(deploy: Any, lock: Path, text: str) -> None:
    lock.write_text(text)
    assert f"{lock} on c5 doesn't say who is deploying: it is empty or damaged." in deploy(expires=20)["msg"]
    os.utime(lock, (time.time() - 19 * 60,) * 2)
    assert deploy(expires=20)["failed"]
    os.utime(lock, (time.time() - 21 * 60,) * 2)
    assert "failed" not in deploy(expires=20)


def test_a_lock_that_another_run_has_replaced_meanwhile_is_respected(lock: Path) -> None:
    lock.write_text(other(process="8"))
    found = module.take(lock, json.dumps(ME), replaces=other())
    assert (found["taken"], found["holder"]["process"]) == (False, "8")


def test_a_dry_run_does_nothing(deploy: Any, lock: Path) -> None:
    assert deploy(check_mode=True)["me"]["node"] == "here"
    assert not lock.exists()
