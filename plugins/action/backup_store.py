"""Fetch a backup from a host, store it on the control node, and remove the oldest ones."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]

_TIME = "[0-9]{8}T[0-9]{6}Z"


def checksum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_file(path: Path) -> Path:
    """Return the path of the file with a backup's checksum."""
    return path.with_name(f"{path.name}.sha256")


def of_the_same_kind(directory: Path, name: str) -> list[str]:
    """Return the names of the backups that differ from `name` only in their time, the oldest first."""
    form = re.compile(_TIME.join(re.escape(part) for part in re.split(_TIME, name)))
    return sorted(path.name for path in directory.iterdir() if form.fullmatch(path.name))


def store(partial: Path, directory: Path, name: str, checksum: str) -> None:
    """Give a fetched backup its final name, with its checksum beside it.

    Raises AnsibleActionFail if the file is damaged or the name exists.
    """
    if checksum_of(partial) != checksum:
        raise AnsibleActionFail("The backup was damaged in transit and not kept. Run the playbook again.")
    path = directory / name
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise AnsibleActionFail(
            f"{path} exists and was not replaced: does another run write there? Run the playbook again."
        ) from None
    # Without this file a backup counts as incomplete.
    with checksum_file(path).open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{checksum}  {name}\n")


def remove_oldest(directory: Path, name: str, keep: int) -> list[str]:
    """Remove the oldest backups of this kind so that `keep` remain with the new one; return their names."""
    others = [other for other in of_the_same_kind(directory, name) if other != name]
    spare = others[: max(0, len(others) - keep + 1)]
    for other in spare:
        for path in (directory / other, checksum_file(directory / other)):
            path.unlink(missing_ok=True)
    return spare


class ActionModule(ActionBase):  # type: ignore[misc]
    """Copies one file from the host; everything else happens on the control node."""

    _supports_check_mode = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Store the backup. Raises AnsibleActionFail if it is damaged or its name exists."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        option = self._task.args
        directory, name = Path(option["directory"]).expanduser(), str(option["name"])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The directory is private, and on the same file system as the final name.
        with tempfile.TemporaryDirectory(prefix=".partial.", dir=directory) as private:
            partial = Path(private, name)
            self._connection.fetch_file(str(option["src"]), str(partial))
            partial.chmod(0o600)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            store(partial, directory, name, str(option["checksum"]))
        removed = remove_oldest(directory, name, int(option["keep"]))
        return result | {
            "changed": True,
            "path": str(directory / name),
            "size": (directory / name).stat().st_size,
            "removed": removed,
            "ahead": [other for other in of_the_same_kind(directory, name) if other > name],
        }
