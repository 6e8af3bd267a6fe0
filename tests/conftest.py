"""Programs that aren't packages are imported from where they lie."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "molecule" / "shared"), str(ROOT / "roles" / "nginx_lb" / "files")]
