"""unit_set starts or stops a set of systemd units in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.modules import unit_set

# A stub of systemctl: units are files that contain "<load> <file> <active>". It logs its arguments.
SYSTEMCTL = """#!/bin/sh
cd "$(dirname "$0")/units"
echo "$@" >>../calls
verb=$1; shift
while [ "$1" != -- ] && [ $# -gt 0 ]; do shift; done; shift
for unit; do
  set -- $(cat "$unit" 2>/dev/null || echo not-found - inactive)
  case $verb in
    show) printf 'Id=%s\\nLoadState=%s\\n' "$unit" "$1"
      printf 'UnitFileState=%s\\nActiveState=%s\\n\\n' "${2#-}" "$3" ;;
    enable) echo "$1 enabled $3" >"$unit" ;;
    disable) echo "$1 disabled $3" >"$unit" ;;
    start) echo "$1 $2 active" >"$unit" ;;
    stop) echo "$1 $2 inactive" >"$unit" ;;
  esac
done
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "units").mkdir()
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def run_module(**arguments: Any) -> dict[str, Any]:
        with patch_module_args(arguments), pytest.raises(SystemExit):
            unit_set.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run_module


def units(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in (tmp_path / "units").iterdir()}


def calls(tmp_path: Path) -> list[str]:
    """Return the verbs of the systemctl calls."""
    return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


STATES = {
    "a.service": "loaded disabled inactive",
    "b.timer": "loaded enabled active",
    "c.socket": "loaded enabled failed",
}


@pytest.fixture(autouse=True)
def made(run: Any, tmp_path: Path) -> None:
    for name, state in STATES.items():
        (tmp_path / "units" / name).write_text(state)


def test_only_units_that_differ_are_changed(run: Any, tmp_path: Path) -> None:
    result = run(names=list(STATES))
    assert result["changed_units"] == ["a.service", "c.socket"]
    assert result["diff"]["before"] == "a.service: disabled, inactive\nc.socket: enabled, failed\n"
    assert set(units(tmp_path).values()) == {"loaded enabled active"}
    assert calls(tmp_path) == ["show", "enable", "start"]
    assert not run(names=list(STATES))["changed"]
    assert calls(tmp_path)[3:] == ["show"]


def test_check_mode_changes_nothing(run: Any, tmp_path: Path) -> None:
    assert run(names=list(STATES), daemon_reload=True, _ansible_check_mode=True)["changed_units"] == [
        "a.service",
        "c.socket",
    ]
    assert units(tmp_path) == STATES
    assert calls(tmp_path) == ["show"]


def test_units_are_stopped_and_disabled(run: Any, tmp_path: Path) -> None:
    result = run(names=[*STATES, "none.service"], state="stopped")
    assert result["changed_units"] == ["b.timer", "c.socket"]
    assert units(tmp_path)["b.timer"] == "loaded disabled inactive"
    assert not run(names=[*STATES, "none.service"], state="stopped")["changed"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("not-found - inactive", "systemd has no unit d.service"),
        ("masked masked inactive", "unit d.service is masked"),
    ],
)
def test_a_unit_that_cannot_start_is_named(run: Any, tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "units" / "d.service").write_text(state)
    assert run(names=["a.service", "d.service"])["msg"] == message
    # systemctl changed no unit.
    assert calls(tmp_path) == ["show"]
    # In check mode the unit may not be written yet, so it counts as changed.
    assert "d.service" in run(names=["d.service"], _ansible_check_mode=True)["changed_units"]


def test_an_empty_set_does_not_run_systemctl(run: Any, tmp_path: Path) -> None:
    assert not run(names=[])["changed"]
    assert not (tmp_path / "calls").exists()
