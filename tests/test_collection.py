"""The repository as the collection pixel.endpoint: contents, full names, and use from another project."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())
COLLECTION = "ansible_collections.pixel.endpoint"
PRIVATE = (
    ".venv/secret",
    ".fleet/pixel/id_ed25519",
    ".cache/secret",
    "backups/local/secret.rdb",
    "bench/out/secret",
    "inventory/production/credentials/redis_app",
    "app/.hypothesis/secret",
    "app/.mypy_cache/secret",
    "app/src/pixel/__pycache__/secret.pyc",
)
INVENTORY = """
all:
  vars: {ansible_connection: local, redis_app_password: a, redis_admin_password: b, redis_monitor_password: c}
  children:
    redis: {hosts: {one: {private_address: 10.0.0.1}}}
    pixel_app: {hosts: {one: }}
    nginx_lb: {hosts: {one: }}
    monitoring: {hosts: {one: }}
"""


def ansible(program: str, *arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Run one of Ansible's programs without the repository's ansible.cfg, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"HOME": str(cwd), "ANSIBLE_NOCOLOR": "1", **variables}
    command: list[str | Path] = [Path(sys.prefix, "bin", program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files under version control, and files that must not be published."""
    folder = tmp_path_factory.mktemp("work") / "a clone"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    return folder


@pytest.fixture(scope="module")
def project(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Ansible project in which the collection is installed."""
    folder = tmp_path_factory.mktemp("project")
    ansible("ansible-galaxy", "collection", "build", "--output-path", folder / "dist", cwd=clone)
    (archive,) = (folder / "dist").iterdir()
    ansible(
        "ansible-galaxy",
        "collection",
        "install",
        "--offline",
        archive,
        "-p",
        folder / "collections",
        cwd=folder,
    )
    (folder / "hosts.yml").write_text(INVENTORY)
    (folder / "ansible.cfg").write_text("[defaults]\ncollections_path = collections\ninventory = hosts.yml\n")
    return folder


def test_the_archive_contains_no_private_file(project: Path) -> None:
    (archive,) = (project / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
    assert not [name for name in names if re.search(r"secret|(^|/)credentials/|id_ed25519", name)]
    assert {name.split("/")[0] for name in names if name.startswith(".")} == set()
    assert not names & {"inventory", "tests", "molecule", "collections"}
    assert {f"roles/{role}/tasks/main.yml" for role in ROLES} < names


def test_another_project_uses_every_role_by_its_full_name(project: Path) -> None:
    roles = [{"role": f"pixel.endpoint.{role}"} for role in ROLES]
    (project / "play.yml").write_text(yaml.safe_dump([{"name": "Use", "hosts": "all", "roles": roles}]))
    ansible("ansible-playbook", "play.yml", "--syntax-check", cwd=project)
    tasks = ansible("ansible-playbook", "play.yml", "--list-tasks", cwd=project)
    assert set(re.findall(r"pixel\.endpoint\.(\w+) : ", tasks)) == set(ROLES)


def test_another_project_runs_the_playbooks_by_their_full_names(project: Path) -> None:
    ansible("ansible-playbook", "pixel.endpoint.site", "--syntax-check", cwd=project)
    tasks = ansible("ansible-playbook", "pixel.endpoint.site", "--list-tasks", cwd=project)
    assert set(re.findall(r"pixel\.endpoint\.(\w+) : ", tasks)) == set(ROLES)


def test_filters_are_called_by_their_full_names() -> None:
    """Short filter names do not resolve in an installed collection, and no dry run renders all templates."""
    names = {
        name
        for path in (ROOT / "plugins/filter").glob("*.py")
        for name in importlib.import_module(f"{COLLECTION}.plugins.filter.{path.stem}")
        .FilterModule()
        .filters()
    }
    assert {"workspace", "pixel_instances"} <= names
    short = re.compile(rf"(\||map\(')\s*({'|'.join(sorted(names))})\b")
    sources = [*ROOT.glob("roles/**/*.*"), *ROOT.glob("playbooks/**/*.*"), *ROOT.glob("inventory/**/*.*")]
    texts = {path: path.read_text() for path in sources if path.suffix in (".yml", ".j2")}
    assert {str(path): found[0] for path, text in texts.items() if (found := short.search(text))} == {}


def test_files_are_written_to_the_project_and_never_into_the_collection(project: Path) -> None:
    """The next installation replaces the collection's directory and its contents."""
    play = {
        "name": "Show",
        "hosts": "one",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.import_role": {"name": "pixel.endpoint.redis", "tasks_from": "empty.yml"}},
            {"ansible.builtin.import_role": {"name": "pixel.endpoint.pixel_app", "tasks_from": "empty.yml"}},
        ],
    }
    # Role defaults are available only to tasks of the role.
    for role, names in {
        "redis": ["redis_backup_dir"],
        "pixel_app": ["pixel_app_cache", "pixel_app_source"],
    }.items():
        shown = {"name": "Show", "ansible.builtin.debug": {"msg": [f"{{{{ {name} }}}}" for name in names]}}
        path = project / "collections/ansible_collections/pixel/endpoint/roles" / role / "tasks/empty.yml"
        path.write_text(yaml.safe_dump([shown]))
    (project / "show.yml").write_text(yaml.safe_dump([play]))
    shown_paths = ansible("ansible-playbook", "show.yml", cwd=project)
    assert f'"{project}/backups/{project.name}"' in shown_paths
    assert f'"{project}/.cache"' in shown_paths
    assert f'"{project}/collections/ansible_collections/pixel/endpoint/app"' in shown_paths


@pytest.mark.parametrize("playbook", ["site.yml", "playbooks/site.yml", "playbooks/nginx_lb.yml"])
def test_a_playbook_runs_from_any_directory_without_ansible_cfg(
    clone: Path, tmp_path: Path, playbook: str
) -> None:
    """Ansible reads an ansible.cfg only from the current directory, and only if others can't write to it."""
    (tmp_path / "hosts.yml").write_text(INVENTORY)
    tasks = ansible("ansible-playbook", "-i", "hosts.yml", clone / playbook, "--list-tasks", cwd=tmp_path)
    assert "pixel.endpoint.nginx_lb : " in tasks
