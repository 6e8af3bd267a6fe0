#!/usr/bin/python
"""Enable and start, or disable and stop, a set of systemd units in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
module: unit_set
short_description: Enable and start, or disable and stop, a set of systemd units in one run
description:
  - >-
    One run replaces a loop of M(ansible.builtin.systemd_service) with C(enabled) and C(state), and the
    handlers that restart or reload the units. systemd is asked once for all units, and only those that
    differ are changed.
  - >-
    The times of the files on the host decide about a restart, not the changes of this run: if a run is
    interrupted between the write of a file and the restart, the next run restarts the unit.
  - systemd is reloaded if the configuration of a unit has changed, and before a start or restart.
options:
  names:
    description: Names of the units with their suffix.
    type: list
    elements: str
    required: true
  state:
    description: >-
      V(started) enables and starts the units. V(stopped) disables and stops them. A unit that does not exist
      counts as stopped; in check mode with V(started) it counts as changed.
    type: str
    choices: [started, stopped]
    default: started
  restart_on:
    description: >-
      Files that a unit reads when it starts, by the name of the unit. The unit is restarted if it was started
      before one of them was last modified. For a timer or a socket, files of its service may be among them.
      Units that are not in O(names) are ignored.
    type: dict
    default: {}
  reload_on:
    description: >-
      Files that a unit reads when it starts and when it is reloaded, by the name of the unit. The unit is
      reloaded if its last start and reload were before one of them was last modified. Units that are not in
      O(names) are ignored.
    type: dict
    default: {}
  changed_paths:
    description: >-
      The return value C(changed_paths) of M(pixel.endpoint.file_set). Only used in check mode, in which these
      files were not written.
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Enable and start the service, and restart or reload it if its files are newer
  unit_set:
    names: [example.service, example-cleanup.timer]
    restart_on:
      example.service: [/etc/default/example, /etc/systemd/system/example.service.d/own.conf]
    reload_on:
      example.service: [/etc/example/example.conf]
    changed_paths: "{{ __example_files.changed_paths }}"
"""

RETURN = r"""
changed_units:
  description: Units that changed, in their order.
  returned: always
  type: list
  elements: str
"""

PROPERTIES = (
    *("Id", "LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload"),
    *("InactiveExitTimestampMonotonic", "StateChangeTimestampMonotonic"),
)
# In the order in which systemctl is asked for them.
VERBS = ("disable", "enable", "start", "stop", "restart", "reload")
ENABLED = {"enabled", "enabled-runtime", "static", "indirect", "generated", "alias"}
RUNNING = {"active", "reloading", "activating"}


def parse(text: str) -> list[dict[str, str]]:
    """Parse the output of `systemctl show`: one property a line, an empty line between units."""
    return [
        dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for block in text.strip().split("\n\n")
        if block
    ]


def differences(unit: dict[str, str], state: str) -> list[str]:
    """Return the systemctl commands that bring a unit into a state.

    Raises LookupError if the unit does not exist or is masked.
    """
    there = unit["LoadState"] != "not-found"
    enabled = unit["UnitFileState"] in ENABLED
    running = unit["ActiveState"] in RUNNING
    if state == "stopped":
        return ["disable"] * (there and unit["UnitFileState"].startswith("enabled")) + ["stop"] * running
    if not there:
        raise LookupError(f"systemd has no unit {unit['Id']}")
    if unit["LoadState"] == "masked":
        raise LookupError(f"unit {unit['Id']} is masked")
    return ["enable"] * (not enabled) + ["start"] * (not running)


def newer(paths: Iterable[str], microseconds: str) -> list[str]:
    """Return the files that were modified after a moment of the monotonic clock.

    Files from the future, written before the clock was corrected, are left out: a restart wouldn't help.
    """
    now = time.time()
    moment = now - time.monotonic() + int(microseconds) / 1e6
    return [path for path in paths if os.path.exists(path) and moment < os.path.getmtime(path) <= now]


def outdated(
    name: str, unit: dict[str, str], option: dict[str, Any], check_mode: bool
) -> tuple[list[str], list[str]]:
    """Return the systemctl command that a running unit needs, and the files that are the reason."""
    for command, since in (("restart", "InactiveExitTimestamp"), ("reload", "StateChangeTimestamp")):
        paths = option[f"{command}_on"].get(name, [])
        unwritten = [path for path in paths if path in option["changed_paths"]] if check_mode else []
        if files := sorted({*newer(paths, unit[f"{since}Monotonic"]), *unwritten}):
            return [command], files
    return [], []


def systemctl(module: AnsibleModule, *arguments: str) -> str:
    """Run systemctl; fail the module if it fails."""
    code, output, errors = module.run_command(["systemctl", *arguments])
    if code != 0:
        module.fail_json(msg=f"systemctl {' '.join(arguments)}: {errors.strip() or output.strip()}")
    return str(output)


def show(module: AnsibleModule, names: list[str]) -> list[dict[str, str]]:
    """Return the properties of the units, in their order."""
    if not names:
        return []
    return parse(systemctl(module, "show", f"--property={','.join(PROPERTIES)}", "--", *names))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "restart_on": {"type": "dict", "default": {}},
            "reload_on": {"type": "dict", "default": {}},
            "changed_paths": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    names: list[str] = module.params["names"]
    state: str = module.params["state"]
    before: dict[str, str] = {}
    units = show(module, names)
    unread = [name for name, unit in zip(names, units, strict=True) if unit["NeedDaemonReload"] == "yes"]
    # systemd doesn't know a new unit file before its reload.
    if not module.check_mode and (unread or any(unit["LoadState"] == "not-found" for unit in units)):
        systemctl(module, "daemon-reload")
        units = show(module, names)
    wanted: dict[str, list[str]] = {verb: [] for verb in VERBS}
    for name, unit in zip(names, units, strict=True):
        reasons = ["configuration not read"] if name in unread else []
        try:
            commands = differences(unit, state)
        except LookupError as error:
            if not module.check_mode:
                module.fail_json(msg=str(error))
            commands = ["enable", "start"]
        if state == "started" and unit["ActiveState"] in RUNNING:
            verbs, files = outdated(name, unit, module.params, module.check_mode)
            # It may have been started after its files were written, and without them.
            commands += ["restart"] if name in unread and name in module.params["restart_on"] else verbs
            reasons += [f"older than {file}" for file in files]
        if commands or reasons:
            before[name] = ", ".join([unit["UnitFileState"] or "absent", unit["ActiveState"], *reasons])
        for command in commands:
            wanted[command].append(name)
    if not module.check_mode:
        # systemd doesn't look for a unit's new drop-in directory before.
        if wanted["start"] or wanted["restart"]:
            systemctl(module, "daemon-reload")
        for command, chosen in wanted.items():
            if chosen:
                systemctl(module, command, "--", *chosen)
    target = "enabled, active" if state == "started" else "disabled, inactive"
    module.exit_json(
        changed=bool(before),
        changed_units=list(before),
        diff={
            "before": "".join(f"{name}: {text}\n" for name, text in before.items()),
            "after": "".join(f"{name}: {target}\n" for name in before),
        },
    )


if __name__ == "__main__":
    main()
