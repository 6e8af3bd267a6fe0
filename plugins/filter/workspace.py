"""Filter `workspace`: where files of the control node are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

DOCUMENTATION = """
name: workspace
author: Pixel Endpoint contributors
short_description: Directory for files that roles write on the control node
description:
  - Returns the root of the repository when the given path lies in one.
  - >-
    Returns the current directory when the path lies in an installed collection, which the next
    installation replaces with all that was written there.
positional: _input
options:
  _input:
    description: A path inside the repository or the collection, such as C(role_path) or C(playbook_dir).
    type: path
    required: true
"""

EXAMPLES = """
- name: Show the directory of backups
  ansible.builtin.debug:
    msg: "{{ role_path | pixel.endpoint.workspace }}/backups"
"""

RETURN = """
_value:
  description: Absolute path.
  type: path
"""


def workspace(path: str) -> str:
    """Return the directory for files that roles write on the control node.

    Args:
        path: a path inside the repository or the installed collection

    Returns:
        the nearest parent directory with a galaxy.yml, or the current directory if there is none, as in an
        installed collection
    """
    parents = Path(path).resolve().parents
    return str(next((parent for parent in parents if (parent / "galaxy.yml").is_file()), Path.cwd()))


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the filters by name."""
        return {"workspace": workspace}
