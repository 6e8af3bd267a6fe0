"""Programs that aren't packages are imported from where they lie."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("molecule/shared", "roles/monitoring/files", "roles/nginx_lb/files", "roles/redis/files")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
