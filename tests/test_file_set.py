"""file_set installs files, directories and links in one module run."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args  # type: ignore[import-untyped]
from ansible_collections.pixel.endpoint.plugins.modules import file_set

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the module on entries as the action plugin prepares them; returns its result."""

    def run_module(*entries: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        files = [
            {key: str(value) if isinstance(value, Path) else value for key, value in entry.items()}
            for entry in entries
        ]
        with patch_module_args({"files": files} | arguments), pytest.raises(SystemExit):
            file_set.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run_module


def packed(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return base64.b64encode(zlib.compress(data)).decode()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


CHECK = {"_ansible_check_mode": True}
DIFF = {"_ansible_diff": True}


def test_a_set_is_installed_and_a_second_run_changes_nothing(run: Any, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    entries = (
        {"path": tmp_path / "a" / "b", "state": "directory"},
        {"path": tmp_path / "a" / "b" / "file", "data": packed("one\n"), "name": "service"},
        {"path": tmp_path / "a" / "secret", "data": packed(b"\0\xff"), "mode": "0600", "name": "service"},
        {"path": tmp_path / "link", "link": "a/b/file"},
        {"path": tmp_path / "old", "state": "absent"},
    )
    former = os.umask(0o077)
    try:
        result = run(*entries)
    finally:
        os.umask(former)
    assert result["changed"]
    assert result["changed_items"] == [
        str(tmp_path / "a/b"),
        "service",
        *map(str, (tmp_path / "link", tmp_path / "old")),
    ]
    assert result["changed_paths"] == [str(entry["path"]) for entry in entries]
    assert (tmp_path / "link").read_text() == "one\n"
    assert (tmp_path / "a" / "secret").read_bytes() == b"\0\xff"
    paths = ("a", "a/b", "a/b/file", "a/secret")
    assert [mode(tmp_path / path) for path in paths] == [0o755, 0o755, 0o644, 0o600]
    assert not (tmp_path / "old").exists()

    assert run(*entries) | {"invocation": None} == {
        "changed": False,
        "changed_items": [],
        "changed_paths": [],
        "diff": [],
        "invocation": None,
    }


def test_manual_changes_are_corrected(run: Any, tmp_path: Path) -> None:
    directory, file, other = tmp_path / "directory", tmp_path / "directory" / "file", tmp_path / "other"
    entries = (
        {"path": directory, "state": "directory"},
        {"path": file, "data": packed("wanted\n")},
        {"path": other, "data": packed("other\n"), "mode": "0600"},
    )
    run(*entries)
    directory.chmod(0o700)
    file.write_text("changed\n")
    other.chmod(0o666)
    before = other.stat().st_ino
    result = run(*entries, **DIFF)
    assert result["changed_paths"] == [str(entry["path"]) for entry in entries]
    assert (mode(directory), file.read_text(), mode(other)) == (0o755, "wanted\n", 0o600)
    # A mode is changed in place, without a new file.
    assert other.stat().st_ino == before
    assert [(diff["before"].split("\n")[0], diff["after"].split("\n")[0]) for diff in result["diff"]] == [
        ("mode: 0700", "mode: 0755"),
        ("changed", "wanted"),
        ("mode: 0666", "mode: 0600"),
    ]


def test_check_mode_reports_each_item_and_changes_nothing(run: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before\n")
    entries = (
        {"path": tmp_path / "new", "state": "directory"},
        {"path": tmp_path / "new" / "file", "data": packed("text\n"), "owner": "nobody-yet"},
        {"path": kept, "data": packed("after\n")},
        {"path": tmp_path / "link", "link": "kept"},
    )
    result = run(*entries, **CHECK, **DIFF)
    assert result["changed_paths"] == [str(entry["path"]) for entry in entries]
    assert [(diff["before"], diff["after"]) for diff in result["diff"]] == [
        ("", "directory\n"),
        ("", "text\n"),
        ("before\n", "after\n"),
        ("", "link to kept\n"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "before\n"


def test_a_secret_is_neither_in_the_diff_nor_in_the_result(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("former-password\n")
    for arguments in (CHECK | DIFF, DIFF, DIFF):
        result = run({"path": path, "data": packed("a-new-password\n"), "no_log": True}, **arguments)
        text = json.dumps(result)
        assert "password" not in text
        assert packed("a-new-password\n") not in text
    assert not result["changed"]


def test_nothing_changes_if_the_set_is_refused(run: Any, tmp_path: Path) -> None:
    file, secret = tmp_path / "file", tmp_path / "secret"
    file.write_text("before\n")
    entries = (
        {"path": tmp_path / "new", "state": "directory"},
        {"path": file, "data": packed("after\n")},
        {"path": secret, "data": packed("key: hidden-word\n"), "no_log": True},
    )
    command = f"sh -c 'cat %s{file} %s{secret}; stat --format=%%a %s; exit 3'".replace("%%", "%")
    for arguments in ({}, CHECK):
        result = run(*entries, validate=["true", command], **arguments)
        assert result["failed"]
        assert "ended with 3; nothing was changed" in result["msg"]
        assert "after\n" in result["msg"]
        assert "key: ********" in result["msg"]
        # The staged set is readable by its owner only.
        assert result["msg"].endswith("\n700")
        assert "hidden-word" not in json.dumps(result)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert file.read_text() == "before\n"
    missing = run(*entries, validate=["/no/such/program"])
    assert "/no/such/program" in missing["msg"]
    assert run(*entries, validate=["true"])["changed"]
    # Without a difference no validation runs.
    assert not run(*entries, validate=["false"])["changed"]


def test_links_are_replaced_and_not_followed(run: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious\n")
    planted = tmp_path / "planted"
    planted.symlink_to(target)
    assert run({"path": planted, "data": packed("new\n")})["changed"]
    assert (target.read_text(), planted.is_symlink(), planted.read_text()) == ("precious\n", False, "new\n")

    # Links in the path: in a directory that others can write to, and in one that only its owner can.
    open_to_all, own = tmp_path / "open", tmp_path / "own"
    for directory in (open_to_all, own):
        directory.mkdir()
        (directory / "link").symlink_to(tmp_path)
    open_to_all.chmod(0o777)
    refused = run({"path": open_to_all / "link" / "file", "data": packed("new\n")})
    assert "the symbolic link 'link' in this path is not followed" in refused["msg"]
    assert not (tmp_path / "file").exists()
    assert run({"path": own / "link" / "file", "data": packed("new\n")})["changed"]
    assert (tmp_path / "file").read_text() == "new\n"

    directory_link = tmp_path / "directory link"
    directory_link.symlink_to(own)
    assert "is a link, not a directory" in run({"path": directory_link, "state": "directory"})["msg"]
    # The link is removed, not its target.
    assert run({"path": directory_link, "state": "absent"})["changed"]
    assert own.is_dir()


def test_a_hard_link_is_replaced_and_its_other_name_is_unchanged(run: Any, tmp_path: Path) -> None:
    """A local user may have created a hard link to a foreign file at the destination."""
    precious, planted = tmp_path / "precious", tmp_path / "planted"
    precious.write_text("same\n")
    precious.chmod(0o600)
    planted.hardlink_to(precious)
    assert run({"path": planted, "data": packed("same\n"), "mode": "0666"})["changed"]
    assert (mode(precious), mode(planted)) == (0o600, 0o666)


def test_links_are_installed_and_corrected(run: Any, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.write_text("a file\n")
    entry = {"path": link, "link": "/nowhere/yet"}
    result = run(entry, **DIFF)
    assert (result["diff"][0]["before"], result["diff"][0]["after"]) == ("a file\n", "link to /nowhere/yet\n")
    assert os.readlink(link) == "/nowhere/yet"
    assert not run(entry)["changed"]
    assert run({"path": link, "link": "/elsewhere"})["changed"]
    assert os.readlink(link) == "/elsewhere"


def test_a_failed_write_leaves_the_whole_set_unchanged(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before\n")
    result = run(
        {"path": file, "data": packed("after\n")}, {"path": tmp_path / "no" / "file", "data": packed("x")}
    )
    assert result["msg"] == f"{tmp_path}/no/file: there is no directory {tmp_path}/no"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before\n"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "relative", "data": ""}, "must be absolute"),
        ({"path": "/etc/../x", "data": ""}, "must be absolute"),
        ({"path": "/etc/x/", "state": "directory"}, "'/' at its end"),
        ({"path": "/x", "data": packed(""), "mode": "u+x"}, "mode 'u+x' is invalid"),
        ({"path": "/x", "data": packed(""), "owner": "nobody-yet"}, "owner 'nobody-yet' is not known"),
        ({"path": "/x", "template": "x.j2"}, "read by the action plugin"),
        ({"path": "/x"}, "one of the following is required"),
        ({"path": "/x", "data": "", "state": "absent"}, "mutually exclusive"),
        ({"path": "/etc", "data": packed("")}, "/etc is a directory, not a file"),
    ],
)
def test_an_invalid_entry_is_refused(run: Any, entry: dict[str, Any], message: str) -> None:
    result = run(entry)
    assert result["failed"]
    assert message in result["msg"]


def test_a_duplicate_path_is_refused(run: Any, tmp_path: Path) -> None:
    entry = {"path": tmp_path / "x", "data": packed("")}
    assert run(entry, entry)["msg"] == f"duplicated in the set: {tmp_path / 'x'}"


# --- As a task: the action plugin renders, and evaluates conditions and handlers ---


@pytest.fixture
def play(tmp_path: Path) -> Any:
    """Run a role with one file_set task by ansible-playbook; returns the finished process."""

    def run_role(
        files: list[dict[str, Any]], *arguments: str, templates: dict[str, str] | None = None, **task: Any
    ) -> subprocess.CompletedProcess[str]:
        role = tmp_path / "roles" / "sample"
        set_task = {"name": "Install", "register": "done", "pixel.endpoint.file_set": {"files": files} | task}
        handlers = [
            {"name": name, "ansible.builtin.debug": {"msg": f"handled {name}"}}
            for name in ("First", "Second")
        ]
        shown = {"ansible.builtin.debug": {"msg": "items {{ done.changed_items | join(',') }}"}}
        # The same templates, rendered by ansible.builtin.template for comparison.
        expected = [
            {
                "ansible.builtin.template": {"src": name, "dest": f"{{{{ where }}}}.{name}", "mode": "0644"},
                "vars": {"item": "a", "other": 1},
            }
            for name in templates or {}
        ]
        texts = {f"templates/{name}": text for name, text in (templates or {}).items()}
        texts |= {
            "tasks/main.yml": json.dumps([set_task, shown, *expected]),
            "handlers/main.yml": json.dumps(handlers),
        }
        for name, text in texts.items():
            (role / name).parent.mkdir(parents=True, exist_ok=True)
            (role / name).write_text(text)
        (role / "files").mkdir(exist_ok=True)
        (role / "files" / "plain").write_bytes(b"{{ not rendered }}\n")
        playbook = tmp_path / "play.yml"
        playbook.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "roles": ["sample"]}]))
        environment = os.environ | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_ROLES_PATH": str(tmp_path / "roles"),
            "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
            "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
        }
        program = [
            sys.executable,
            "-m",
            "ansible",
            "playbook",
            "--inventory=localhost,",
            "--connection=local",
        ]
        variables = {"ansible_python_interpreter": sys.executable, "where": str(tmp_path / "out")}
        return subprocess.run(
            [*program, f"--extra-vars={json.dumps(variables)}", *arguments, str(playbook)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    (tmp_path / "out").mkdir()
    return run_role


def test_templates_are_rendered_as_by_the_template_module(play: Any, tmp_path: Path) -> None:
    templates = {
        "conf.j2": "# {{ ansible_managed }}\n{% if true %}\nyes {{ item }} {{ other }}\n{% endif %}\n"
        "{% include 'part.j2' %}",
        "part.j2": "back\\slash\n",
        "own.j2": "#jinja2: variable_start_string:'[[', variable_end_string:']]'\n[[ where ]] {{ kept }}\n",
    }
    files = [
        {"path": "{{ where }}/%s.conf", "template": "conf.j2", "each": ["a", "b"], "vars": {"other": 1}},
        {"path": "{{ where }}/own", "template": "own.j2"},
        {"path": "{{ where }}/plain", "src": "plain", "mode": "0755"},
        {"path": "{{ where }}/never", "content": "x", "when": "{{ where == '' }}"},
        {"path": "{{ where }}/none-%s", "content": "x", "each": []},
    ]
    done = play(files, templates=templates)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert (out / "a.conf").read_text() == "# Ansible managed\nyes a 1\nback\\slash"
    assert (out / "b.conf").read_text() == "# Ansible managed\nyes b 1\nback\\slash"
    assert (out / "own").read_text() == f"{out} {{{{ kept }}}}\n"
    assert (out / "a.conf").read_bytes() == (tmp_path / "out.conf.j2").read_bytes()
    assert (out / "own").read_bytes() == (tmp_path / "out.own.j2").read_bytes()
    assert (out / "plain").read_text() == "{{ not rendered }}\n"
    assert mode(out / "plain") == 0o755
    assert sorted(path.name for path in out.iterdir()) == ["a.conf", "b.conf", "own", "plain"]


def test_only_handlers_of_changed_entries_are_notified(play: Any, tmp_path: Path) -> None:
    files = [
        {"path": "{{ where }}/one", "content": "1\n", "notify": "First", "name": "one"},
        {"path": "{{ where }}/two", "content": "2\n", "notify": ["First", "Second"], "name": "two"},
    ]
    first = play(files)
    assert [first.stdout.count(f"handled {name}") for name in ("First", "Second")] == [1, 1], first.stdout
    assert "items one,two" in first.stdout
    (tmp_path / "out" / "one").unlink()
    second = play(files)
    assert [second.stdout.count(f"handled {name}") for name in ("First", "Second")] == [1, 0], second.stdout
    assert "items one\n" in second.stdout
    third = play(files)
    assert "handled" not in third.stdout
    assert "changed=0" in third.stdout


def test_a_secret_is_not_in_the_output(play: Any, tmp_path: Path) -> None:
    secret = "correct-horse-battery"
    files = [{"path": "{{ where }}/secret", "content": secret, "mode": "0600", "no_log": True}]
    for arguments in (("--check",), ()):
        done = play(files, "--diff", "-vvvv", *arguments)
        assert done.returncode == 0, done.stdout
        assert "The content is secret." in done.stdout
        assert secret not in done.stdout + done.stderr
        assert base64.b64encode(zlib.compress(secret.encode(), 9)).decode() not in done.stdout + done.stderr
    assert (tmp_path / "out" / "secret").read_text() == secret


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "/x", "template": "missing.j2"}, "missing.j2"),
        ({"path": "/x", "content": {"a": 1}}, "content must be text"),
        ({"path": "/x", "content": "", "mode": 420}, "mode must be a quoted octal number"),
        ({"path": "/x", "content": "", "each": "a"}, "each must be a list"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused(play: Any, entry: dict[str, Any], message: str) -> None:
    done = play([entry])
    assert done.returncode != 0
    assert message in done.stdout


def test_the_documentation_lists_every_option() -> None:
    documented = yaml.safe_load(file_set.DOCUMENTATION)["options"]["files"]["suboptions"]
    assert all(option["description"].endswith(".") for option in documented.values())
    assert yaml.safe_load(file_set.EXAMPLES)
    assert yaml.safe_load(file_set.RETURN).keys() == {"changed_items", "changed_paths"}
