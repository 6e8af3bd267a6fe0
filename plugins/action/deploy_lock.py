"""Take or release the deploy lock; the module of this name changes the file on the host."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]


def this_run() -> dict[str, str]:
    """Return the node, the user and the process of this run."""
    # An action runs in a worker process, whose parent is ansible-playbook.
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return {"node": platform.node(), "user": user, "process": str(os.getppid())}


def is_stale(found: dict[str, str], silence: int, me: dict[str, str], limit: int) -> bool:
    """Tell whether a lock can be replaced: its run has ended, or was silent for too long.

    silence and limit are in seconds. Only a process of this control node can be looked for.
    """
    if silence > limit:
        return True
    is_here = found.get("node") == me["node"] and "process" in found
    return is_here and not Path(f"/proc/{found['process']}").exists()


def refusal(path: str, host: str, found: dict[str, str], minutes: int) -> str:
    """Describe a lock that another run holds, and how to remove it."""
    if found:
        who = f"{found.get('user', 'somebody')} on {found.get('node', 'another machine')}"
        text = (
            f"{who} (process {found.get('process', '?')}) has been deploying since "
            f"{found.get('since', 'just now')}. Wait until that deploy ends."
        )
    else:
        text = (
            f"{path} on {host} doesn't say who is deploying: it is empty or damaged. "
            "Wait until no deploy runs."
        )
    return (
        f"{text} If it has crashed, remove the lock: ansible {host} --become -a 'rm {path}'; "
        f"after {minutes} minutes without progress it expires."
    )


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module once, and again to replace a stale lock."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take or release the lock.

        task_vars are the host's variables. Returns who this run is as `me`, and the time as `at`.
        Fails if another run holds the lock.
        """
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        me = this_run()
        result |= {"changed": False, "me": me, "at": int(time.time())}
        if self._task.check_mode:
            return result
        path = str(self._task.args["path"])
        minutes = int(self._task.args.get("expires", 15))
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        options = {
            "path": path,
            "state": self._task.args.get("state", "taken"),
            "text": json.dumps(me | {"since": since}) + "\n",
        }
        done = self._run(options, task_vars)
        if done.get("taken") is False and is_stale(done["holder"], done["silence"], me, minutes * 60):
            done = self._run(options | {"replaces": done["text"]}, task_vars)
        if done.get("failed") or done.get("unreachable"):
            return result | done
        if done.get("taken") is False:
            host = self._task.delegate_to or str(task_vars["inventory_hostname"])
            result |= {"failed": True, "msg": refusal(path, host, done["holder"], minutes)}
        return result

    def _run(self, options: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        done: dict[str, Any] = self._execute_module(
            module_name="pixel.endpoint.deploy_lock", module_args=options, task_vars=task_vars
        )
        return done
