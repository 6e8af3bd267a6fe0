"""Values given with `-e name=value` are text: roles convert them, and documented examples work as typed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.filter.pixel_fleet import FilterModule
from jinja2 import nodes

ROOT = Path(__file__).resolve().parents[1]
SPECS = sorted(ROOT.glob("roles/*/meta/argument_specs.yml"))
PLAYBOOKS = sorted(ROOT.glob("playbooks/**/*.yml"))
SOURCES = sorted(
    path
    for place in ("roles", "playbooks")
    for path in (ROOT / place).rglob("*")
    if path.suffix in (".yml", ".j2") and "meta" not in path.parts
)
# Files that name arguments: manuals, and the comments and messages of playbooks and roles.
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *SOURCES]
# Keywords of tasks whose value is an expression without braces.
CONDITIONS = {"when", "that", "until", "failed_when", "changed_when", "var"}
# Filters that give the same result for 5 and '5'.
CONVERTING = {"bool", "int", "float", "string"}
# The collection's filters convert their arguments.
OWN_FILTERS = {f"pixel.endpoint.{name}" for name in FilterModule().filters()}


@functools.cache
def role_variables() -> dict[str, str]:
    """The type of every role variable, by name."""
    return {
        name: spec["type"]
        for path in SPECS
        for name, spec in yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"].items()
    }


def arguments(text: str) -> list[tuple[str, str]]:
    """Return names and values of the `-e` examples in a text; a value ends where a word of prose ends."""
    return re.findall(r"-e ([a-z][a-z0-9_]*)=([^\s`\]'\"{},;|]*)", text)


TYPED = {name for name, kind in role_variables().items() if kind in ("bool", "int", "float")} | {
    name
    for path in DOCUMENTS
    for name, value in arguments(path.read_text())
    if re.fullmatch(r"true|false|[0-9]+[.]?", value)
}


def templates(value: Any, key: str = "") -> Iterator[str]:
    """Yield every Jinja template in a YAML document; conditions are put in braces."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from templates(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from templates(inner, key)
    elif isinstance(value, str):
        if "{{" in value or "{%" in value:
            yield value
        elif key in CONDITIONS:
            yield "{{ " + value + " }}"


@functools.cache
def templates_in(path: Path) -> list[str]:
    """All templates in a file."""
    text = path.read_text()
    return list(templates(yaml.safe_load(text))) if path.suffix == ".yml" else [text]


def unconverted(source: str, start: str = "{{", end: str = "}}") -> set[str]:
    """Return the typed variables that a template uses, other than for output, without a conversion."""
    tree = jinja2.Environment(variable_start_string=start, variable_end_string=end).parse(source)
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    found = set()

    def is_converted(node: nodes.Node, parents: list[nodes.Node]) -> bool:
        for parent in reversed(parents):
            if isinstance(parent, nodes.Filter) and parent.node is node and parent.name in CONVERTING:
                return True
            if isinstance(parent, nodes.Filter) and parent.node is not node and parent.name in OWN_FILTERS:
                return True
            if isinstance(parent, nodes.Test):
                return parent.name == "defined"
            if isinstance(parent, nodes.Call):
                # A macro converts its own arguments.
                return isinstance(parent.node, nodes.Name) and parent.node.name in macros
            is_default = isinstance(parent, nodes.Filter) and parent.node is node and parent.name == "default"
            is_choice = isinstance(parent, nodes.CondExpr) and parent.test is not node
            if not is_default and not is_choice and not isinstance(parent, nodes.Keyword):
                return isinstance(parent, nodes.Output | nodes.Concat | nodes.Assign)
            node = parent
        return True

    def walk(node: nodes.Node, parents: list[nodes.Node]) -> None:
        name = node.name if isinstance(node, nodes.Name) else None
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            name = node.arg.value
        if isinstance(node, nodes.Filter) and node.name == "pixel.endpoint.host_variable":
            (name,) = (argument.value for argument in node.args[:1] if isinstance(argument, nodes.Const))
        if name in TYPED and not is_converted(node, parents):
            found.add(str(name))
        for child in node.iter_child_nodes():
            walk(child, [*parents, node])

    walk(tree, [])
    return found


@pytest.mark.parametrize(
    ("expression", "faults"),
    [
        ("wanted and other", {"wanted"}),
        ("wanted | bool and other", set()),
        ("range(wanted)", {"wanted"}),
        ("wanted | default(3) | int + 1", set()),
        ("wanted | default(3) + 1", {"wanted"}),
        ("hostvars[host]['wanted'] == 3", {"wanted"}),
        ("hostvars[host] | pixel.endpoint.host_variable('wanted', 3) == 3", {"wanted"}),
        ("hostvars[host] | pixel.endpoint.host_variable('wanted', 3) | int == 3", set()),
        ("'text ' ~ wanted", set()),
        ("wanted if other else 3", set()),
        ("3 if wanted else 4", {"wanted"}),
    ],
)
def test_missing_conversions_are_detected(
    monkeypatch: pytest.MonkeyPatch, expression: str, faults: set[str]
) -> None:
    monkeypatch.setitem(globals(), "TYPED", {"wanted"})
    assert unconverted("{{ " + expression + " }}") == faults


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_and_booleans_are_converted_where_they_are_used(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".yml":
        # Ansible keeps the backslashes of YAML strings.
        found = [unconverted(each.replace("\\", "\\\\")) for each in templates_in(path)]
    elif "{{ $" in text:
        found = [unconverted(text, "[[", "]]")]
    else:
        found = [unconverted(text)]
    assert set().union(*found) == set()


CHECKS = sorted(ROOT.glob("roles/*/meta/checks.yml"))
# Places that handle a variable that can't be evaluated.
LOOKED_FOR = {
    ("playbooks/validate.yml", "private_address"),
    ("playbooks/vars/cleanup.yml", "pixel_app_redis_url"),
}


def silently_default(template: str) -> set[str]:
    """Variables of other hosts that silently become the default, or undefined, if they can't be evaluated.

    Facts and results of tasks (names with an underscore) may be missing.
    """
    others = "|".join(
        [r"hostvars\[[^\]]+\]", *re.findall(r"{%-? set (\w+) = hostvars\[[^\]]+\] *-?%}", template)]
    )
    found = re.findall(rf"(?:{others})(?:[.]|\[')([a-z]\w*)(?:'\])?\)? *\| *default\b", template)
    if "hostvars" in template:
        found += re.findall(r"selectattr\('([a-z][\w.]*)', '(?:un)?defined'", template)
        found += re.findall(r"attribute='([a-z]\w*)', default=", template)
    return {name for name in found if not name.startswith("ansible_")}


@pytest.mark.parametrize(
    ("template", "faults"),
    [
        ("{{ hostvars[item]['wanted'] | default(0) }}", {"wanted"}),
        ("{{ (hostvars[groups.a | first].wanted | default({})).x }}", {"wanted"}),
        ("{% set facts = hostvars[host] %}{{ facts['wanted'] | default(0) }}", {"wanted"}),
        ("{{ a | map('extract', hostvars) | selectattr('wanted', 'defined') }}", {"wanted"}),
        ("{{ a | map('extract', hostvars) | map(attribute='wanted', default=2) }}", {"wanted"}),
        ("{{ hostvars[item].__registered | default(0) ~ hostvars[item].ansible_host | default('') }}", set()),
        ("{{ a | map('extract', hostvars) | selectattr('ansible_facts.cpus', 'defined') }}", set()),
        ("{{ a | selectattr('wanted', 'defined') }}", set()),
    ],
)
def test_the_check_finds_what_is_silently_a_default(template: str, faults: set[str]) -> None:
    assert silently_default(template) == faults


@pytest.mark.parametrize("path", [*SOURCES, *CHECKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_of_other_hosts_are_never_silently_a_default(path: Path) -> None:
    """The filter host_variable reads them."""
    found = {name for template in templates_in(path) for name in silently_default(template)}
    assert {(str(path.relative_to(ROOT)), name) for name in found} <= LOOKED_FOR


def test_documented_variables_are_roles() -> None:
    """Checks names in code spans; `nginx_lb_limit_*` is a pattern."""
    known = set(role_variables())
    roles = "|".join(path.parents[1].name for path in SPECS)
    named = {
        (path.name, name)
        for path in DOCUMENTS
        if path.suffix == ".md"
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.S))
        for name in re.findall(rf"(?<![\w./-])(?:{roles})_[a-z_]*[a-z](?![\w./*-]|_\*)", span)
    }
    assert len(named) > 50
    assert {(page, name) for page, name in named if name not in known} == set()


@functools.cache
def playbook_lines() -> str:
    """All lines of the playbooks but comments."""
    playbooks = "".join(playbook.read_text() for playbook in PLAYBOOKS)
    return "\n".join(re.findall(r"^(?!\s*#)(.*)$", playbooks, re.M))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_arguments_are_variables(path: Path) -> None:
    """Each documented argument is a role variable or is read by a playbook."""
    names = {name for name, _ in arguments(path.read_text())}
    unknown = {
        name
        for name in names - set(role_variables())
        if not re.search(rf"\b{name} ([|]|is )", playbook_lines())
    }
    assert unknown == set()
