"""The quick drill: deploys and crashes under load, against the ledger of what was acknowledged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def test_users_notice_no_more_than_they_may(fleet: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.drill", "--quick", "--json", str(tmp_path / "drill.json")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
