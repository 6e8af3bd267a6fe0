"""Role redis from an installed collection."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLAY = """
- name: Redis from the installed collection
  hosts: redis
  roles:
    - role: pixel.endpoint.redis
"""


def test_an_installed_collection_converges_to_the_same_state(inventory: str, tmp_path: Path) -> None:
    collections = tmp_path / "collections"
    install = ["collection", "install", "--force", str(ROOT), "-p", str(collections)]
    subprocess.run(["ansible-galaxy", *install], check=True)
    (tmp_path / "play.yml").write_text(PLAY)
    where = {"ANSIBLE_COLLECTIONS_PATH": str(collections), "ANSIBLE_ROLES_PATH": str(tmp_path)}
    done = subprocess.run(
        ["ansible-playbook", "--inventory", ROOT / inventory, tmp_path / "play.yml"],
        cwd=tmp_path,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")} | where,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    recap = done.stdout.partition("PLAY RECAP")[2]
    assert recap.count("changed=0") == recap.count("unreachable=0") == 2, done.stdout
