"""Record every run that changed something: one JSON line on the control node and on the hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: audit
type: notification
short_description: Record every run that changed something, here and on the hosts
description:
  - >-
    When a playbook of this collection ends and has changed something, appends one JSON line to
    C(audit/INVENTORY.jsonl) in the workspace, and to C(/var/log/pixel-audit.log) and the journal (tag
    C(pixel-audit)) of the hosts that were changed or failed.
  - >-
    A line has C(time), C(who), C(from), C(commit), C(command), C(inventory), C(release), C(hosts),
    C(changed), C(failed), C(result) and C(seconds). Of extra variables it has the names, and the values of
    those that name hosts, releases and the like.
  - >-
    Dry runs and runs that changed nothing leave no line, and take no time. An interrupted run leaves a line
    on the control node only.
options:
  directory:
    description: Directory of the lines on the control node. The default is C(audit) in the workspace.
    type: path
    ini:
      - {section: callback_audit, key: directory}
    env:
      - {name: PIXEL_AUDIT_DIRECTORY}
author: Pixel Endpoint contributors
requirements:
  - enable in configuration
"""

import atexit
import getpass
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible import context  # type: ignore[import-untyped]
from ansible.executor.task_queue_manager import TaskQueueManager  # type: ignore[import-untyped]
from ansible.playbook.play import Play  # type: ignore[import-untyped]
from ansible.plugins.callback import CallbackBase  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.filter.workspace import workspace

ROOT = Path(__file__).resolve().parents[2]
# Extra variables whose values are recorded. Others may be secrets.
SHOWN = ("action", "backup", "host", "message", "release", "state")
HOST_LOG = "/var/log/pixel-audit.log"
# The line is in standard input, so it needs no quoting.
APPEND = f"umask 077; tee -a {HOST_LOG} | logger --tag pixel-audit"


def who(environment: Mapping[str, str]) -> str:
    """Return the operator: the user of the workflow, the user before sudo, or the user."""
    for name in ("GITHUB_ACTOR", "SUDO_USER"):
        if environment.get(name):
            return environment[name]
    return getpass.getuser()


def origin(environment: Mapping[str, str]) -> str:
    """Return the control node, and the address from which the operator is logged in there."""
    client = environment.get("SSH_CLIENT", "").split(" ")[0]
    return f"{socket.gethostname()} ({client})" if client else socket.gethostname()


def commit(root: Path) -> str:
    """Return the commit of a clone, with `-dirty` if files differ from it; empty outside a clone."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, text=True, capture_output=True, check=False).stdout.strip()
    except OSError:
        return ""


def arguments(command_line: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
    """Return the options of a command without secrets: limit, tags and extra variables."""
    words = []
    for option in ("tags", "skip_tags"):
        chosen = [tag for tag in command_line.get(option) or [] if tag != "all"]
        if chosen:
            words.append(f"--{option.replace('_', '-')} {','.join(sorted(chosen))}")
    if command_line.get("subset"):
        words.append(f"--limit {command_line['subset']}")
    given = [f"-e {name}={value}" if name in SHOWN else f"-e {name}" for name, value in variables.items()]
    return " ".join([*words, *sorted(given)])


def inventory_name(sources: Sequence[str]) -> str:
    """Return the name of the last inventory's directory; `none` for a list of hosts."""
    last = Path(sources[-1]) if sources else Path()
    return (last.name if last.is_dir() else last.parent.name) or "none"


def append(path: Path, line: str) -> None:
    """Append a line to a file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Counts changes while a playbook runs, and records the run at its end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "pixel.endpoint.audit"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._started = time.time()
        self._process = os.getpid()
        self._playbook = Path()
        self._play: Any = None
        self._passwords: dict[str, Any] = {}
        self._changed: dict[str, int] = {}
        self._failed: set[str] = set()
        self._release = ""
        self._is_recorded = False

    def v2_playbook_on_start(self, playbook: Any) -> None:
        self._playbook = Path(playbook._basedir, Path(playbook._file_name).name).resolve()
        atexit.register(self._record_interrupted)

    def set_play_context(self, play_context: Any) -> None:
        """Keep the passwords that the operator typed, for the connection to the hosts at the end."""
        self._passwords = {"conn_pass": play_context.password, "become_pass": play_context.become_pass}

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self._play = play

    def v2_runner_on_ok(self, result: Any) -> None:
        self._note(result)
        if result.result.get("changed") and not result.task_fields.get("check_mode"):
            self._count(result.host.get_name())

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._note(result)
        if not ignore_errors:
            self._failed.add(result.host.get_name())
        # A switch that failed was undone: the host has changed twice.
        if result.task.action.endswith("pixel_release") and result.task.args.get("action") == "switch":
            self._count(result.host.get_name())

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._failed.add(result.host.get_name())

    def v2_playbook_on_stats(self, stats: Any) -> None:
        failed = sorted({*stats.failures, *stats.dark})
        self._record(failed, "failed" if failed else "ok", stats)

    def _count(self, host: str) -> None:
        self._changed[host] = self._changed.get(host, 0) + 1

    def _note(self, result: Any) -> None:
        """Note the release that a host serves."""
        if result.task.action.endswith("pixel_release") and result.result.get("current"):
            self._release = result.result["current"]

    def _record_interrupted(self) -> None:
        # Forked workers of Ansible inherit the registration.
        if os.getpid() == self._process and not self._is_recorded:
            self._record(sorted(self._failed), "interrupted", None)

    def _record(self, failed: list[str], outcome: str, stats: Any) -> None:
        self._is_recorded = True
        is_ours = self._playbook.parent in (ROOT, ROOT / "playbooks")
        if not self._changed or self._play is None or not is_ours:
            return
        manager = self._play.get_variable_manager()
        inventory = inventory_name(manager._inventory._sources or [])
        options = arguments(context.CLIARGS, manager.extra_vars)
        line = json.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
                "who": who(os.environ),
                "from": origin(os.environ),
                "commit": commit(ROOT),
                "command": f"{self._playbook.relative_to(ROOT)} {options}".strip(),
                "inventory": inventory,
                "release": self._release,
                "hosts": sorted(self._changed),
                "changed": sum(self._changed.values()),
                "failed": failed,
                "result": outcome,
                "seconds": round(time.time() - self._started, 1),
            },
            ensure_ascii=False,
        )
        directory = self.get_option("directory") or f"{workspace(str(self._playbook))}/audit"
        append(Path(directory) / f"{inventory}.jsonl", line)
        if stats is not None:
            self._record_on_hosts(
                [name for name in {*self._changed, *failed} if name not in stats.dark], line
            )

    def _record_on_hosts(self, names: list[str], line: str) -> None:
        """Append the line to the hosts' logs by a play of its own. Connections are still open."""
        manager, loader = self._play.get_variable_manager(), self._play.get_loader()
        inventory = manager._inventory
        # The last play may have restricted it to its batch of hosts.
        inventory.remove_restriction()
        hosts = [host for name in names if (host := inventory.get_host(name)) and not is_local(manager, host)]
        if not hosts:
            return
        command = {"argv": ["sh", "-c", APPEND], "stdin": line}
        task = {"name": "Record the run", "ansible.builtin.command": command, "tags": ["always"]}
        play = {"name": "Audit", "hosts": [host.get_name() for host in hosts], "gather_facts": False}
        runner = TaskQueueManager(
            inventory=inventory,
            variable_manager=manager,
            loader=loader,
            passwords=self._passwords,
            run_additional_callbacks=False,
            forks=len(hosts),
        )
        # With a callback that prints nothing, none is loaded.
        silent = CallbackBase()
        silent._init_callback_methods()
        runner._callback_plugins.append(silent)
        try:
            code = runner.run(Play.load(play | {"tasks": [task]}, variable_manager=manager, loader=loader))
        finally:
            runner.cleanup()
        if code != 0:
            self._display.warning(
                f"This run could not be recorded in {HOST_LOG} of all of {', '.join(names)}."
            )


def is_local(manager: Any, host: Any) -> bool:
    """Tell whether a host is the control node, which has the line already."""
    variables = manager.get_vars(host=host, include_hostvars=False)
    return bool(host.get_name() == "localhost" or variables.get("ansible_connection") == "local")
