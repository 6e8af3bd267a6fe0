"""Filter `workspace`."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pixel.endpoint.plugins.filter.workspace import workspace

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "path", ["roles/redis", "playbooks", "collections/ansible_collections/pixel/endpoint/roles"]
)
def test_in_the_repository_the_workspace_is_the_root(path: str) -> None:
    assert workspace(str(ROOT / path)) == str(ROOT)


def test_in_an_installed_collection_the_workspace_is_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = tmp_path / "ansible_collections/pixel/endpoint/roles/redis"
    role.mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert workspace(str(role)) == str(tmp_path / "project")
