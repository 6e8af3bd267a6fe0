"""The quick drill: deploys and crashes under load, checked against the ledger of acknowledged writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def test_faults_stay_within_the_drills_limits(fleet: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.drill", "--quick", "--json", str(tmp_path / "drill.json")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
