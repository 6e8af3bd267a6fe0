#!/usr/bin/python
"""Enable and start, or disable and stop, a set of systemd units in one run."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
module: unit_set
short_description: Enable and start, or disable and stop, a set of systemd units in one run
description:
  - >-
    One run replaces a loop of M(ansible.builtin.systemd_service) with C(enabled) and C(state). The state of
    all units is read at once, and only units that differ are changed.
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
  daemon_reload:
    description: Make systemd reload its unit files first.
    type: bool
    default: false
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Enable and start the exporters
  pixel.endpoint.unit_set:
    names: [prometheus-node-exporter.service, prometheus-nginx-exporter.service]
"""

RETURN = r"""
changed_units:
  description: Units that changed, in their order.
  returned: always
  type: list
  elements: str
"""

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


def systemctl(module: AnsibleModule, *arguments: str) -> str:
    """Run systemctl; fail the module if it fails."""
    code, output, errors = module.run_command(["systemctl", *arguments])
    if code != 0:
        module.fail_json(msg=f"systemctl {' '.join(arguments)}: {errors.strip() or output.strip()}")
    return str(output)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "daemon_reload": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    names: list[str] = module.params["names"]
    state: str = module.params["state"]
    if module.params["daemon_reload"] and not module.check_mode:
        systemctl(module, "daemon-reload")
    wanted: dict[str, list[str]] = {"disable": [], "enable": [], "start": [], "stop": []}
    before: dict[str, Any] = {}
    properties = "--property=Id,LoadState,ActiveState,UnitFileState"
    units = parse(systemctl(module, "show", properties, "--", *names)) if names else []
    for name, unit in zip(names, units, strict=True):
        try:
            commands = differences(unit, state)
        except LookupError as error:
            if not module.check_mode:
                module.fail_json(msg=str(error))
            commands = ["enable", "start"]
        if commands:
            before[name] = f"{unit['UnitFileState'] or 'absent'}, {unit['ActiveState']}"
        for command in commands:
            wanted[command].append(name)
    if not module.check_mode:
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
