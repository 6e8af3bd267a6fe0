#!/usr/bin/python
"""The deploy lock: a file on a host of the fleet, which only one run at a time can create."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
module: deploy_lock
short_description: Allow one deploy at a time
description:
  - >-
    The lock is a file on a host of the fleet, because operators may use different control nodes. It names the
    run that holds it in one line of JSON: the control node, the user, the process and the time in UTC.
  - >-
    The action plugin of this name decides whether a lock is replaced: one of a run of this control node that
    has ended, one of this run, and one whose holder was silent for too long.
  - In check mode nothing is done.
options:
  state:
    description: >-
      V(taken) takes the lock, or refreshes it if this run holds it. V(released) removes it if this run holds
      it; a lock that had expired or was lost in a reboot may be another run's by now.
    type: str
    choices: [taken, released]
    default: taken
  path:
    description: Path of the lock, on a tmpfs, so that it does not survive a reboot.
    type: path
    required: true
  expires:
    description: Minutes without progress after which a lock can be replaced.
    type: int
    default: 15
attributes:
  check_mode: {support: full}
  diff_mode: {support: none}
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Take the deploy lock
  pixel.endpoint.deploy_lock:
    path: /run/pixel-deploy.lock
  delegate_to: "{{ groups['redis'] | first }}"
"""

RETURN = r"""
me:
  description: The node, the user and the process of this run.
  returned: always
  type: dict
at:
  description: When this run took, refreshed or released the lock, in seconds of the control node's clock.
  returned: always
  type: int
"""


def holder(text: str) -> dict[str, str]:
    """Return what a lock says; nothing if it is damaged or incomplete."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def is_same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Tell whether two holders are the same run."""
    return all(one.get(key) == other.get(key) for key in ("node", "user", "process"))


def take(path: Path, text: str, replaces: str | None) -> dict[str, Any]:
    """Create the lock, refresh it, or replace one whose text is `replaces`.

    Returns `taken`, and if that is false the other lock's `text`, its `holder`, and for how many seconds it
    was silent.
    """
    for _ in range(3):
        with suppress(FileExistsError), path.open("x") as file:
            file.write(text)
            return {"taken": True}
        try:
            found, changed = path.read_text(), path.stat().st_mtime
            if is_same(holder(found), holder(text)):
                path.touch()
                return {"taken": True}
            if found != replaces:
                silence = max(0, int(time.time() - changed))
                return {"taken": False, "text": found, "holder": holder(found), "silence": silence}
            path.unlink()
        except FileNotFoundError:
            continue
    # Other runs have taken and released it meanwhile.
    return {"taken": False, "text": "", "holder": {}, "silence": 0}


def release(path: Path, text: str) -> None:
    """Remove the lock if the run that writes this text holds it."""
    with suppress(FileNotFoundError):
        if is_same(holder(path.read_text()), holder(text)):
            path.unlink()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["taken", "released"], "default": "taken"},
            "path": {"type": "path", "required": True},
            # From the action plugin: the contents of this run's lock, and those of one that it replaces.
            "text": {"type": "str", "required": True},
            "replaces": {"type": "str"},
        },
    )
    path, text = Path(module.params["path"]), module.params["text"]
    if module.params["state"] == "taken":
        module.exit_json(changed=False, **take(path, text, module.params["replaces"]))
    release(path, text)
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()
