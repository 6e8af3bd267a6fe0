"""The inventory plugin gives the local fleet's variables as plain values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def variables(inventory: Path, fleet: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ansible", "inventory", f"--inventory={inventory}", "--host=c5"]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PIXEL_FLEET": fleet}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_fleet_is_found_in_the_repository_of_the_inventory(tmp_path: Path) -> None:
    """An exported but empty name is no name. Paths with spaces are quoted."""
    repository = tmp_path / "a repository"
    inventory, state = repository / "inventory", repository / ".fleet" / "pixel"
    inventory.mkdir(parents=True)
    state.mkdir(parents=True)
    (repository / "galaxy.yml").touch()
    facts = {"name": "pixel", "hosts": {"c5": {"address": "172.29.0.10"}}}
    (state / "fleet.json").write_text(json.dumps(facts))
    (inventory / "hosts.yml").write_text("fleet: {hosts: {c5: }}\n")
    (inventory / "local_fleet.yml").write_text((ROOT / "inventory/local/local_fleet.yml").read_text())
    found = variables(inventory, "")
    assert found["fleet_repository"] == str(repository)
    assert found["fleet_state"] == str(state)
    assert found["fleet_facts"] == facts
    assert found["fleet_prefix"] == "pixel-"
    assert found["ansible_ssh_common_args"] == f"-F '{state}/ssh_config'"


def test_without_a_fleet_its_facts_are_empty() -> None:
    found = variables(ROOT / "inventory" / "local", "none")
    assert found["fleet_facts"] == {}
    assert found["fleet_prefix"] == "no-fleet-"
    assert found["fleet_state"] == str(ROOT / ".fleet" / "none")
