"""The local fleet's plan, and the messages of what can go wrong before a host runs."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import fleet
import machine
import pytest


def plan(name: str = "pixel", **environ: str) -> fleet.Fleet:
    return fleet.plan(name, ["c5", "t2:trixie"], environ)


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
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(machine.Problem, match="PIXEL_FLEET"):
        plan(name)


@pytest.mark.parametrize("port", ["80", "eighty", "70000", "-1"])
def test_a_port_that_cannot_be_one_is_refused(port: str) -> None:
    with pytest.raises(machine.Problem, match="PIXEL_FLEET_PORT"):
        plan(PIXEL_FLEET_PORT=port)


@pytest.mark.parametrize("subnet", ["10.0.0.0/30", "10.0.0.7/24", "here"])
def test_a_subnet_that_cannot_be_one_is_refused(subnet: str) -> None:
    with pytest.raises(machine.Problem, match="PIXEL_FLEET_SUBNET"):
        plan(PIXEL_FLEET_SUBNET=subnet)


def test_a_taken_port_is_told_with_a_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        host = plan(PIXEL_FLEET_PORT=str(port)).hosts[0]
        with pytest.raises(machine.Problem, match=rf"port {port} .* is taken .*PIXEL_FLEET_PORT"):
            fleet._ports_free(host)


def test_a_full_disk_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(free=1024**3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    docker = fleet.Docker()
    docker.command = ("echo", str(tmp_path))
    with pytest.raises(machine.Problem, match=r"only 1\.0 GiB are free"):
        fleet.enough_disk(docker)


def test_no_permission_for_docker_is_told_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "docker"
    refusing.write_text("#!/bin/sh\necho 'permission denied while trying to connect' >&2; exit 1\n")
    refusing.chmod(0o755)
    docker = fleet.Docker()
    docker.command = (str(refusing),)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(machine.Problem, match="usermod -aG docker"):
        docker.ensure()


def test_a_stale_pid_file_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    pid_file = tmp_path / "docker.pid"
    pid_file.write_text("1")  # Whatever process 1 is, it isn't dockerd.
    fleet._drop_stale(pid_file)
    assert not pid_file.exists()
    fleet._drop_stale(pid_file)


def test_a_lost_or_broken_key_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fleet, "ROOT", tmp_path)
    one = plan()
    one.state.mkdir(parents=True)
    first = fleet._ensure_key(one)
    assert fleet._ensure_key(one).split()[:2] == first.split()[:2]
    (one.state / "id_ed25519.pub").unlink()
    assert fleet._ensure_key(one).split()[:2] == first.split()[:2]
    (one.state / "id_ed25519").write_text("half a ke")
    assert fleet._ensure_key(one).split()[:2] != first.split()[:2]


def test_one_command_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fleet, "ROOT", tmp_path)
    with (
        fleet.alone(plan()),
        pytest.raises(machine.Problem, match="another command works on fleet 'pixel'"),
        fleet.alone(plan()),
    ):
        pass


def test_without_a_bootstrap_the_public_image_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise machine.Problem("mount: permission denied")

    monkeypatch.setattr(fleet, "_apt_sources", lambda suite: ["deb http://mirror.example bookworm main"])
    monkeypatch.setattr(fleet, "_bootstrap", fails)
    docker = fleet.Docker()
    docker.command = ("false",)
    assert fleet._base_image(docker, "bookworm") == "debian:bookworm-slim"
    assert "mount: permission denied" in capsys.readouterr().out
