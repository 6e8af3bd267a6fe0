"""package_set runs no module on a host unless a package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ansible.errors import AnsibleActionFail  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
# An import by name would find the module of the same name, which contains only documentation.
_SPEC = importlib.util.spec_from_file_location("package_set_action", ROOT / "plugins/action/package_set.py")
assert _SPEC is not None
assert _SPEC.loader is not None
plugin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plugin)


class Host:
    """A stub of a host: apt installs into a dictionary, and module runs are recorded."""

    def __init__(self, *packages: str, broken: str = "") -> None:
        self.packages = dict.fromkeys(packages)
        self.broken = broken
        self.runs: list[tuple[str, dict[str, Any], bool]] = []

    def install(self, facts: set[str] | None, check_mode: bool = False, **arguments: Any) -> dict[str, Any]:
        """Run the action with these package facts; None means that the host has no facts yet."""
        task = SimpleNamespace(args=arguments, check_mode=check_mode, async_val=0, diff=False)
        action = plugin.ActionModule(task, Mock(), Mock(), Mock(), Mock(), Mock())
        action._execute_module = lambda module_name, module_args, task_vars: self._module(
            module_name.removeprefix("ansible.builtin."), module_args, task.check_mode
        )
        known = {} if facts is None else {"packages": dict.fromkeys(facts)}
        result: dict[str, Any] = action.run(task_vars={"ansible_facts": known})
        assert task.check_mode == check_mode
        return result

    def _module(self, name: str, arguments: dict[str, Any], check_mode: bool) -> dict[str, Any]:
        self.runs.append((name, arguments, check_mode))
        if name == self.broken:
            return {"failed": True, "msg": "broken"}
        if name == "apt":
            if not check_mode:
                self.packages |= dict.fromkeys(arguments.get("name", []))
            return {"changed": "name" in arguments}
        assert arguments["argv"][0] == "dpkg-query"
        return {"stdout": "".join(f"installed {package} 1.0\n" for package in self.packages)}


def test_no_module_runs_if_no_package_is_missing() -> None:
    host = Host("nginx")
    result = host.install({"nginx", "openssl"}, name=["nginx", "openssl"])
    assert (result["changed"], result["missing"], host.runs) == (False, [], [])


def test_missing_facts_are_gathered() -> None:
    host = Host("nginx")
    result = host.install(None, name=["nginx"])
    assert [run[0] for run in host.runs] == ["command"]
    assert not result["changed"]
    assert result["ansible_facts"] == {"packages": {"nginx": [{"version": "1.0"}]}}


def test_only_missing_packages_are_installed_and_the_facts_are_updated() -> None:
    host = Host("nginx")
    result = host.install({"nginx"}, name=["nginx", "openssl"], policy_rc_d=101)
    assert result["changed"]
    assert result["missing"] == ["openssl"]
    (apt, arguments, _), (facts, _, _) = host.runs
    assert (apt, facts) == ("apt", "command")
    assert arguments == {
        "name": ["openssl"],
        "update_cache": True,
        "cache_valid_time": 3600,
        "lock_timeout": 300,
        "install_recommends": False,
        "policy_rc_d": 101,
    }
    assert result["ansible_facts"]["packages"].keys() == {"nginx", "openssl"}


def test_a_dry_run_refreshes_the_lists_and_installs_nothing() -> None:
    host = Host("nginx")
    result = host.install({"nginx"}, check_mode=True, name=["openssl"])
    assert result["changed"]
    assert [("name" in arguments, check_mode) for _, arguments, check_mode in host.runs] == [
        (False, False),
        (True, True),
    ]
    assert "openssl" not in host.packages
    # The facts stay unchanged: later tasks must see that the package is missing.
    assert "ansible_facts" not in result


@pytest.mark.parametrize("broken", ["apt", "command"])
def test_a_failure_is_reported(broken: str) -> None:
    for facts in (None, set[str]()):
        result = Host(broken=broken).install(facts, name=["nginx"])
        assert result["failed"]
        assert result["msg"] == "broken"
        assert result.get("ansible_facts", {"packages": {}}) == {"packages": {}}


def test_names_must_be_a_list() -> None:
    with pytest.raises(AnsibleActionFail, match="name must be a list"):
        Host().install(set(), name="nginx")
