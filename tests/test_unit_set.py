"""unit_set starts or stops a set of systemd units in one run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.modules import unit_set

# Stands in for systemctl: units are files that hold "<load> <file> <active> <needs daemon-reload> <started>
# <changed>"; it logs its arguments.
SYSTEMCTL = """#!/bin/sh
cd "$(dirname "$0")/units"
echo "$@" >>../calls
verb=$1; shift
[ $verb != daemon-reload ] || exec sed -i 's/ yes / no /' *
while [ "$1" != -- ] && [ $# -gt 0 ]; do shift; done; shift
now=$(cat ../now)
for unit; do
  set -- $(cat "$unit" 2>/dev/null || echo not-found - inactive no 0 0)
  case $verb in
    show) printf 'Id=%s\\nLoadState=%s\\n' "$unit" "$1"
      printf 'UnitFileState=%s\\nActiveState=%s\\nNeedDaemonReload=%s\\n' "${2#-}" "$3" "$4"
      printf 'InactiveExitTimestampMonotonic=%s\\nStateChangeTimestampMonotonic=%s\\n\\n' "$5" "$6" ;;
    enable) echo "$1 enabled $3 $4 $5 $6" >"$unit" ;;
    disable) echo "$1 disabled $3 $4 $5 $6" >"$unit" ;;
    start | restart) echo "$1 $2 active $4 $now $now" >"$unit" ;;
    stop) echo "$1 $2 inactive $4 $5 $now" >"$unit" ;;
    reload) echo "$1 $2 active $4 $5 $now" >"$unit" ;;
  esac
done
"""


def ago(seconds: float) -> int:
    """A time of the monotonic clock in microseconds, as systemd shows it."""
    return int((time.monotonic() - seconds) * 1e6)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "units").mkdir()
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def run_module(**arguments: Any) -> dict[str, Any]:
        (tmp_path / "now").write_text(str(ago(0)))
        with patch_module_args(arguments), pytest.raises(SystemExit):
            unit_set.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run_module


def units(tmp_path: Path) -> dict[str, str]:
    """Load state, file state and active state of each unit."""
    paths = (tmp_path / "units").iterdir()
    return {path.name: " ".join(path.read_text().split()[:3]) for path in paths}


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
        write(tmp_path, name, state)


def write(tmp_path: Path, name: str, state: str, unread: str = "no", started: int = 0) -> None:
    """Write a unit that was started ``started`` seconds ago."""
    moment = ago(started)
    (tmp_path / "units" / name).write_text(f"{state} {unread} {moment} {moment}")


def test_only_units_that_differ_are_changed(run: Any, tmp_path: Path) -> None:
    result = run(names=list(STATES))
    assert result["changed_units"] == ["a.service", "c.socket"]
    assert result["diff"]["before"] == "a.service: disabled, inactive\nc.socket: enabled, failed\n"
    assert set(units(tmp_path).values()) == {"loaded enabled active"}
    # A drop-in directory may be new.
    assert calls(tmp_path) == ["show", "daemon-reload", "enable", "start"]
    assert not run(names=list(STATES))["changed"]
    assert calls(tmp_path)[4:] == ["show"]


def test_check_mode_changes_nothing(run: Any, tmp_path: Path) -> None:
    write(tmp_path, "c.socket", STATES["c.socket"], unread="yes")
    assert run(names=list(STATES), _ansible_check_mode=True)["changed_units"] == ["a.service", "c.socket"]
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
    write(tmp_path, "d.service", state)
    assert run(names=["a.service", "d.service"])["msg"] == message
    # No unit was changed.
    assert set(calls(tmp_path)) <= {"show", "daemon-reload"}
    # A dry run didn't write the unit that a run would start.
    assert "d.service" in run(names=["d.service"], _ansible_check_mode=True)["changed_units"]


def test_an_empty_set_does_not_run_systemctl(run: Any, tmp_path: Path) -> None:
    assert not run(names=[])["changed"]
    assert not (tmp_path / "calls").exists()


def test_units_whose_configuration_systemd_has_not_read_are_read(run: Any, tmp_path: Path) -> None:
    write(tmp_path, "b.timer", STATES["b.timer"], unread="yes")
    assert run(names=["b.timer"])["diff"]["before"] == "b.timer: enabled, active, configuration not read\n"
    assert calls(tmp_path) == ["show", "daemon-reload", "show"]
    assert not run(names=["b.timer"])["changed"]


def test_a_unit_that_was_started_without_its_configuration_is_restarted(
    run: Any, tmp_path: Path, file: Any
) -> None:
    """A drop-in is older than the start, and systemd had not read it."""
    write(tmp_path, "old.service", "loaded enabled active", unread="yes", started=5)
    arguments = {"names": ["old.service"], "restart_on": {"old.service": [file("drop-in", 60)]}}
    assert run(**arguments)["changed_units"] == ["old.service"]
    assert calls(tmp_path)[-1] == "restart"
    assert not run(**arguments)["changed"]


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Create a file that was modified ``modified`` seconds ago, and return its path."""

    def make(name: str, modified: float) -> str:
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - modified,) * 2)
        return str(path)

    return make


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_a_unit_reads_a_file_that_is_newer_once(run: Any, tmp_path: Path, file: Any, verb: str) -> None:
    for name in ("old.service", "other.service"):
        write(tmp_path, name, "loaded enabled active", started=50)
    new, read = file("new", 10), file("read", 90)
    paths = {"old.service": [new, read, "/none"], "other.service": [read]}
    arguments = {"names": [*paths], f"{verb}_on": paths | {"b.timer": [new]}}
    shown = run(**arguments, _ansible_check_mode=True)
    assert calls(tmp_path) == ["show"]
    result = run(**arguments)
    assert shown["changed_units"] == result["changed_units"] == ["old.service"]
    assert result["diff"]["before"] == f"old.service: enabled, active, older than {new}\n"
    assert calls(tmp_path)[1:] == ["show", *["daemon-reload"] * (verb == "restart"), verb]
    assert not run(**arguments)["changed"]
    # A restart for another reason counts as well.
    Path(new).touch()
    write(tmp_path, "old.service", "loaded enabled active", started=-1)
    assert not run(**arguments)["changed"]


def test_a_restart_is_no_reload_as_well_and_a_start_is_neither(run: Any, tmp_path: Path, file: Any) -> None:
    write(tmp_path, "old.service", "loaded enabled active", started=50)
    new = file("new", 10)
    paths = {"a.service": [new], "old.service": [new]}
    assert run(names=[*paths], restart_on=paths, reload_on=paths)["changed_units"] == [*paths]
    assert calls(tmp_path) == ["show", "daemon-reload", "enable", "start", "restart"]


def test_a_reload_is_not_a_start(run: Any, tmp_path: Path, file: Any) -> None:
    """A reload doesn't change the time of the start."""
    write(tmp_path, "old.service", "loaded enabled active", started=50)
    restart, reload = {"old.service": [file("restart", 10)]}, {"old.service": [file("reload", 10)]}
    run(names=["old.service"], reload_on=reload)
    assert not run(names=["old.service"], reload_on=reload)["changed"]
    run(names=["old.service"], restart_on=restart)
    assert calls(tmp_path) == ["show", "reload", "show", "show", "daemon-reload", "restart"]


def test_a_file_from_the_future_restarts_nothing_forever(run: Any, tmp_path: Path, file: Any) -> None:
    """The clock was ahead when the file was written."""
    write(tmp_path, "old.service", "loaded enabled active", started=50)
    assert not run(names=["old.service"], restart_on={"old.service": [file("ahead", -3600)]})["changed"]


def test_a_dry_run_counts_files_that_it_did_not_write(run: Any, tmp_path: Path, file: Any) -> None:
    write(tmp_path, "old.service", "loaded enabled active", started=50)
    arguments = {
        "names": ["old.service"],
        "restart_on": {"old.service": [file("old", 90)]},
        "changed_paths": [str(tmp_path / "old"), str(tmp_path / "unrelated")],
    }
    assert run(**arguments, _ansible_check_mode=True)["changed_units"] == ["old.service"]
    # In a run, the times of the written files decide.
    assert not run(**arguments)["changed"]
