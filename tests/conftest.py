"""Make programs outside packages importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORIES = ("fleet", "roles/monitoring/files", "roles/redis/files", "molecule/redis_cluster/files")
sys.path[:0] = [str(ROOT / directory) for directory in DIRECTORIES]
