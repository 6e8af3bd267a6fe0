"""Read the logs of a host; with `follow`, print new lines until the run is interrupted."""

from __future__ import annotations

import datetime
import time
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]
from ansible.utils.display import Display  # type: ignore[import-untyped]

# Seconds between two looks at the logs.
PAUSE = 1.0


def line(host: str, entry: dict[str, Any]) -> str:
    """Format an entry: its time in UTC, host, unit and text."""
    moment = datetime.datetime.fromtimestamp(entry["time"], datetime.UTC)
    stamp = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"
    return f"{stamp} {host} {entry['unit']}: {entry['text']}"


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module of the same name, once or again and again."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read the logs.

        task_vars are the host's variables. Returns the module's result, with the formatted `lines`.
        """
        task_vars = task_vars or {}
        options = dict(self._task.args)
        host = str(task_vars["inventory_hostname"])
        follow = boolean(options.get("follow", False))
        seconds = 0.001 if self._task.check_mode else float(options.get("seconds", 0))
        ends = time.monotonic() + (seconds or float("inf"))
        result: dict[str, Any] = super().run(tmp, task_vars)
        display = Display()
        while True:
            found: dict[str, Any] = self._execute_module(
                module_name="pixel.endpoint.read_logs", module_args=options, task_vars=task_vars
            )
            if found.get("failed") or found.get("unreachable"):
                return result | found
            lines = [line(host, entry) for entry in found["entries"]]
            if not follow:
                return result | {"changed": False, "lines": lines}
            for each in lines:
                display.display(each)
            if time.monotonic() >= ends:
                return result | {"changed": False, "lines": []}
            options["position"] = found["position"]
            time.sleep(PAUSE)
