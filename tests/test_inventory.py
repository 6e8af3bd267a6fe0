"""Inventories and ansible.cfg: valid inventories, and the errors that the first play reports.

No test connects to a host.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

VALID: dict[str, Any] = {
    "redis": {"hosts": {"a": {"private_address": "10.0.0.1"}}},
    "pixel_app": {"hosts": {"a": {}, "b": {"private_address": "10.0.0.2"}}},
    "nginx_lb": {"hosts": {"a": {}}},
}


MANAGED = {
    "pixel_app": {
        "hosts": {"a": {"private_address": "10.0.0.1"}, "b": {"private_address": "10.0.0.2"}},
        "vars": {"pixel_app_redis_url": "rediss://redis.example:6379/0"},
    },
    "nginx_lb": VALID["nginx_lb"],
}


# A play that connects to a host fails immediately.
UNREACHABLE = json.dumps(
    {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ interpreter | default('/nonexistent') }}",
    }
)


def play(
    tmp_path: Path, inventory: dict[str, Any], *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "hosts.yml"
    path.write_text(json.dumps(inventory))
    return subprocess.run(
        [
            *(Path(sys.prefix, "bin", "ansible-playbook"), "--inventory", path, *arguments),
            *("--extra-vars", UNREACHABLE),
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"} | environment,
        text=True,
        capture_output=True,
        check=False,
    )


def validate(tmp_path: Path, inventory: dict[str, Any]) -> str:
    """Return the output of the first play, which connects to no host."""
    done = play(tmp_path, inventory, "playbooks/validate.yml")
    return done.stdout.split("PLAY [Validate the hosts]")[0] if done.returncode else done.stdout


def test_a_valid_inventory_passes(tmp_path: Path) -> None:
    assert "fatal" not in validate(tmp_path, VALID)


@pytest.mark.parametrize("has_python", [False, True])
def test_a_host_without_python_is_named_with_a_fix(tmp_path: Path, has_python: bool) -> None:
    """If Python exists and facts can't be gathered for another reason, that reason is reported."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for path in Path("/usr/bin").iterdir():
        if has_python or not path.name.startswith("python"):
            (programs / path.name).symlink_to(path)
    healthy = VALID["redis"]["hosts"]["a"] | {"interpreter": sys.executable}
    inventory = VALID | {"redis": {"hosts": {"a": healthy}}}
    done = play(tmp_path, inventory, "playbooks/validate.yml", PATH=str(programs))
    words = " ".join(done.stdout.split())
    fix = "b has no python3, which Ansible needs: apt-get install python3"
    assert (fix in words) == (not has_python), words
    assert ("/nonexistent" in words.partition("TASK [Report the failure]")[2]) == has_python
    assert "fatal: [a]" not in words
    assert done.returncode != 0
    assert re.findall(r"changed=(\d+)", done.stdout) == ["0", "0", "0"]


def test_a_managed_redis_replaces_the_group(tmp_path: Path) -> None:
    assert "fatal" not in validate(tmp_path, MANAGED)
    site = play(tmp_path, MANAGED, "site.yml", "--list-hosts")
    assert site.returncode == 0
    hosts = {
        name: int(count)
        for name, count in re.findall(r": (.+?) \(\d+ of 10\)\tTAGS[^(]*\((\d+)\):", site.stdout)
    }
    assert hosts["Redis"] == 0
    assert hosts["Prepare the app"] == hosts["Switch the app, host by host"] == 2
    assert hosts["Balancer"] == 1


@pytest.mark.parametrize("playbook", ["backup", "restore"])
def test_backups_of_a_managed_redis_are_refused(tmp_path: Path, playbook: str) -> None:
    done = play(tmp_path, MANAGED, f"playbooks/{playbook}.yml")
    assert done.returncode != 0
    assert "its provider makes the backups and restores them" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"redis": None}, "no host in group 'redis'"),
        ({"pixel_app": {"hosts": {}}}, "no host in group 'pixel_app'"),
        ({"nginx_lb": None}, "no host in group 'nginx_lb'"),
        ({"redis": {"hosts": {"a": {}, "b": {}}}}, "Group 'redis' has 2 hosts (a, b)"),
        ({"pixel_app": {"hosts": {"a": {}, "c": {}}}}, "No 'private_address' for c."),
        ({"history": {"hosts": {"b": {}, "d": {}}}}, "Group 'history' has d, which group 'pixel_app'"),
        (
            {"pixel_app": {"hosts": {"a": {}, "b": {"private_address": "b.example"}}}},
            "'b.example' of b is not",
        ),
        (
            {"pixel_app": {"hosts": {"a": {}, "b": {"private_address": "10.0.0.256"}}}},
            "'10.0.0.256' of b is not",
        ),
        (
            {"pixel_app": {"hosts": {"a": {}, "b": {"private_address": "10.0.0.1"}}}},
            "is not a unique IPv4 address",
        ),
    ],
)
def test_an_invalid_inventory_is_reported_with_a_fix(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    inventory = {name: group for name, group in (VALID | change).items() if group is not None}
    assert message in " ".join(validate(tmp_path, inventory).split())


def test_an_empty_inventory_is_reported(tmp_path: Path) -> None:
    assert "no host in group 'redis'" in " ".join(validate(tmp_path, {"all": {}}).split())


def test_the_example_is_complete(tmp_path: Path) -> None:
    # With credentials, as after the first run.
    shutil.copytree(ROOT / "inventory" / "example", tmp_path / "example")
    (tmp_path / "example" / "credentials").mkdir()
    (tmp_path / "example" / "credentials" / "redis_app").write_text("abcdefgh\n")
    listing = subprocess.run(
        [Path(sys.prefix, "bin", "ansible-inventory"), "--inventory", tmp_path / "example", "--list"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    groups = json.loads(listing.stdout)
    variables = groups["_meta"]["hostvars"]
    for group in VALID:
        assert groups[group]["hosts"]
        assert all(variables[host]["private_address"] for host in groups[group]["hosts"])


def test_a_dry_run_stores_no_password(tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    shown = {
        "ansible.builtin.debug": {
            "msg": "<{{ lookup('pixel.endpoint.credential', '" + str(tmp_path / "new" / "one") + "') }}>"
        }
    }
    playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [shown]}]))

    def password(*arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "ansible",
            "playbook",
            "--inventory=localhost,",
            *arguments,
            str(playbook),
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search("<([A-Za-z0-9]{40})>", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    password("--check")
    assert not (tmp_path / "new").exists()
    kept = password()
    assert (tmp_path / "new" / "one").read_text().strip() == kept
    # A dry run uses a stored password, with the line end of any editor.
    (tmp_path / "new" / "one").write_bytes(kept.encode() + b"\r\n")
    assert password("--check") == kept


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository's Ansible part, in a directory with a space in its name."""
    copy = tmp_path / "a clone"
    for name in ("collections", "inventory", "playbooks", "plugins", "roles"):
        ignored = shutil.ignore_patterns("credentials", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("ansible.cfg", "site.yml", "Makefile"):
        shutil.copy(ROOT / name, copy)
    return copy


def ansible(program: str, *arguments: str | Path, cwd: Path, **environ: str) -> str:
    """Run an Ansible program in a directory; return its output on one line."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    done = subprocess.run(
        [Path(sys.prefix, "bin", program), *arguments],
        cwd=cwd,
        env=inherited | {"ANSIBLE_NOCOLOR": "1"} | environ,
        text=True,
        capture_output=True,
        check=False,
    )
    return " ".join((done.stdout + done.stderr).split())


def test_the_local_fleet_is_reached_from_a_path_with_spaces(tree: Path) -> None:
    output = ansible("ansible", "c5", "-m", "debug", "-a", "var=ansible_ssh_common_args", cwd=tree)
    arguments = re.search("ansible_ssh_common_args: (.*)", output)
    assert arguments, output
    common = str(yaml.safe_load(arguments[1]))
    assert shlex.split(common) == ["-F", str(tree / ".fleet" / "pixel" / "ssh_config")]


def test_aws_hosts_are_reached_from_a_path_with_spaces(tmp_path: Path) -> None:
    variables = yaml.safe_load((ROOT / "inventory/aws/group_vars/fleet.yml").read_text())
    values = {"inventory_dir": str(tmp_path / "a b"), "ec2_instance_id": "i-1"}
    arguments = re.sub(r"{{ (\w+) }}", lambda name: values[name[1]], variables["ansible_ssh_common_args"])
    shown = subprocess.run(
        ["ssh", "-G", *shlex.split(arguments), "host"], text=True, capture_output=True, check=True
    )
    assert f"userknownhostsfile {tmp_path}/a b/credentials/known_hosts\n" in shown.stdout


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ignored_settings_are_reported_with_a_fix(tree: Path, tmp_path: Path, elsewhere: bool) -> None:
    """Ansible ignores an ansible.cfg that is in a world-writable directory or not in the current one."""
    if not elsewhere:
        tree.chmod(0o777)
    cwd = tmp_path if elsewhere else tree
    inventory = tree / "inventory" / "example"
    (inventory / "credentials").mkdir()
    (inventory / "credentials" / "redis_app").write_text("hunter2\n")
    playbook = ("--inventory", inventory, "--extra-vars", UNREACHABLE, tree / "site.yml")
    output = ansible("ansible-playbook", *playbook, cwd=cwd)
    assert f"Ansible doesn't use {tree}/ansible.cfg: " in output
    assert f"Type: export ANSIBLE_CONFIG='{tree}/ansible.cfg'" in output
    assert "was not found" not in output
    assert "hunter2" not in output
    output = ansible("ansible-playbook", *playbook, cwd=cwd, ANSIBLE_CONFIG=str(tree / "ansible.cfg"))
    assert "PLAY [Validate the hosts (1 of 10)]" in output


def test_make_sets_ansible_config(tree: Path) -> None:
    tree.chmod(0o777)
    # Make names the directory when `make test` runs this, even with --silent.
    show = ("--silent", "--no-print-directory", "--eval", "show: ; @echo $$ANSIBLE_CONFIG", "show")
    done = subprocess.run(["make", *show], cwd=tree, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == str(tree / "ansible.cfg")


INI = "[redis]\na private_address=10.0.0.1\n[pixel_app]\na\n[nginx_lb]\na\n"


@pytest.mark.parametrize("name", ["hosts", "hosts.ini", "hosts.yml"])
def test_only_host_files_of_an_inventory_directory_are_read(tmp_path: Path, name: str) -> None:
    inventory = tmp_path / "production"
    files = {
        # As editors on Windows save it.
        name: json.dumps(VALID) if name.endswith(".yml") else INI.replace("\n", "\r\n"),
        "group_vars/all.yml": "domain: example.com",
        "tls/fullchain.pem": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "tls/privkey.pem": "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n",
        "credentials/redis_app": "hunter2",
        "notes.txt": "call Ops",
        "known_hosts": "a ssh-ed25519 AAAA",
    }
    for path, text in files.items():
        (inventory / path).parent.mkdir(parents=True, exist_ok=True)
        (inventory / path).write_text(text)
    listing = subprocess.run(
        [Path(sys.prefix, "bin", "ansible-inventory"), "--inventory", inventory, "--list"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert listing.returncode == 0, listing.stderr
    assert not listing.stderr
    groups = json.loads(listing.stdout)
    hosts = groups["_meta"]["hostvars"]
    assert set(hosts) == ({"a", "b"} if name.endswith(".yml") else {"a"})
    assert hosts["a"]["private_address"] == "10.0.0.1"
    assert hosts["a"]["domain"] == "example.com"
    assert groups["redis"]["hosts"] == ["a"]


def test_a_clone_with_autocrlf_has_lf_line_endings(tmp_path: Path) -> None:
    """Scripts with CR LF do not run on hosts."""
    clone = tmp_path / "clone"
    options = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf")
    subprocess.run(["git", *options, "clone", "--quiet", ROOT, clone], check=True, capture_output=True)
    listing = subprocess.run(
        ["git", "ls-files", "--eol"], cwd=clone, text=True, capture_output=True, check=True
    )
    assert len(listing.stdout.splitlines()) > 100
    assert not [line for line in listing.stdout.splitlines() if "w/crlf" in line or "w/mixed" in line]


# Actions that open no connection, and so never become another user.
ACTIONS_WITHOUT_CONNECTION = {
    f"ansible.builtin.{name}"
    for name in (
        "add_host",
        "assert",
        "debug",
        "fail",
        "group_by",
        "import_tasks",
        "include_tasks",
        "set_fact",
    )
}


def control_node_tasks(
    node: dict[str, Any], delegated: bool = False, become: object = None
) -> Iterator[tuple[str, object]]:
    """Yield the name and `ansible_become` of every task of a play or block that runs on the control node."""
    attributes = node.get("ansible.builtin.include_tasks", {})
    if isinstance(attributes, dict):
        node = node | attributes.get("apply", {})
        node["include"] = "apply" in attributes
    delegated = node.get("delegate_to", "localhost" if delegated else None) == "localhost"
    delegated = delegated or node.get("hosts") == "localhost"
    become = (node.get("vars") or {}).get("ansible_become", become)
    sections = ("pre_tasks", "tasks", "post_tasks", "block", "rescue", "always")
    children = [child for section in sections for child in node.get(section) or []]
    for child in children:
        yield from control_node_tasks(child, delegated, become)
    if delegated and not children and (node.get("include") or not ACTIONS_WITHOUT_CONNECTION & set(node)):
        yield node["name"], become


def test_control_node_tasks_never_use_sudo() -> None:
    """`ansible_become` in group_vars outranks the keyword `become`, so these tasks set the variable."""
    found = {}
    for path in sorted([*ROOT.glob("playbooks/**/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")]):
        document = yaml.safe_load(path.read_text())
        for node in document if isinstance(document, list) else []:
            for name, become in control_node_tasks(node):
                found[f"{path.relative_to(ROOT)}: {name}"] = become
    assert len(found) > 20
    assert [task for task, become in found.items() if become is not False] == []


def test_no_green_item_reads_like_a_fault() -> None:
    """Ansible prints each item of a loop: messages in items would be printed where all is well."""
    asserts = [
        (path, task)
        for path in sorted([*ROOT.glob("playbooks/**/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")])
        for task in assertions(yaml.safe_load(path.read_text()))
    ]
    assert len(asserts) > 20
    messages = [re.sub(r"[\w ]+: ", "", task["ansible.builtin.assert"]["fail_msg"]) for _, task in asserts]
    found = [
        f"{path.relative_to(ROOT)}: {task['name']}"
        for (path, task), message in zip(asserts, messages, strict=True)
        if re.fullmatch(r"{{ item[.]\w+ }}", message)
    ]
    assert found == []


def assertions(node: Any) -> Iterator[dict[str, Any]]:
    """Every task below a document that is an assert."""
    if isinstance(node, dict):
        if "ansible.builtin.assert" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from assertions(child)
