"""check_arguments reports all invalid role variables at once."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())
# An import by name would find the module of the same name, which contains only documentation.
_SPEC = importlib.util.spec_from_file_location(
    "check_arguments_action", ROOT / "plugins/action/check_arguments.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
plugin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plugin)


def load(role: str, name: str) -> Any:
    return yaml.safe_load((ROOT / "roles" / role / name).read_text())


def options(role: str) -> dict[str, Any]:
    found: dict[str, Any] = load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    return found


@pytest.mark.parametrize(
    ("phrase", "inside", "outside"),
    [
        ("1 to 60", (1, 60), (0, 61)),
        ("-5 to 5 seconds", (-5, 5), (-6, 6)),
        ("at least 2", (2, 1000), (1,)),
        ("above 0, at most 1", (0.001, 1), (0, 1.1)),
        ("above 0, below 1", (0.5,), (0, 1)),
        ("1 to 9 requests a second, or 0 for no limit", (0, 1, 9), (-1, 10)),
    ],
)
def test_a_phrase_is_parsed_as_a_range(
    phrase: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert all(plugin.in_range(value, phrase) for value in inside)
    assert not any(plugin.in_range(value, phrase) for value in outside)


@pytest.mark.parametrize("phrase", ["1-60", "up to 3", "above 1", "1 to 60; 70", ""])
def test_a_phrase_that_is_not_a_range_is_refused(phrase: str) -> None:
    with pytest.raises(ValueError, match="is not a range"):
        plugin.in_range(1, phrase)


@pytest.mark.parametrize("role", ROLES)
def test_every_number_has_a_range_that_its_description_repeats(role: str) -> None:
    checks = load(role, "meta/checks.yml")
    described = options(role)
    numbers = {
        name
        for name, option in described.items()
        if {option["type"], option.get("elements")} & {"int", "float"}
    }
    assert set(checks.get("ranges", {})) == numbers
    for name, phrase in checks.get("ranges", {}).items():
        plugin.in_range(1, phrase)
        bounds = re.match(r"(\S+ to \S+?|at least \S+|above \S+, (at most|below) \S+?)(?= |,|$)", phrase)
        assert bounds is not None
        assert bounds[0] in described[name]["description"], name
    for name, format_name in checks.get("formats", {}).items():
        assert name in described
        assert format_name in plugin.FORMATS


@pytest.mark.parametrize("role", ROLES)
def test_every_message_names_its_variable(role: str) -> None:
    known = "|".join(sorted(name for other in ROLES for name in options(other)))
    for rule in load(role, "meta/checks.yml").get("rules", []):
        assert rule.keys() <= {"each", "that", "message"}
        assert re.match(rf"({known}|private_address)\b", rule["message"]), rule


@pytest.mark.parametrize(
    ("value", "option", "converted"),
    [
        ("5", {"type": "int"}, 5),
        ("false", {"type": "bool"}, False),
        ("0.5", {"type": "float"}, 0.5),
        (6, {"type": "str"}, "6"),
        (["80"], {"type": "list", "elements": "int"}, [80]),
        (False, {"type": "str", "choices": ["off", "on"]}, "off"),
    ],
)
def test_values_that_ansible_converts_are_accepted(
    value: Any, option: dict[str, Any], converted: Any
) -> None:
    assert plugin.convert("redis_x", value, option) == (converted, None)


@pytest.mark.parametrize(
    ("value", "option", "fault"),
    [
        ("many", {"type": "int"}, "redis_x 'many' is not an integer."),
        ("maybe", {"type": "bool"}, "redis_x 'maybe' is not true or false."),
        ("on", {"type": "str", "choices": ["a", "b", "c"]}, "redis_x 'on' is invalid: a, b or c."),
        (["a"], {"type": "list", "elements": "int"}, "redis_x ['a'] is not a list, each element an integer."),
        (
            "80,443",
            {"type": "list"},
            "redis_x is text, not a list: write it as JSON, -e '{\"redis_x\": […]}'.",
        ),
        (
            "a=b",
            {"type": "dict"},
            "redis_x is text, not a mapping: write it as JSON, -e '{\"redis_x\": {…}}'.",
        ),
        (None, {"type": "str"}, "redis_x has no value: remove it or give it one."),
        (["word"], {"type": "int", "no_log": True}, "redis_x is not an integer."),
    ],
)
def test_values_that_ansible_does_not_convert_are_refused(
    value: Any, option: dict[str, Any], fault: str
) -> None:
    assert plugin.convert("redis_x", value, option) == (value, fault)


def test_an_unknown_variable_is_refused_with_a_suggestion() -> None:
    known = {"redis": {"redis_port"}, "redis_node": {"redis_node_count"}}
    names = [
        "redis_port",
        "redis_prot",
        "redis_node_cuont",
        "redis_zzzzzz",
        "other_port",
        "redis",
        "_redis_x",
    ]
    assert list(plugin.unknown(names, known)) == [
        "redis_node_cuont is not a variable of role redis_node: did you mean redis_node_count?",
        "redis_prot is not a variable of role redis: did you mean redis_port?",
        "redis_zzzzzz is not a variable of role redis: roles/redis/README.md lists them.",
    ]


@pytest.mark.parametrize("text", ["10.0.0.0/8", "10.1.2.3", "::1", "2001:db8::/32", "10.0.0.5/8"])
def test_a_network_is_accepted(text: str) -> None:
    assert plugin.is_network(text)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0.300", "everywhere", "", "::/129"])
def test_text_that_is_not_a_network_is_refused(text: str) -> None:
    assert not plugin.is_network(text)


def play(tmp_path: Path, tasks: list[dict[str, Any]], *arguments: str, **variables: Any) -> str:
    """Run tasks for host c5 of the local fleet, which need not exist. Returns the output."""
    facts = {
        "all_ipv4_addresses": ["10.0.0.11"],
        "memtotal_mb": 8000,
        "processor_vcpus": 4,
        "architecture": "x86_64",
        "cacheable": True,
    }
    own: dict[str, Any] = {
        f"redis_{user}_password": "0123456789abcdefghij" for user in ("app", "admin", "monitor")
    }
    own |= {"nginx_lb_admin_networks": ["10.0.0.0/8"], "firewall_admin_networks": []}
    playbook = tmp_path / "play.yml"
    tasks = [{"ansible.builtin.set_fact": facts}, *tasks]
    playbook.write_text(json.dumps([{"hosts": "c5", "gather_facts": False, "vars": own, "tasks": tasks}]))
    command = [sys.executable, "-m", "ansible", "playbook", f"--inventory={ROOT / 'inventory' / 'local'}"]
    extra = {"private_address": "10.0.0.11", "fleet_state": str(tmp_path)} | variables
    done = subprocess.run(
        [*command, f"--extra-vars={json.dumps(extra)}", *arguments, str(playbook)],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PIXEL_FLEET": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == ("failed=0" in done.stdout), done.stdout + done.stderr
    return done.stdout + done.stderr


def check(tmp_path: Path, task: dict[str, Any], *arguments: str, **variables: Any) -> str:
    """Check the arguments of c5. Returns the output."""
    return play(tmp_path, [{"pixel.endpoint.check_arguments": task}], *arguments, **variables)


def messages(
    folder: Path, roles: list[str], cases: dict[str, dict[str, Any]], **variables: Any
) -> dict[str, str]:
    """Check the arguments of c5 with the variables of each case. Returns the error of each case, or ""."""
    checks = [
        {
            "pixel.endpoint.check_arguments": {"roles": roles},
            "vars": own,
            "register": f"refused_{name}",
            "ignore_errors": True,
        }
        for name, own in cases.items()
    ]
    found = ", ".join(f"'{name}': refused_{name}.msg if refused_{name} is failed else ''" for name in cases)
    report = {"content": f"{{{{ {{ {found} }} | to_json }}}}", "dest": str(folder / "report.json")}
    write = {"ansible.builtin.copy": report | {"mode": "0600"}, "delegate_to": "localhost", "become": False}
    play(folder, [*checks, write], **variables)
    errors: dict[str, str] = json.loads((folder / "report.json").read_text())
    return errors


def test_all_faults_of_all_roles_are_reported_at_once(tmp_path: Path) -> None:
    invalid = {
        "redis_port": 80,
        "pixel_app_port": 79,
        "pixel_app_instances": 2,
        "redis_appendfsync": "sometimes",
        "redis_app_password": "short-word",
        "redis_monitor_password": "0123456789abcdefghij\x07",
        "pixel_app_workers": "many",
        "pixel_app_canvas_width": 65536,
        "pixel_app_redis_username": "o'brien",
        "pixel_app_redis_password": "back\tslash",
        "firewall_connections": 5,
        "firewall_fleet_udp_ports": [0],
        "firewall_fleet_protocols": ["VRRP"],
        "nginx_lb_limit_rat": 20,
        "nginx_lb_weight": -3,
        "firewall_ssh_networks": ["everywhere"],
        "logs_forward_to": "collector",
    }
    output = check(tmp_path, {"roles": ROLES}, **invalid)
    assert "failed=1" in output
    for line in (
        "redis_port 80 is out of range: 1024 to 65535.",
        "redis_port 80 is invalid: on c5 the app has this port (pixel_app_port, pixel_app_instances).",
        "redis_appendfsync 'sometimes' is invalid: always or everysec.",
        "redis_app_password is invalid: it needs at least 20 characters",
        "redis_monitor_password is invalid: it needs at least 20 characters, and neither white space",
        "monitoring_redis_password is invalid: it needs at least 20 characters, and neither white space",
        "pixel_app_workers 'many' is not an integer.",
        "is out of range: at most 16777216 pixels, as in 4096 times 4096.",
        "pixel_app_redis_url and pixel_app_redis_username must contain neither white space",
        "pixel_app_redis_password is invalid: it must contain neither white space nor control characters.",
        "firewall_connections 5 is out of range: 100 to 65535, or 0 for no limit.",
        "firewall_fleet_udp_ports 0 is out of range: 1 to 65535.",
        "firewall_fleet_protocols VRRP is invalid: choose from ah, esp, gre, ospf, sctp, vrrp.",
        "nginx_lb_limit_rat is not a variable of role nginx_lb: did you mean nginx_lb_limit_rate?",
        "nginx_lb_weight -3 is out of range: 1 to 1000, or 0 to derive it from the vCPUs.",
        "firewall_ssh_networks 'everywhere' is not a network such as 10.0.0.0/8.",
        "logs_forward_to 'collector' is invalid: host:port, or empty.",
    ):
        assert line in " ".join(output.split()), output
    assert "short-word" not in output


def test_variables_of_roles_that_run_elsewhere_are_checked_if_they_are_set(tmp_path: Path) -> None:
    output = check(tmp_path, {"others": ROLES}, nginx_lb_weight=-3, redis_app_password="")
    assert "nginx_lb_weight -3 is out of range" in output
    # Only the hosts that run the role require its passwords.
    assert "redis_app_password" not in output


def test_arguments_on_the_command_line_are_text(tmp_path: Path) -> None:
    given = ("-e", "redis_port=6380 firewall_enabled=false monitoring_slo_latency=0.95 nginx_lb_tls=off")
    assert "failed=0" in check(tmp_path, {"roles": ROLES}, *given)
    output = check(tmp_path, {"roles": ROLES}, "-e", "firewall_public_ports=80,443")
    assert "firewall_public_ports is text, not a list" in output


T2_ALONE = {"nginx_lb_backup": "{{ inventory_hostname == 't2' }}"}


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"nginx_lb_method": "fastest"}, "nginx_lb_method 'fastest' is invalid"),
    ({"nginx_lb_method": "hash", "nginx_lb_hash_key": "a b;"}, "nginx_lb_hash_key 'a b;' is invalid"),
    ({"nginx_lb_clusters": {"x/y": "c5"}}, "can't be part of a path: x/y"),
    ({"nginx_lb_clusters": {"big": "m5"}}, "names m5, of which there is no backend"),
    ({"nginx_lb_weights": "explicit"}, "t2 has no nginx_lb_weight: set one"),
    ({"nginx_lb_weights": "measured"}, "t2 has no nginx_lb_measured: run playbooks/calibrate.yml"),
    (
        T2_ALONE | {"nginx_lb_method": "hash"},
        "nginx_lb_method hash supports no backups, and t2 has nginx_lb_backup",
    ),
    (T2_ALONE | {"nginx_lb_sticky": True}, "nginx_lb_sticky supports no backups"),
    ({"nginx_lb_backup": True}, "at least one host must not be a backup"),
    ({"nginx_lb_address": "10.0.0.100"}, "is not an IPv4 address with its prefix such as 10.0.0.100/24"),
    (
        {"nginx_lb_address": "10.0.0.100/24"},
        "needs another balancer that can take it over: group nginx_lb has c5.",
    ),
    ({"nginx_lb_address": "10.0.0.11/24"}, "is the private_address of c5, t2"),
    ({"nginx_lb_address": "10.0.0.100/24", "nginx_lb_health_checks": False}, "needs the controller"),
    (
        {"nginx_lb_address": "10.0.0.100/32", "nginx_lb_address_allocation": "eipalloc-1"},
        "nginx_lb_address_allocation needs the instance_id of c5",
    ),
]


@pytest.fixture(scope="module")
def contradictions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The error of each of CONTRADICTIONS; a play for each value of nginx_lb_backup, which others read."""
    plays: dict[Any, dict[str, dict[str, Any]]] = {}
    for number, (variables, _) in enumerate(CONTRADICTIONS):
        own = {name: value for name, value in variables.items() if name != "nginx_lb_backup"}
        plays.setdefault(variables.get("nginx_lb_backup"), {})[str(number)] = own
    errors: dict[str, str] = {}
    for backup, cases in plays.items():
        everywhere = {} if backup is None else {"nginx_lb_backup": backup}
        errors |= messages(tmp_path_factory.mktemp("balancer"), ["nginx_lb"], cases, **everywhere)
    return [errors[str(number)] for number in range(len(CONTRADICTIONS))]


@pytest.mark.parametrize("number", range(len(CONTRADICTIONS)), ids=lambda number: CONTRADICTIONS[number][1])
def test_a_balancer_whose_variables_contradict_each_other_is_refused(
    contradictions: list[str], number: int
) -> None:
    assert CONTRADICTIONS[number][1] in " ".join(contradictions[number].split())


WRONG = [
    ("redis_port", 80),
    ("redis_address", "10.255.255.1"),
    ("redis_appendfsync", "sometimes"),
    ("redis_maxmemory_mb", 1),
    ("redis_app_user", "default"),
    ("redis_app_password", "short"),
    ("redis_maxclients", "many"),
    ("redis_backup_keep", 0),
    ("redis_backup_keep_daily", -1),
    ("redis_backup_repository", "ftp://10.0.0.1"),
    ("redis_backup_password", "short"),
    ("redis_backup_environment", {"key": "x"}),
    ("redis_backup_name", "a b"),
    ("redis_backup_host", "elsewhere"),
    ("redis_backup_memory_max", "plenty"),
    ("redis_hosts", ["c5", "t2"]),
    ("redis_voter_port", 80),
    ("redis_cluster_user", "admin"),
    ("pixel_app_port", 70000),
    ("pixel_app_instances", 17),
    ("pixel_app_candidate_port", 8000),
    ("pixel_app_workers", 0),
    ("pixel_app_keep_releases", 1),
    ("pixel_app_canvas_width", -5),
    ("pixel_app_canvas_height", 65536),  # by 1024
    ("pixel_app_release", "../up"),
    ("pixel_app_redis_url", "http://10.0.0.1"),
    ("pixel_app_redis_ca", "/etc/ssl/ca.pem"),
    ("pixel_app_memory_max", "plenty"),
    ("pixel_app_settings", {"CANVAS": "1"}),
    ("pixel_app_log_level", "loud"),
    ("nginx_lb_group", "nobody"),
    ("nginx_lb_body_limit", "2 megabytes"),
    ("nginx_lb_keepalive", 0),
    ("nginx_lb_local_socket", "run/pixel.sock"),
    ("nginx_lb_factors", {"c5": 0}),
    ("nginx_lb_weights", "guessed"),
    ("nginx_lb_reload_interval", 5),
    ("nginx_lb_dead_band", 5),
    ("nginx_lb_tls", "selfsigned"),  # without a name
    ("nginx_lb_hsts", 3600),  # without TLS
    ("nginx_lb_health_fails", 0),
    ("nginx_lb_credit_source", "cloudwatch"),
    ("nginx_lb_limit_rate", -1),
    ("nginx_lb_limit_burst", "many"),
    ("nginx_lb_limit_expensive_rate", -1),
    ("nginx_lb_limit_expensive_burst", -1),
    ("nginx_lb_limit_expensive_connections", 65537),
    ("nginx_lb_body_timeout", 0),
    ("nginx_lb_admin_networks", ["10.0.0.0/33"]),
    ("nginx_lb_trusted_proxies", ["0.0.0.0/0"]),
    ("nginx_lb_status_port", 80),
    ("nginx_lb_address", "10.0.0.100"),
    ("nginx_lb_address_allocation", "eipalloc-1"),  # without an address
    ("nginx_lb_address_region", "Frankfurt"),
    ("redis_monitor_password", "short"),
    ("redis_monitor_user", "admin"),
    ("monitoring_group", "nobody"),
    ("monitoring_address", "everywhere"),
    ("monitoring_scrape_seconds", 0),
    ("monitoring_retention_days", 0),
    ("monitoring_slo_least_requests", 0),
    ("monitoring_slo_availability", 1),
    ("monitoring_least_credits", 0),
    ("monitoring_webhook_url", "example.org/hook"),
    ("monitoring_mail_to", "ops@example.org"),
    ("firewall_public_ports", [0]),
    ("firewall_fleet_ports", [80]),
    ("firewall_admin_networks", ["10.0.0.0/40"]),
    ("firewall_ssh_networks", ["everywhere"]),
    ("firewall_fleet_udp_ports", [0]),
    ("firewall_redis_bus_ports", [0]),
    ("firewall_fleet_protocols", ["VRRP"]),
    ("firewall_vrrp_peers", ["c5"]),
    ("firewall_connections", 5),
    ("firewall_rollback", 1),
    ("logs_journal_max_mb", 1),
    ("logs_forward_to", "collector"),
]


# Variables whose error depends on other variables of the list.
ALONE = (
    "firewall_fleet_ports",
    "nginx_lb_hsts",
    "nginx_lb_tls",
    "pixel_app_candidate_port",
    "pixel_app_canvas_height",
)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error message of each variable in ALONE; under the empty name, the one of all others together."""
    folder = tmp_path_factory.mktemp("wrong")
    wrong = {name: {name: value} for name, value in WRONG if name in ALONE}
    wrong[""] = {name: value for name, value in WRONG if name not in ALONE}
    return messages(folder, ROLES, wrong)


@pytest.mark.parametrize("variable", [variable for variable, _ in WRONG])
def test_a_wrong_variable_is_named(refusals: dict[str, str], variable: str) -> None:
    if variable in ALONE:
        assert variable in refusals[variable]
    else:
        assert re.search(rf"^- {variable}\b", refusals[""], re.M), refusals[""]
