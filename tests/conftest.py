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
