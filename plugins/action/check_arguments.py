"""Check the arguments of roles on the control node, and report all faults at once."""

from __future__ import annotations

import difflib
import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError  # type: ignore[import-untyped]
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator  # type: ignore[import-untyped]
from ansible.module_utils.errors import ArgumentValueError  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]
from ansible.template import trust_as_template  # type: ignore[import-untyped]

ROLES = Path(__file__).resolve().parents[2] / "roles"

_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_RANGE = re.compile(
    rf"(?:(?P<first>{_NUMBER}) to (?P<last>{_NUMBER})|at least (?P<least>{_NUMBER})"
    rf"|above (?P<above>{_NUMBER}), (?:at most (?P<most>{_NUMBER})|below (?P<below>{_NUMBER})))"
    rf"(?: [a-z ]+)?(?:, or (?P<other>{_NUMBER})(?: .*)?)?"
)
_USER = re.compile(r"[a-z][a-z0-9_-]*")
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "path": "a path",
    "list": "a list",
    "dict": "a mapping",
}


@functools.cache
def meta(role: str, name: str) -> dict[str, Any]:
    """Read a file of a role's directory meta; it has no variables. A missing file is empty."""
    path = ROLES / role / "meta" / name
    return (yaml.load(path.read_text(), yaml.CSafeLoader) or {}) if path.exists() else {}


def in_range(value: float, phrase: str) -> bool:
    """Tell whether a number is in a range.

    phrase has one of the forms "1 to 60 seconds", "1 to 100, or 0 for no limit", "at least 2" and
    "above 0, below 1". Raises ValueError otherwise.
    """
    matched = _RANGE.fullmatch(phrase)
    if matched is None:
        raise ValueError(f"{phrase!r} is not a range")
    bound = {name: float(text) for name, text in matched.groupdict().items() if text is not None}
    return value == bound.get("other") or (
        bound.get("first", bound.get("least", value)) <= value <= bound.get("last", bound.get("most", value))
        and not value <= bound.get("above", float("-inf"))
        and not value >= bound.get("below", float("inf"))
    )


def is_ipv4(text: str) -> bool:
    """Tell whether a text is an IPv4 address."""
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def is_ipv4_with_prefix(text: str) -> bool:
    """Tell whether a text is an IPv4 address with a prefix length."""
    address, _, prefix = text.partition("/")
    return is_ipv4(address) and prefix.isdecimal() and int(prefix) in range(8, 33)


def is_network(text: str) -> bool:
    """Tell whether a text is an IPv4 or IPv6 address or network. Bits of the host may be set."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


FORMATS = {
    "ipv4": (is_ipv4, "an IPv4 address such as 10.0.0.11"),
    "ipv4_with_prefix": (
        lambda text: not text or is_ipv4_with_prefix(text),
        "an IPv4 address with its prefix such as 10.0.0.100/24, or empty",
    ),
    "network": (is_network, "a network such as 10.0.0.0/8"),
    "user": (lambda text: bool(_USER.fullmatch(text)), "a name of lower-case letters, digits, _ and -"),
}


def unknown(names: Iterable[str], known: dict[str, set[str]]) -> Iterator[str]:
    """Yield a fault for each name that begins with a role's prefix and is not a variable of a role.

    known maps each role to its variables.
    """
    everything = sorted(set().union(*known.values()))
    for name in sorted(names):
        role = max((role for role in known if name.startswith(f"{role}_")), key=len, default=None)
        if role is None or name in everything:
            continue
        close = difflib.get_close_matches(name, everything, n=1)
        hint = f"did you mean {close[0]}?" if close else f"roles/{role}/README.md lists them."
        yield f"{name} is not a variable of role {role}: {hint}"


def convert(name: str, value: Any, option: dict[str, Any]) -> tuple[Any, str | None]:
    """Convert a value as Ansible does for an option of an argument specification.

    Returns the converted value and None, or the unchanged value and the fault.
    """
    secret = option.get("no_log", False)
    shown = name if secret else f"{name} {value!r}" if isinstance(value, str) else f"{name} {value}"
    kind = option["type"]
    if value is None:
        return value, f"{name} has no value: remove it or give it one."
    if kind in ("list", "dict") and isinstance(value, str):
        example = "[…]" if kind == "list" else "{…}"
        return (
            value,
            f"{name} is text, not {_EXPECTED[kind]}: write it as JSON, -e '{{\"{name}\": {example}}}'.",
        )
    result = ArgumentSpecValidator({name: option}).validate({name: value})
    if not result.error_messages:
        return result.validated_parameters[name], None
    if any(isinstance(error, ArgumentValueError) for error in result.errors):
        *others, last = [str(choice) for choice in option["choices"]]
        return value, f"{shown} is invalid: {', '.join(others)} or {last}."
    expected = _EXPECTED[kind]
    if "elements" in option:
        expected += f", each element {_EXPECTED[option['elements']]}"
    return value, f"{shown} is not {expected}."


class ActionModule(ActionBase):  # type: ignore[misc]
    """Reads meta/argument_specs.yml and meta/checks.yml of the roles; connects to no host."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check the roles.

        task_vars are the host's variables. Fails if there are faults; the message lists them, one a line.
        """
        task_vars = task_vars or {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        roles: list[str] = self._task.args.get("roles", [])
        others: list[str] = self._task.args.get("others", [])
        # A rule may not be evaluable because a value has the wrong type, which is reported as a fault.
        self._errors: list[Exception] = []
        faults = [fault for role in roles for fault in self._faults(role, task_vars)]
        for role in others:
            given = {name: option for name, option in self._options(role).items() if name in task_vars}
            faults += self._values(role, given, task_vars)[1]
        known = {path.name: set(self._options(path.name)) for path in ROLES.iterdir()}
        names = [name for name in task_vars if any(name.startswith(f"{role}_") for role in [*roles, *others])]
        faults += unknown(names, known)
        if self._errors and not faults:
            raise self._errors[0]
        result["changed"] = False
        result["roles"] = roles
        result["faults"] = list(dict.fromkeys(faults))
        if faults:
            result["failed"] = True
            host = task_vars.get("inventory_hostname")
            result["msg"] = f"Invalid variables of {host}:\n" + "\n".join(
                f"- {one}" for one in result["faults"]
            )
        return result

    def _load(self, role: str, name: str) -> dict[str, Any]:
        """Read a file of a role; a missing file is empty."""
        path = ROLES / role / name
        if not path.exists():
            return {}
        loaded = self._loader.load_from_file(str(path), cache="none", trusted_as_template=True)
        return loaded or {}

    def _options(self, role: str) -> dict[str, dict[str, Any]]:
        specs = meta(role, "argument_specs.yml")
        if not specs:
            raise AnsibleActionFail(f"role {role!r} has no argument specification")
        options: dict[str, dict[str, Any]] = specs["argument_specs"]["main"]["options"]
        return options

    def _values(
        self, role: str, options: dict[str, dict[str, Any]], variables: dict[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Template and convert variables. Returns the values, and the faults of type, range and format."""
        checks = meta(role, "checks.yml")
        templar = self._templar.copy_with_new_env(available_variables=variables)
        values: dict[str, Any] = {}
        faults = []
        for name, option in options.items():
            try:
                values[name], fault = convert(name, templar.template(variables[name]), option)
            except AnsibleError as error:
                fault = f"{name} can't be evaluated: {error}"
            if fault is not None:
                faults.append(fault)
                continue
            several = values[name] if isinstance(values[name], list) else [values[name]]
            if name in checks.get("ranges", {}):
                phrase = checks["ranges"][name]
                faults += [
                    f"{name} {one} is out of range: {phrase}." for one in several if not in_range(one, phrase)
                ]
            if name in checks.get("formats", {}):
                test, expected = FORMATS[checks["formats"][name]]
                faults += [f"{name} {one!r} is not {expected}." for one in several if not test(one)]
        return values, faults

    def _faults(self, role: str, task_vars: dict[str, Any]) -> list[str]:
        """Return all faults of a role that runs on this host."""
        variables = self._load(role, "defaults/main.yml") | task_vars | self._load(role, "vars/main.yml")
        variables["role_path"] = str(ROLES / role)
        values, faults = self._values(role, self._options(role), variables)
        for rule in meta(role, "checks.yml").get("rules", []):
            try:
                faults += self._broken(rule, variables, values)
            except AnsibleError as error:
                self._errors.append(error)
        return faults

    def _broken(
        self, rule: dict[str, str], variables: dict[str, Any], values: dict[str, Any]
    ) -> Iterator[str]:
        """Yield the message of a rule for each item that breaks it."""
        scope = variables | values
        items: list[dict[str, Any]] = [{}]
        if "each" in rule:
            templar = self._templar.copy_with_new_env(available_variables=scope)
            each = trust_as_template(rule["each"])
            items = [{"item": item} for item in templar.evaluate_expression(each)]
        for item in items:
            templar = self._templar.copy_with_new_env(available_variables=scope | item)
            if not templar.evaluate_conditional(trust_as_template(rule["that"])):
                yield str(templar.template(trust_as_template(rule["message"])))
