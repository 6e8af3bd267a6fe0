"""Make programs outside packages importable, and undo what they change in this process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIRECTORIES = ("fleet", "roles/monitoring/files", "roles/redis/files", "molecule/redis_cluster/files")
sys.path[:0] = [str(ROOT / directory) for directory in DIRECTORIES]


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    former = os.umask(0o022)
    yield
    os.umask(former)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first: other workers take the tests that would wait for its end."""
    items.sort(key=lambda item: item.name != "test_provision_change_and_teardown")
