"""backup_store stores fetched backups completely or not at all, and removes only the oldest of its own."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ansible.errors import AnsibleActionFail  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.action import backup_store as plugin

NAME = "pixel-20260601T120000Z.rdb"


def run(tmp_path: Path, contents: bytes = b"canvas", fetched: bytes | None = None, **changes: Any) -> Any:
    """Store a backup with these contents, which arrive as `fetched`, in the directory `backups`."""
    source = tmp_path / "snapshot"
    source.write_bytes(contents if fetched is None else fetched)
    arguments = {
        "src": str(source),
        "checksum": hashlib.sha256(contents).hexdigest(),
        "directory": str(tmp_path / "backups"),
        "name": NAME,
        "keep": 3,
    } | changes
    task = SimpleNamespace(args=arguments, check_mode=False, async_val=0, diff=False)
    connection = Mock(fetch_file=shutil.copyfile)
    return plugin.ActionModule(task, connection, Mock(), Mock(), Mock(), Mock()).run(task_vars={})


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "backups").iterdir())


def existing(tmp_path: Path, *backups: str) -> None:
    (tmp_path / "backups").mkdir()
    for name in backups:
        (tmp_path / "backups" / name).touch()
        (tmp_path / "backups" / f"{name}.sha256").touch()


def test_a_backup_and_its_checksum_are_private_and_complete(tmp_path: Path) -> None:
    done = run(tmp_path)
    path = tmp_path / "backups" / NAME
    assert (done["path"], done["size"], done["removed"], done["ahead"]) == (str(path), 6, [], [])
    assert path.read_bytes() == b"canvas"
    assert path.with_suffix(".rdb.sha256").read_text() == f"{hashlib.sha256(b'canvas').hexdigest()}  {NAME}\n"
    assert {oct(each.stat().st_mode & 0o777) for each in path.parent.iterdir()} == {"0o600"}
    assert oct(path.parent.stat().st_mode & 0o777) == "0o700"
    assert names(tmp_path) == [NAME, f"{NAME}.sha256"]


def test_a_damaged_backup_is_not_kept(tmp_path: Path) -> None:
    existing(tmp_path, "pixel-20200101T000000Z.rdb")
    before = names(tmp_path)
    with pytest.raises(AnsibleActionFail, match="damaged in transit and not kept"):
        run(tmp_path, fetched=b"canva", keep=1)
    assert names(tmp_path) == before


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    existing(tmp_path, NAME)
    with pytest.raises(AnsibleActionFail, match="exists and was not replaced: does another run write there"):
        run(tmp_path)
    assert (tmp_path / "backups" / NAME).read_bytes() == b""
    assert names(tmp_path) == [NAME, f"{NAME}.sha256"]


def test_the_oldest_backups_are_removed_with_their_checksums(tmp_path: Path) -> None:
    former = [f"pixel-202{year}0101T000000Z.rdb" for year in range(4)]
    existing(tmp_path, *former)
    assert run(tmp_path)["removed"] == former[:2]
    kept = [*former[2:], NAME]
    assert names(tmp_path) == sorted([*kept, *(f"{name}.sha256" for name in kept)])


def test_the_new_backup_and_files_with_other_names_are_never_removed(tmp_path: Path) -> None:
    """Names given while a clock was ahead sort after the new backup."""
    ahead = [f"pixel-20990101T00000{second}Z.rdb" for second in range(7)]
    others = [
        "pixel-before-launch.rdb",
        "history-20200101T000000Z.sqlite.gz",
        "pixel-20200101T000000Z.rdb.old",
    ]
    existing(tmp_path, *ahead, *others, "pixel-20200101T000000Z.rdb")
    done = run(tmp_path, keep=7)
    assert done["removed"] == ["pixel-20200101T000000Z.rdb", ahead[0]]
    assert done["ahead"] == ahead[1:]
    kept = [NAME, *ahead[1:], *others]
    assert names(tmp_path) == sorted([*kept, *(f"{name}.sha256" for name in kept)])


def test_one_backup_can_be_kept(tmp_path: Path) -> None:
    existing(tmp_path, "pixel-20200101T000000Z.rdb")
    run(tmp_path, keep=1)
    assert names(tmp_path) == [NAME, f"{NAME}.sha256"]
