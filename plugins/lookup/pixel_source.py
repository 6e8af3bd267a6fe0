"""Ansible lookup: the release name of a source tree."""

from __future__ import annotations

DOCUMENTATION = r"""
name: pixel_source
short_description: Compute the release name of a source tree of the pixel app
description:
  - The name is the version in C(pyproject.toml) and a hash of all files that go into a release, with their
    paths. Equal sources give equal names.
options:
  _terms:
    description: Directories with C(pyproject.toml), C(requirements.txt) and C(src/).
    required: true
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ lookup('pixel.endpoint.pixel_source', 'app') }}"
"""

RETURN = r"""
_raw:
  description: A name for each directory, such as V(1.0.0-0123456789ab).
  type: list
  elements: str
"""

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError  # type: ignore[import-untyped]
from ansible.plugins.lookup import LookupBase  # type: ignore[import-untyped]


def release_name(source: Path) -> str:
    """Return the release name of a source tree.

    Raises:
        OSError: a file can't be read.
        KeyError: pyproject.toml has no version.
    """
    package = [path for path in (source / "src").rglob("*") if path.is_file()]
    files = [
        source / "pyproject.toml",
        source / "requirements.txt",
        *(path for path in package if path.suffix != ".pyc" and ".egg-info" not in str(path)),
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(source).as_posix()
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    version = tomllib.loads((source / "pyproject.toml").read_text())["project"]["version"]
    return f"{version}-{digest.hexdigest()[:12]}"


class LookupModule(LookupBase):  # type: ignore[misc]
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        self.set_options(var_options=variables, direct=kwargs)
        try:
            return [release_name(Path(term)) for term in terms]
        except (OSError, KeyError, ValueError) as error:
            raise AnsibleLookupError(f"no release can be built from {', '.join(terms)}: {error}") from error
