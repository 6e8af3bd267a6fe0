"""The quick drill on three hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def test_the_loss_of_a_host_stays_within_the_drills_limits(fleet: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "drill.json"
    command = [sys.executable, "-m", "bench.drill", "--quick", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
