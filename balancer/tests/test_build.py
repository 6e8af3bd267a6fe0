"""The zipapp."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

BALANCER = Path(__file__).resolve().parents[1]


def build(source: Path, target: Path, **environment: str) -> bytes:
    command: list[str | Path] = [sys.executable, source / "build.py", target]
    subprocess.run(command, check=True, env=os.environ | environment)
    return target.read_bytes()


def test_the_build_is_reproducible(tmp_path: Path) -> None:
    first = build(BALANCER, tmp_path / "first")
    copy = tmp_path / "copy"
    shutil.copytree(BALANCER / "src", copy / "src", ignore=shutil.ignore_patterns("test_*"))
    shutil.copy(BALANCER / "build.py", copy)
    for number, path in enumerate(copy.rglob("*.py")):
        path.chmod(0o600)
        os.utime(path, (number, 10**9 + number))
    assert build(copy, tmp_path / "second", TZ="Asia/Tokyo") == first
    with (copy / "src" / "pixel_lb" / "cli.py").open("a") as file:
        file.write("# changed\n")
    assert build(copy, tmp_path / "third") != first


def test_the_zipapp_runs_without_its_sources(tmp_path: Path) -> None:
    build(BALANCER, tmp_path / "pixel-lb")
    assert os.access(tmp_path / "pixel-lb", os.X_OK)
    run: list[str | Path] = [sys.executable, "-S", tmp_path / "pixel-lb"]
    done = subprocess.run([*run, "--help"], cwd="/", text=True, capture_output=True, check=True)
    assert "undrain" in done.stdout
    done = subprocess.run([*run, "drain"], cwd="/", text=True, capture_output=True, check=False)
    assert (done.returncode, "usage: pixel-lb drain" in done.stderr) == (2, True)


def test_a_module_of_the_zipapp_can_be_run(tmp_path: Path) -> None:
    """The controller runs `pixel_lb.cloudwatch` in this way."""
    build(BALANCER, tmp_path / "pixel-lb")
    done = subprocess.run(
        [sys.executable, "-m", "pixel_lb", "--help"],
        env={"PYTHONPATH": str(tmp_path / "pixel-lb")},
        cwd="/",
        capture_output=True,
        check=True,
    )
    assert b"undrain" in done.stdout


def test_only_programs_that_speak_to_aws_need_more_than_the_standard_library(tmp_path: Path) -> None:
    build(BALANCER, tmp_path / "pixel-lb")
    with zipfile.ZipFile(tmp_path / "pixel-lb") as archive:
        modules = [Path(name).stem for name in archive.namelist() if name.startswith("pixel_lb/")]
    modules = [name for name in modules if name not in ("__init__", "__main__", "cloudwatch", "elastic_ip")]
    assert len(modules) > 10
    code = f"import pixel_lb; {'; '.join(f'import pixel_lb.{name}' for name in modules)}"
    environment = {"PYTHONPATH": str(tmp_path / "pixel-lb")}
    subprocess.run([sys.executable, "-S", "-c", code], env=environment, cwd="/", check=True)
