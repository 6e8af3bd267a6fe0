"""The local fleet: its plan, and the error messages before a host runs."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bootstrap
import containers
import engine
import image
import layout
import pytest
import state
import yaml
from bootstrap import Problem

import fleet


def plan(name: str = "pixel", **environ: str) -> layout.Fleet:
    return layout.plan(name, ["c5", "t2:trixie"], environ)


class Engine(engine.Docker):
    """A stub that answers by a command's first two words; other commands succeed without output."""

    def __init__(self, **answers: str) -> None:
        super().__init__()
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(" ".join(args))
        answer = self.answers.get("_".join(args[:2]), "")
        return subprocess.CompletedProcess(args, 1 if answer == "none" else 0, answer, "")

    def calls(self, command: str) -> list[str]:
        return [asked for asked in self.asked if asked.startswith(command)]


def test_the_default_fleet_has_the_ports_that_the_readme_names() -> None:
    default = plan()
    assert default.url == "http://127.0.0.1:8080"
    assert [(host.name, host.suite) for host in default.hosts] == [("c5", "bookworm"), ("t2", "trixie")]
    assert default.hosts[0].cpu_shares > default.hosts[1].cpu_shares


def test_fleets_share_nothing() -> None:
    names = ("pixel", "test-default", "test-redis", "test-pixel_app", "test-nginx_lb")
    fleets = [plan(name) for name in names]
    assert len({one.subnet for one in fleets}) == len(fleets)
    assert len({host.ssh_port for one in fleets for host in one.hosts}) == 2 * len(fleets)
    assert len({one.url for one in fleets}) == len(fleets)
    assert plan("test-redis") == plan("test-redis")


@pytest.mark.parametrize("name", ["", "Pixel", "a b", "../x", "1st", "x" * 32])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(Problem, match="PIXEL_FLEET"):
        plan(name)


@pytest.mark.parametrize("port", ["80", "eighty", "70000", "-1"])
def test_an_invalid_port_is_refused(port: str) -> None:
    with pytest.raises(Problem, match="PIXEL_FLEET_PORT"):
        plan(PIXEL_FLEET_PORT=port)


def test_the_data_directory_must_be_an_absolute_path() -> None:
    assert plan(PIXEL_FLEET_DATA="/dev/shm").data == "/dev/shm"
    with pytest.raises(Problem, match="PIXEL_FLEET_DATA='shm'"):
        plan(PIXEL_FLEET_DATA="shm")


@pytest.mark.parametrize("subnet", ["10.0.0.0/30", "10.0.0.7/24", "here"])
def test_an_invalid_subnet_is_refused(subnet: str) -> None:
    with pytest.raises(Problem, match="PIXEL_FLEET_SUBNET"):
        plan(PIXEL_FLEET_SUBNET=subnet)


def test_a_port_in_use_is_reported_with_a_fix() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        host = plan(PIXEL_FLEET_PORT=str(port)).hosts[0]
        with pytest.raises(Problem, match=rf"port {port} .* is taken .*PIXEL_FLEET_PORT"):
            containers.require_ports(host)


def test_a_full_disk_is_reported_before_anything_is_created(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = SimpleNamespace(free=1024**3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    docker = engine.Docker()
    docker.command = ("echo", str(tmp_path))
    with pytest.raises(Problem, match=r"only 1\.0 GiB are free"):
        engine.require_disk_space(docker)


def test_a_missing_permission_for_docker_is_reported_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "docker"
    refusing.write_text("#!/bin/sh\necho 'permission denied while trying to connect' >&2; exit 1\n")
    refusing.chmod(0o755)
    docker = engine.Docker()
    docker.command = (str(refusing),)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Problem, match="usermod -aG docker"):
        docker.ensure()


def test_a_stale_pid_file_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    pid_file = tmp_path / "docker.pid"
    pid_file.write_text("1")  # Process 1 is not dockerd.
    engine.drop_stale(pid_file)
    assert not pid_file.exists()
    engine.drop_stale(pid_file)


def test_a_lost_or_damaged_key_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    one = plan()
    one.state.mkdir(parents=True)
    first = state.ensure_key(one)
    assert state.ensure_key(one).split()[:2] == first.split()[:2]
    (one.state / "id_ed25519.pub").unlink()
    assert state.ensure_key(one).split()[:2] == first.split()[:2]
    (one.state / "id_ed25519").write_text("half a ke")
    assert state.ensure_key(one).split()[:2] != first.split()[:2]


def test_one_command_runs_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    with (
        state.exclusive(plan()),
        pytest.raises(Problem, match="another command is running on fleet 'pixel'"),
        state.exclusive(plan()),
    ):
        pass


def test_without_mmdebstrap_the_public_image_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise Problem("mount: permission denied")

    monkeypatch.setattr(image, "apt_sources", lambda suite: ["deb http://mirror.example bookworm main"])
    monkeypatch.setattr(image, "_bootstrap", fails)
    docker = engine.Docker()
    docker.command = ("false",)
    assert image.base_image(docker, "bookworm") == "debian:bookworm-slim"
    assert "mount: permission denied" in capsys.readouterr().out


def test_port_and_subnet_are_kept_until_the_environment_changes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    named = {"PIXEL_FLEET_PORT": "8081", "PIXEL_FLEET_SUBNET": "172.29.200.0/24"}
    empty = {"PIXEL_FLEET_PORT": "", "PIXEL_FLEET_SUBNET": ""}
    assert state.remembered("pixel", empty)[:2] == ("local", ["c5", "t2"])
    assert plan(**state.remembered("pixel", empty)[2]) == plan()
    made = plan(**named)
    made.state.mkdir(parents=True)
    state.write(Engine(), made)
    for environ in ({}, empty):
        inventory, specs, defaults = state.remembered("pixel", environ)
        assert layout.plan("pixel", specs, defaults, inventory) == made
    *_, other = state.remembered("pixel", {"PIXEL_FLEET_PORT": "8082"})
    assert (plan(**other).url, plan(**other).subnet) == ("http://127.0.0.1:8082", made.subnet)


def test_a_fleet_keeps_its_inventory_and_its_hosts_until_another_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    inventory, hosts, environ = state.remembered("pixel", {"PIXEL_FLEET_PORT": "8081"}, "ha")
    made = layout.plan("pixel", hosts, environ, inventory)
    assert [host.name for host in made.hosts] == ["c5", "t2", "m5"]
    assert made.url == "http://172.29.0.254"
    # Hosts that inventory/local has too are the same there, so a fleet grows without losing its canvas.
    assert made.hosts[:2] == layout.plan("pixel", ["c5", "t2"], {"PIXEL_FLEET_PORT": "8081"}).hosts
    made.state.mkdir(parents=True)
    state.write(Engine(), made)
    assert json.loads((made.state / "fleet.json").read_text())["address"] == "172.29.0.254/24"
    inventory, hosts, environ = state.remembered("pixel", {})
    assert layout.plan("pixel", hosts, environ, inventory) == made
    assert state.remembered("pixel", {}, "local")[:2] == ("local", ["c5", "t2"])


@pytest.mark.parametrize("name", layout.HOSTS)
def test_an_inventory_has_the_hosts_that_make_up_creates(name: str) -> None:
    hosts = yaml.safe_load((bootstrap.ROOT / "inventory" / name / "hosts.yml").read_text())
    assert list(hosts["fleet"]["hosts"]) == layout.HOSTS[name]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("pixel old running image 8080 22000", "its port, address or another option changes"),
        ("pixel old running former 8080 22000", "its image changes from former to image"),
    ],
)
def test_the_loss_of_data_is_reported_with_its_reason(
    answer: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(containers, "require_disk_space", lambda docker: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one = plan(PIXEL_FLEET_PORT=port)
        refused = Engine(container_inspect=answer)
        with pytest.raises(Problem, match="is taken"):
            containers.ensure_container(refused, one, one.hosts[0], "image")
        assert not refused.calls("rm")
        # The same port, in use by the container itself.
        docker = Engine(container_inspect=answer.replace("8080", port))
        containers.ensure_container(docker, one, one.hosts[0], "image")
    assert docker.calls("rm") == ["rm --force --volumes pixel-c5"]
    output = capsys.readouterr().out
    assert "removing pixel-c5 and the data on it" in output
    assert reason in output


def test_containers_and_networks_of_others_are_left_alone() -> None:
    one = plan()
    docker = Engine(container_inspect="  running redis 8080\n", network_inspect=f" {one.subnet}\n")
    with pytest.raises(Problem, match="container pixel-c5 exists and is not part of this fleet"):
        containers.ensure_container(docker, one, one.hosts[0], "image")
    with pytest.raises(Problem, match="network pixel exists and is not part of this fleet"):
        containers.ensure_network(docker, one)
    containers.destroy(docker, plan("other"))
    assert not docker.calls("rm")
    assert not docker.calls("network rm")


@pytest.fixture
def up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_wait_for_boot", lambda *_: None)
    monkeypatch.setattr(containers, "_wait_for_ssh", lambda *_: None)


@pytest.mark.usefixtures("up_at_once")
@pytest.mark.parametrize(
    ("action", "commands"),
    [
        ("off", ["kill pixel-c5 pixel-t2"]),
        (
            "cut",
            [
                "exec pixel-c5 ip link set eth0 down",
                "exec pixel-t2 ip link set eth0 down",
                "kill pixel-c5 pixel-t2",
            ],
        ),
        ("freeze", ["pause pixel-c5 pixel-t2"]),
        ("on", ["unpause pixel-t2", "start pixel-c5 pixel-t2"]),
        ("reboot", ["restart pixel-c5 pixel-t2"]),
    ],
)
def test_the_power_of_several_hosts_changes_at_once(action: str, commands: list[str]) -> None:
    docker, one = Engine(**{"ps_--all": "pixel-t2\npixel-m5\n"}), plan()
    containers.power(docker, one, one.hosts, action)
    assert [asked for asked in docker.asked if not asked.startswith("ps ")] == commands


def test_hosts_can_be_created_for_an_inventory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    created: list[layout.Fleet] = []
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    monkeypatch.setattr(engine.Docker, "ensure", lambda _: None)
    monkeypatch.setattr(containers, "create", lambda _, one: created.append(one))
    monkeypatch.setattr("sys.argv", ["fleet.py", "create", "--inventory=ha", "c5", "t2", "m5"])
    fleet.main()
    assert created[0].inventory == "ha"
    assert created[0].url == f"http://{created[0].subnet[-2]}"


@pytest.mark.usefixtures("up_at_once")
def test_a_host_is_replaced_and_the_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    monkeypatch.setattr(containers, "ensure_image", lambda *_: "image")
    monkeypatch.setattr(containers, "require_disk_space", lambda _: None)
    one = plan(PIXEL_FLEET_DATA=str(tmp_path))
    one.state.mkdir(parents=True)
    docker = Engine(container_inspect="none")
    containers.replace(docker, one, one.host("t2"))
    assert docker.calls("rm") == ["rm --force --volumes pixel-t2"]
    [run] = docker.calls("run")
    assert "--name pixel-t2" in run
    assert json.loads((one.state / "fleet.json").read_text())["hosts"].keys() == {"c5", "t2"}


def test_a_path_with_spaces_is_quoted_in_the_ssh_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path / "a clone")
    one = plan()
    one.state.mkdir(parents=True)
    state.write(Engine(), one)
    shown = subprocess.run(
        ["ssh", "-G", "-F", one.state / "ssh_config", "pixel-c5"], text=True, capture_output=True, check=True
    )
    assert f"identityfile {one.state}/id_ed25519\n" in shown.stdout
    assert f"userknownhostsfile {one.state}/known_hosts\n" in shown.stdout


def test_an_ssh_connection_stays_open_for_later_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layout, "ROOT", tmp_path / "a clone")
    monkeypatch.setenv("HOME", str(tmp_path))
    one = plan()
    one.state.mkdir(parents=True)
    state.write(Engine(), one)
    sockets = tmp_path / ".ansible/cp"
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert "  ControlPath ~/.ansible/cp/fleet-%C\n" in (one.state / "ssh_config").read_text()


def test_the_deploy_sets_ansible_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ansible ignores an ansible.cfg in a world-writable directory unless ANSIBLE_CONFIG names it."""
    environments = []

    def run(command: list[Path | str], **options: Any) -> SimpleNamespace:
        environments.append(options["env"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run)
    fleet.deploy(plan("other"))
    assert environments[0]["ANSIBLE_CONFIG"] == str(bootstrap.ROOT / "ansible.cfg")
    assert environments[0]["PIXEL_FLEET"] == "other"


def test_the_first_pixel_is_read_from_the_other_host_by_its_cluster_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def ask(request: Any) -> tuple[str, str]:
        asked.append(request.full_url)
        if request.data:
            return "t2-8001", json.dumps({"status": "ok", "received": json.loads(request.data)})
        return "c5", '{"R": 255}'

    monkeypatch.setattr(fleet, "_fetch", ask)
    assert "written by t2-8001, read from c5" in fleet.first_pixel(plan())
    assert asked[1:] == ["http://127.0.0.1:8080/cluster/c5/pixel/10/20"]


def test_apt_repositories_without_components_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "read_text", lambda path: 'ID=debian\nVERSION_CODENAME="trixie"\n', raising=True
    )
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/bin/apt-get")
    listing = "http://mirror.example/ trixie main\nhttp://flat.example/ ./\n"
    monkeypatch.setattr(image, "run", lambda *_: SimpleNamespace(stdout=listing))
    assert image.apt_sources("bookworm") == ["deb http://mirror.example/ bookworm main"]


def test_a_missing_docker_client_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = []

    def install(*packages: str, if_known: tuple[str, ...]) -> None:
        installed.append((packages, if_known))

    monkeypatch.setattr(engine, "find", lambda command: command if command == "dockerd" else None)
    monkeypatch.setattr(engine, "install_packages", install)
    docker = engine.Docker()
    docker.command = ("/nowhere/docker",)
    monkeypatch.setattr(docker, "_start", lambda: None)
    with pytest.raises(Problem, match="doesn't answer"):
        docker.ensure()
    assert installed == [(("docker.io",), ("docker-cli",))]


def test_packages_unknown_to_the_release_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(*command: str, **_: Any) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(stdout="Package: docker-cli" if command[-1] == "docker-cli" else "")

    monkeypatch.setattr(bootstrap, "run", run)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/bin/it")
    bootstrap.install_packages("docker.io", if_known=("docker-cli", "chromium"))
    assert ran[-1][-2:] == ("docker.io", "docker-cli")


def test_a_missing_browser_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = []
    missing = ("chromium", "wrk")
    monkeypatch.setattr(bootstrap, "find", lambda command: None if command in missing else command)
    monkeypatch.setattr(bootstrap, "install_packages", lambda *names, **more: installed.append((names, more)))
    bootstrap.ensure_packages("test")
    assert installed == [(("wrk",), {"if_known": ("chromium",)})]
    assert "no chromium" in capsys.readouterr().out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run fleet.py with arguments, for a fleet that does not exist."""

    def start(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["fleet.py", *arguments])
        fleet.main()

    monkeypatch.setattr(layout, "ROOT", tmp_path)
    return start


def test_images_are_built_without_the_fleets_lock(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine.Docker, "ensure", lambda docker: "")
    monkeypatch.setattr(fleet, "ensure_image", lambda docker, suite: f"pixel-host:{suite}")
    with state.exclusive(plan()):
        command("images", "bookworm", "trixie")
    output = capsys.readouterr().out
    assert "pixel-host:bookworm" in output
    assert "pixel-host:trixie" in output


def test_docker_is_not_installed_to_remove_a_fleet(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "find", lambda _: None)
    command("down")
    assert "no fleet to remove" in capsys.readouterr().out


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired(["docker"], 900), PermissionError("no")])
def test_a_system_error_is_one_line(
    error: Exception,
    command: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(_: engine.Docker) -> str:
        raise error

    monkeypatch.setattr(fleet, "find", lambda name: name)
    monkeypatch.setattr(engine.Docker, "ensure", fails)
    with pytest.raises(SystemExit):
        command("down")
    assert capsys.readouterr().err == f"fleet: {error}\n"


def test_a_failure_shows_the_journals_of_all_hosts(tmp_path: Path) -> None:
    tests, state = tmp_path / "molecule", tmp_path / ".fleet" / "x"
    for folder in (tests, state):
        folder.mkdir(parents=True)
    root = Path(__file__).parents[1]
    shutil.copy(root / "molecule" / "conftest.py", tests)
    (tests / "test_it.py").write_text("def test_it():\n    assert False\n")
    (state / "fleet.json").write_text('{"hosts": {"c5": {}, "t2": {}}}')
    (tmp_path / "ssh").write_text("#!/bin/sh\nshift 4; echo $1 says this\n")
    (tmp_path / "ssh").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", tests, tests],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(root), "PIXEL_FLEET": "x"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert "c5 says this" in done.stdout
    assert "t2 says this" in done.stdout
    assert "1 failed" in done.stdout
