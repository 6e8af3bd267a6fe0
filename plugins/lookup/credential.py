"""Generate a password at its first use, and keep it in a file of the control node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.loader import lookup_loader  # type: ignore[import-untyped]
from ansible.plugins.lookup import LookupBase  # type: ignore[import-untyped]

DOCUMENTATION = r"""
name: credential
short_description: Generate a password at its first use, and keep it in a file
description:
  - Reads the file on the control node, or creates it with 40 random letters and digits.
  - In check mode no file is created; while there is none, every lookup returns a new random password.
options:
  _terms:
    description: Paths of the files.
    type: list
    elements: path
    required: true
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
redis_app_password: "{{ lookup('pixel.endpoint.credential', inventory_dir ~ '/credentials/redis_app') }}"
"""

RETURN = r"""
_raw:
  description: The passwords.
  type: list
  elements: str
"""


class LookupModule(LookupBase):  # type: ignore[misc]
    """Calls the lookup ansible.builtin.password; in check mode it stores nothing."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **options: Any) -> list[str]:
        """Return the password of each path; variables contain `ansible_check_mode`."""
        is_dry_run = (variables or {}).get("ansible_check_mode", False)
        paths = [path if not is_dry_run or Path(path).exists() else "/dev/null" for path in terms]
        password = lookup_loader.get("ansible.builtin.password", loader=self._loader, templar=self._templar)
        found: list[str] = password.run(paths, variables, length=40, chars=["ascii_letters", "digits"])
        return found
