"""What holds for every role: its arguments are documented, and its README says the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())


def load(role: str, name: str) -> Any:
    return yaml.safe_load((ROOT / "roles" / role / name).read_text())


@pytest.mark.parametrize("role", ROLES)
def test_argument_specs_and_defaults_agree(role: str) -> None:
    options = load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = load(role, "defaults/main.yml")
    assert {name: option.get("default") for name, option in options.items()} == defaults


@pytest.mark.parametrize("role", ROLES)
def test_every_argument_is_explained(role: str) -> None:
    options = load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert all(option["description"].endswith(".") and option["type"] for option in options.values())


@pytest.mark.parametrize("role", ROLES)
def test_names_tell_whose_a_variable_is(role: str) -> None:
    assert all(name.startswith(f"{role}_") for name in load(role, "defaults/main.yml"))
    assert all(name.startswith(f"_{role}_") for name in load(role, "vars/main.yml"))
    for path in (ROOT / "roles" / role).rglob("tasks/*.yml"):
        registered = re.findall(r"^\s*register: (\S+)", path.read_text(), re.M)
        assert all(name.startswith(f"__{role}_") for name in registered), path


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_is_generated_from_the_arguments(role: str, tmp_path: Path) -> None:
    """`make docs` writes it."""
    fresh = tmp_path / "README.md"
    program = Path(sys.prefix, "bin", "aar-doc")
    arguments: list[str | Path] = ["--output-file", fresh, ROOT / "roles" / role, "markdown"]
    subprocess.run([program, *arguments], check=True, capture_output=True)
    assert (ROOT / "roles" / role / "README.md").read_text() == fresh.read_text()
