"""Every role: argument specification, defaults, variable names, README and tags agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader  # type: ignore[import-untyped]
from ansible.template import Templar, trust_as_template  # type: ignore[import-untyped]

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
def test_variable_names_have_the_roles_prefix(role: str) -> None:
    assert all(name.startswith(f"{role}_") for name in load(role, "defaults/main.yml"))
    assert all(name.startswith(f"_{role}_") for name in load(role, "vars/main.yml"))
    for path in (ROOT / "roles" / role).rglob("tasks/*.yml"):
        registered = re.findall(r"^\s*register: (\S+)", path.read_text(), re.M)
        assert all(name.startswith(f"__{role}_") for name in registered), path


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_is_generated_from_the_arguments(role: str, tmp_path: Path) -> None:
    """`make docs` generates it."""
    fresh = tmp_path / "README.md"
    program = Path(sys.prefix, "bin", "aar-doc")
    arguments: list[str | Path] = ["--output-file", fresh, ROOT / "roles" / role, "markdown"]
    subprocess.run([program, *arguments], check=True, capture_output=True)
    assert (ROOT / "roles" / role / "README.md").read_text() == fresh.read_text()


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_no_tags_but_always_for_its_preflight(role: str) -> None:
    """Playbooks give each role one tag. Tags inside a role could run a part without the tasks before it."""
    for path in (ROOT / "roles" / role).rglob("tasks/*.yml"):
        tags = re.findall(r"^\s*tags: (.*)", path.read_text(), re.M)
        assert tags == (["[always]"] if path.name == "main.yml" else []), path


@pytest.mark.parametrize("role", ROLES)
def test_every_role_checks_its_arguments_first(role: str) -> None:
    first = load(role, "tasks/main.yml")[0]
    assert first["ansible.builtin.import_tasks"] == "preflight.yml"
    assert load(role, "tasks/preflight.yml")[0]["pixel.endpoint.check_arguments"] == {"roles": [role]}


@pytest.mark.parametrize(
    ("value", "is_refused"),
    [
        ("it's", True),
        ("two\nlines", True),
        (["a"], True),
        ('["a", "b"]', False),
        ("C:\\n", False),
        (12, False),
        (True, False),
    ],
)
def test_settings_that_an_environment_file_cannot_contain_are_named(value: Any, is_refused: bool) -> None:
    variables = {"pixel_app_settings": {"PIXEL_LOG_LEVEL": "info", "PIXEL_TRIED": value}}
    unwritable = trust_as_template(load("pixel_app", "vars/main.yml")["_pixel_app_unwritable"])
    assert Templar(DataLoader(), variables).template(unwritable) == ["PIXEL_TRIED"] * is_refused
