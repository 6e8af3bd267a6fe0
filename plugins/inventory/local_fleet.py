"""Variables of the fleet of test hosts that fleet/fleet.py has created."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ansible.plugins.inventory import BaseInventoryPlugin  # type: ignore[import-untyped]

DOCUMENTATION = r"""
name: local_fleet
short_description: Variables of the test hosts that C(make up) or Molecule has created
description:
  - >-
    Sets variables of group C(fleet) from the state of the fleet in C(.fleet/<name>/): C(fleet_repository),
    the directory of the repository; C(fleet_state), that of the state; C(fleet_facts), the contents of
    C(fleet.json), empty if there is no fleet; C(fleet_prefix), with which its hosts' names begin for SSH;
    and C(ansible_ssh_common_args).
  - >-
    They are plain values. Ansible evaluates the variables of a connection once per task and host, and a
    lookup in them would be loaded each time.
  - The repository is the closest directory above the inventory that is one, or else that of this plugin.
options:
  plugin:
    description: Name of this plugin.
    type: str
    required: true
    choices: [pixel.endpoint.local_fleet]
  fleet:
    description: Name of the fleet.
    type: str
    default: pixel
    env:
      - name: PIXEL_FLEET
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
# inventory/local/local_fleet.yml
plugin: pixel.endpoint.local_fleet
"""


def repository(inventory: Path) -> Path:
    """Return the root of the repository that contains the inventory, or else this plugin."""
    above = inventory.resolve().parents
    return next(
        (path for path in above if (path / "galaxy.yml").exists()), Path(__file__).resolve().parents[2]
    )


class InventoryModule(BaseInventoryPlugin):  # type: ignore[misc]
    """Reads fleet.json; adds no hosts."""

    NAME = "pixel.endpoint.local_fleet"

    def verify_file(self, path: str) -> bool:
        """Tell whether the file can be one of this plugin."""
        return bool(super().verify_file(path)) and path.endswith("local_fleet.yml")

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Set the variables of group `fleet`."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        root = repository(Path(path))
        # An exported but empty name is no name.
        state = root / ".fleet" / (self.get_option("fleet") or "pixel")
        file = state / "fleet.json"
        facts: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        inventory.add_group("fleet")
        for name, value in {
            "fleet_repository": str(root),
            "fleet_state": str(state),
            "fleet_facts": facts,
            "fleet_prefix": f"{facts.get('name', 'no-fleet')}-",
            "ansible_ssh_common_args": f"-F {shlex.quote(str(state / 'ssh_config'))}",
        }.items():
            inventory.set_variable("fleet", name, value)
