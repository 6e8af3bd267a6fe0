"""pixel_release on a temporary directory and a simulated host."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.modules import pixel_release
from ansible_collections.pixel.endpoint.plugins.modules.pixel_release import (
    ARGUMENTS,
    DOCUMENTATION,
    EXAMPLES,
    RETURN,
    Failure,
    Host,
    Manager,
    carry_out,
    locked,
)


class FakeHost(Host):
    """A host with simulated systemd: a started service runs the release that the files name.

    Releases in `faults` start but are never ready; those in `broken` do not start.
    """

    def __init__(self, root: Path) -> None:
        super().__init__("t2")
        self.etc, self.home = root / "etc", root / "home"
        self.calls: list[str] = []
        self.active: dict[str, dict[str, str]] = {}
        """Environments of the running services, by unit."""
        self.enabled: set[str] = set()
        self.sockets: set[str] = set()
        self.broken: set[str] = set()
        """Releases whose interpreter does not start."""
        self.faults: set[str] = set()
        self.refused_settings = ""
        self.taken: dict[int, str] = {}
        """What uses a port, by its number."""
        self.on_restart: Callable[[], None] = lambda: None
        self.maintenance = ""

    def run(self, *argv: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
        words = [str(word) for word in argv]
        self.calls.append(" ".join(words))
        if words[0] == "systemctl":
            return self._systemctl(*words[1:])
        if words[0] == "runuser":
            release = Path(words[4]).parents[1].name
            if release in self.broken or not (self.home / "releases" / release).exists():
                raise Failure("cannot execute: required file not found")
        if words[-1] == "pixel.settings" and self.refused_settings:
            raise Failure(self.refused_settings)
        return "old\nlines\n" if words[0] == "journalctl" else ""

    def _systemctl(self, verb: str, *units: str) -> str:
        for unit in units:
            name, _, kind = unit.rpartition(".")
            if verb in ("start", "restart") and kind == "service":
                self.on_restart()
                self.active[unit] = self._environment_now(unit)
            elif verb in ("start", "restart"):
                self.sockets.add(name)
            elif verb == "stop" or (verb == "disable" and "--now" in units):
                self.active.pop(unit, None)
                self.sockets.discard(name)
            elif verb == "enable":
                self.enabled.add(unit)
        return ""

    def _environment_now(self, unit: str) -> dict[str, str]:
        if unit.startswith("pixel-candidate"):
            staged = json.loads((self.etc / "staged" / "deployment.json").read_text())
            return {"release": staged["release"]}
        deployment = (self.etc / "deployment.env").read_text().strip().partition("=")[2]
        return {"DEPLOYMENT": deployment, "release": os.readlink(self.home / "current").rpartition("/")[2]}

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        running = unit in self.active or unit.removesuffix(".socket") in self.sockets
        return {
            "ActiveState": "active" if running else "inactive",
            "UnitFileState": "enabled" if unit in self.enabled else "disabled",
            "NRestarts": "2",
            "ActiveEnterTimestampMonotonic": "1000000" if running else "0",
            "MainPID": "0",
        }

    def environment(self, unit: str) -> dict[str, str]:
        return self.active.get(unit, {})

    def further_instances(self, *options: str) -> list[str]:
        return sorted(unit.removesuffix(".service") for unit in self.active if unit.startswith("pixel@"))

    def port_user(self, port: int, address: str = "127.0.0.1") -> str:
        return self.taken.get(port, "")

    def ask(self, url: str, timeout: float, body: Any = None) -> tuple[int, str]:
        port = int(url.split(":")[2].split("/")[0])
        first = dict.fromkeys((8000, 9000), "pixel.service")
        unit = ({7999: "pixel-candidate.service"} | first).get(port, f"pixel@{port}.service")
        if unit not in self.active:
            return 0, "Connection refused"
        release = self.active[unit]["release"]
        if url.endswith("/readyz"):
            if release in self.faults:
                return 503, "This release is never ready."
            maintenance = {"state": self.maintenance} if self.maintenance else None
            return 200, json.dumps({"release": release, "redis": "ok", "maintenance": maintenance})
        refused = self.maintenance == "on" or (self.maintenance and body)
        return (503 if refused else 422 if body else 200), "{}"

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def manager(host: FakeHost, tmp_path: Path) -> Manager:
    (tmp_path / "units").mkdir()
    return Manager(host, host.home, host.etc, tmp_path / "units", tmp_path / "run", timeout=0)


def make(manager: Manager, release: str) -> None:
    """Create a complete release, as action `build` does."""
    path = manager.releases.path(release)
    path.mkdir(parents=True)
    (path / "release.env").write_text(f"PIXEL_RELEASE={release}\n")


def option(action: str, release: str, **changes: Any) -> dict[str, Any]:
    """Return the module's parameters; the files differ by release, settings and ports."""
    settings = changes.pop("settings", "1")
    ports = changes.pop("ports", [8000])
    units = [f"pixel@{port}" for port in ports[1:]] + ["pixel"]
    kinds = ["", "@"] if len(ports) > 1 else [""]
    files = {
        "pixel.env": f"PIXEL_WORKERS='{settings}'\n",
        "candidate.env": f"PIXEL_WORKERS='{settings}'\n",
        "candidate.service": f"candidate {release}\n",
        **{f"units/pixel{at}.service": f"service{at}\n" for at in kinds},
        **{f"units/pixel{at}.socket": f"socket{at} {ports[0]}\n" for at in kinds},
    }
    chosen: dict[str, Any] = {
        "action": action,
        "release": release,
        "rollback": False,
        "wheelhouse": None,
        "files": files,
        "password": "geheim",
        "units": units,
        "urls": [f"http://10.0.0.1:{port}" for port in ports],
        "candidate_port": 7999,
        "keep": 3,
    } | changes
    return chosen | {"deployment": pixel_release.fingerprint_of(chosen)}


def deploy(manager: Manager, release: str, **changes: Any) -> list[dict[str, Any]]:
    """Run the actions of a deploy in the role's order; return their results."""
    if release not in manager.releases.names():
        make(manager, release)
    staged = carry_out(manager, option("stage", release, **changes), False)
    tried = [carry_out(manager, option("try", release, **changes), False)] if staged["changed"] else []
    return [staged, *tried, carry_out(manager, option("switch", release, **changes), False)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_first_deploy_installs_files_starts_units_and_is_recorded(manager: Manager, host: FakeHost) -> None:
    results = deploy(manager, "a")
    assert [result["changed"] for result in results] == [True, False, True]
    assert results[-1]["current"] == "a"
    assert host.active["pixel.service"]["release"] == "a"
    assert "pixel-candidate.service" not in host.active
    assert host.enabled == {"pixel.socket", "pixel.service"}
    assert (manager.etc / "pixel.env").read_text() == "PIXEL_WORKERS='1'\n"
    assert mode(manager.etc / "pixel.env") == 0o644
    assert mode(manager.etc / "credentials/redis_password") == 0o600
    assert sorted(path.name for path in manager.unit_dir.iterdir()) == ["pixel.service", "pixel.socket"]
    assert not manager.candidate_unit.exists()
    assert not manager.staged.exists()
    assert [entry["release"] for entry in results[-1]["history"]] == ["a"]


def test_a_release_that_was_given_up_is_replaced_by_the_former_deployment(
    manager: Manager, host: FakeHost
) -> None:
    assert deploy(manager, "a")[-1]["replaced"] == ""
    two = {"ports": [8000, 8001], "settings": "2"}
    deploy(manager, "a", **two)
    assert deploy(manager, "b")[-1]["replaced"] == "a"
    assert deploy(manager, "b")[-1]["replaced"] == ""
    reason = "9.0% of 500 answers are errors"
    with pytest.raises(Failure) as caught:
        carry_out(manager, option("back", "") | {"reason": reason}, False)
    assert str(caught.value) == (
        f"Release b was given up on t2: {reason}.\n"
        "Its former deployment (release a) was restored and serves. Hosts after it were not touched."
    )
    assert {unit: env["release"] for unit, env in host.active.items()} == {
        "pixel.service": "a",
        "pixel@8001.service": "a",
    }
    assert "pixel@8001.service" in host.enabled
    assert (manager.etc / "pixel.env").read_text() == "PIXEL_WORKERS='2'\n"
    report = manager.releases.report()
    assert (report["current"], report["rolled_back_from"]) == ("a", "b")
    # The next deploy warns, and a release that replaced nothing can't be given up.
    assert "which was rolled back to a" in carry_out(manager, option("stage", "b"), True)["warning"]
    with pytest.raises(Failure, match="There is no former deployment"):
        carry_out(manager, option("back", "") | {"reason": reason}, False)


def test_a_release_with_the_former_names_of_keys_is_refused_once_they_are_gone(manager: Manager) -> None:
    assert not deploy(manager, "a")[0]["renames"]
    for release in ("b", "c"):
        make(manager, release)
        package = manager.releases.path(release) / "lib/python3.11/site-packages/pixel"
        package.mkdir(parents=True)
        (package / "names.py").touch()
    assert deploy(manager, "b")[0]["renames"]
    assert not deploy(manager, "c")[0]["renames"]
    with pytest.raises(Failure) as caught:
        carry_out(manager, option("stage", "a", rollback=True), False)
    assert str(caught.value).startswith(
        "Release a can't serve on t2: it is older than 1.1 and uses other names of keys in Redis than"
        " release c, so it would show an empty canvas."
    )
    assert not manager.staged.exists()
    # Dry runs before a build.
    assert not carry_out(manager, option("stage", "d"), True)["renames"]


def test_a_release_is_checked_during_maintenance(manager: Manager, host: FakeHost) -> None:
    host.maintenance = "on"
    deploy(manager, "a")
    host.maintenance = "read-only"
    deploy(manager, "b")
    assert host.active["pixel.service"]["release"] == "b"
    status = carry_out(manager, option("status", ""), True)
    assert status["maintenance"] == [{"state": "read-only"}]


def test_a_second_run_changes_nothing(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    host.calls.clear()
    stage, switch = deploy(manager, "a")
    assert not stage["changed"]
    assert not switch["changed"]
    assert not [call for call in host.calls if "restart" in call or "start" in call.split()]


def test_a_dry_run_reports_changes_and_makes_none(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    make(manager, "b")
    before = sorted(manager.etc.rglob("*"))
    stage = carry_out(manager, option("stage", "b", settings="2"), True)
    switch = carry_out(manager, option("switch", "b", settings="2"), True)
    assert stage["changed"]
    assert [(each["before"], each["after"]) for each in stage["diff"]] == [
        ("PIXEL_WORKERS='1'\n", "PIXEL_WORKERS='2'\n")
    ]
    assert switch["changed"]
    assert sorted(manager.etc.rglob("*")) == before
    assert host.active["pixel.service"]["release"] == "a"


def test_a_release_that_fails_its_trial_is_removed_and_may_be_tried_again(
    manager: Manager, host: FakeHost
) -> None:
    deploy(manager, "a")
    host.faults.add("b")
    with pytest.raises(
        Failure, match=r"Release b failed its trial on t2.*This release is never ready"
    ) as caught:
        deploy(manager, "b")
    assert "The release was removed from t2." in str(caught.value)
    assert manager.releases.names() == ["a"]
    assert host.active["pixel.service"]["release"] == "a"
    assert "pixel-candidate.service" not in host.active
    # The staged files contain the password.
    assert not manager.staged.exists()
    host.faults.clear()
    assert deploy(manager, "b")[-1]["current"] == "b"


def test_a_deployment_that_was_staged_and_given_up_is_removed(manager: Manager) -> None:
    """The trial failed on another host, and the next run deploys the running release."""
    deploy(manager, "a")
    make(manager, "b")
    carry_out(manager, option("stage", "b"), False)
    removal = [f"remove {manager.staged}", f"remove {manager.releases.path('b')}"]
    assert carry_out(manager, option("switch", "a", keep=1), True)["tidied"] == removal
    assert manager.staged.exists()
    result = carry_out(manager, option("switch", "a", keep=1), False)
    assert (result["changed"], result["tidied"]) == (True, removal)
    assert not manager.staged.exists()
    assert not carry_out(manager, option("switch", "a", keep=1), False)["changed"]


def test_a_release_that_has_served_stays_when_a_trial_fails(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    deploy(manager, "b")
    host.faults.update("ab")
    for release in "ab":
        with pytest.raises(Failure, match="failed its trial") as caught:
            deploy(manager, release, settings="2")
        assert "removed" not in str(caught.value)
    assert manager.releases.names() == ["a", "b"]


def test_a_candidate_port_in_use_is_reported_and_the_release_is_kept(
    manager: Manager, host: FakeHost
) -> None:
    deploy(manager, "a")
    host.taken = {7999: "python3 (process 42)"}
    with pytest.raises(Failure, match=re.escape("port 7999 on t2 is in use by python3 (process 42)")):
        deploy(manager, "b")
    assert manager.releases.names() == ["a", "b"]
    host.taken.clear()
    assert deploy(manager, "b")[-1]["current"] == "b"


def test_an_instance_port_in_use_is_reported_before_anything_is_switched(
    manager: Manager, host: FakeHost
) -> None:
    """Ports of the running deployment are its own."""
    host.taken = {8000: "apache2 (process 42)"}
    with pytest.raises(Failure, match=re.escape("port 8000 on t2 is in use by apache2 (process 42)")):
        deploy(manager, "a")
    assert not host.active
    host.taken.clear()
    deploy(manager, "a")
    host.taken = {8000: "systemd (process 1)", 8001: "apache2 (process 42)"}
    assert deploy(manager, "b")[-1]["current"] == "b"
    with pytest.raises(Failure, match="port 8001 on t2 is in use by apache2"):
        deploy(manager, "b", ports=[8000, 8001])
    assert host.active.keys() == {"pixel.service"}


def test_a_release_that_fails_after_the_switch_is_switched_back(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a", ports=[8000, 8001])
    make(manager, "b")
    changes = {"settings": "2", "ports": [9000, 9001, 9002]}
    carry_out(manager, option("stage", "b", **changes), False)
    host.faults.add("b")
    host.calls.clear()
    with pytest.raises(Failure, match=r"t2 did not take release b.*never ready") as caught:
        carry_out(manager, option("switch", "b", **changes), False)
    assert "Its former deployment (release a) was restored and serves." in str(caught.value)
    assert not manager.staged.exists()
    assert {unit: each["release"] for unit, each in host.active.items()} == {
        "pixel.service": "a",
        "pixel@8001.service": "a",
    }
    assert manager.releases.current() == "a"
    assert (manager.etc / "pixel.env").read_text() == "PIXEL_WORKERS='1'\n"
    assert (manager.unit_dir / "pixel.socket").read_text() == "socket 8000\n"
    # The sockets were restarted for the new ports, and again for the former ones.
    assert sum(call.startswith("systemctl restart") and "pixel.socket" in call for call in host.calls) == 2
    assert [entry.release for entry in manager.releases.history()] == ["a"]
    host.faults.clear()
    assert deploy(manager, "b", **changes)[-1]["current"] == "b"


def test_a_restored_deployment_that_is_not_ready_is_reported(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    make(manager, "b")
    carry_out(manager, option("stage", "b"), False)
    host.faults.update("ab")
    with pytest.raises(Failure, match=r"\(release a\) was restored, but isn't ready"):
        carry_out(manager, option("switch", "b"), False)
    assert manager.releases.names() == ["a", "b"]


def test_a_failed_first_deploy_has_no_former_deployment(manager: Manager, host: FakeHost) -> None:
    make(manager, "a")
    carry_out(manager, option("stage", "a"), False)
    host.faults.add("a")
    with pytest.raises(Failure, match=r"No deployment ran before\."):
        carry_out(manager, option("switch", "a"), False)


class Killed(BaseException):
    """Simulates the sudden end of the module's process."""


def test_after_an_interrupted_switch_the_deployment_before_it_is_restored(
    manager: Manager, host: FakeHost
) -> None:
    """After the interruption, files and `current` are new, and the old release still runs."""
    deploy(manager, "a")
    make(manager, "b")

    def kill() -> None:
        raise Killed

    carry_out(manager, option("stage", "b", settings="2"), False)
    host.on_restart = kill
    with pytest.raises(Killed):
        carry_out(manager, option("switch", "b", settings="2"), False)
    assert manager.releases.current() == "b"
    assert host.active["pixel.service"]["release"] == "a"

    host.on_restart = lambda: None
    carry_out(manager, option("stage", "b", settings="2"), False)
    host.faults.add("b")
    with pytest.raises(Failure, match="release a"):
        carry_out(manager, option("switch", "b", settings="2"), False)
    assert host.active["pixel.service"]["release"] == "a"
    assert (manager.etc / "pixel.env").read_text() == "PIXEL_WORKERS='1'\n"


def test_altered_files_are_corrected_once(manager: Manager) -> None:
    deploy(manager, "a")
    (manager.etc / "pixel.env").write_text("altered\n")
    assert deploy(manager, "a")[-1]["changed"]
    assert (manager.etc / "pixel.env").read_text() == "PIXEL_WORKERS='1'\n"
    assert not deploy(manager, "a")[0]["changed"]


def test_a_rollback_goes_to_the_newest_release_that_served(manager: Manager, host: FakeHost) -> None:
    for release in "abc":
        deploy(manager, release)
    make(manager, "never-served")
    assert manager.releases.previous() == "b"
    assert manager.releases.rolled_back_from() == ""
    rolled = deploy(manager, "b", rollback=True)[-1]
    assert (rolled["current"], rolled["previous"], rolled["rolled_back_from"]) == ("b", "c", "c")


def test_deploying_a_rolled_back_release_again_gives_a_warning(manager: Manager) -> None:
    for release in "ab":
        deploy(manager, release)
    deploy(manager, "a", rollback=True)
    deploy(manager, "a", settings="2")
    assert manager.releases.rolled_back_from() == "b"
    warning = carry_out(manager, option("stage", "b"), True)["warning"]
    assert re.match(
        r"This run deploys release b to t2 again, which was rolled back to a at 20\S+Z\.", warning
    )
    assert "-e pixel_app_release=a" in warning
    # Another release and a rollback give no warning.
    assert carry_out(manager, option("stage", "c"), True)["warning"] == ""
    assert carry_out(manager, option("stage", "b", rollback=True), True)["warning"] == ""
    assert deploy(manager, "b")[-1]["rolled_back_from"] == ""


def test_the_history_format_of_a_former_version_is_read(manager: Manager) -> None:
    manager.releases.home.mkdir()
    manager.releases.history_file.write_text("2026-01-01T00:00:00Z a\n2026-01-02T00:00:00Z b\n")
    assert [entry.release for entry in manager.releases.history()] == ["a", "b"]


def test_releases_beyond_those_to_keep_are_removed(manager: Manager) -> None:
    """Keep the current one, the one before it, and the newest complete one of the others."""
    deploy(manager, "before")
    for number in range(1, 5):
        make(manager, f"old-{number}")
        os.utime(manager.releases.path(f"old-{number}"), (number, number))
    (manager.releases.home / "releases" / "half").mkdir()
    os.utime(manager.releases.path("before"), (0, 0))
    deploy(manager, "now")
    left = sorted(path.name for path in (manager.releases.home / "releases").iterdir())
    assert left == ["before", "now", "old-4"]


def test_instances_can_be_added_and_removed(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    deploy(manager, "a", ports=[8000, 8001, 8002])
    assert sorted(host.active) == ["pixel.service", "pixel@8001.service", "pixel@8002.service"]
    assert (manager.unit_dir / "pixel@.socket").exists()
    restarts = [call.split()[-1] for call in host.calls if call.startswith("systemctl restart")]
    assert restarts[-1] == "pixel.service"
    assert deploy(manager, "a")[-1]["changed"]
    assert sorted(host.active) == ["pixel.service"]
    assert not (manager.unit_dir / "pixel@.socket").exists()


def test_a_unit_that_was_stopped_by_hand_is_started(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    host.sockets.clear()
    host.enabled.remove("pixel.service")
    tidied = carry_out(manager, option("switch", "a"), False)["tidied"]
    assert tidied == ["start pixel.socket", "enable pixel.service"]
    assert host.sockets == {"pixel"}


def test_settings_that_the_release_refuses_are_not_staged(manager: Manager, host: FakeHost) -> None:
    deploy(manager, "a")
    host.refused_settings = "pixel: PIXEL_WORKERS: too few"
    with pytest.raises(Failure, match="too few"):
        deploy(manager, "a", settings="0")
    assert not manager.staged.exists()


def test_a_switch_requires_a_staged_deployment_with_its_fingerprint(manager: Manager) -> None:
    deploy(manager, "a")
    carry_out(manager, option("stage", "a", settings="2"), False)
    with pytest.raises(Failure, match="run the whole role"):
        carry_out(manager, option("switch", "a", settings="3"), False)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "python-wheels"
    wheels.mkdir()
    (wheels / "pip-24.whl").touch()
    monkeypatch.setattr(pixel_release, "PIP_WHEELS", wheels)


def built(manager: Manager, wheelhouse: Path, release: str = "a") -> bool:
    wheelhouse.touch()
    changed = carry_out(manager, option("build", release, wheelhouse=str(wheelhouse)), False)["changed"]
    return bool(changed)


@pytest.mark.usefixtures("pip")
def test_a_release_is_complete_when_it_starts(manager: Manager, host: FakeHost, tmp_path: Path) -> None:
    bundle = tmp_path / "wheelhouse.tar"
    assert built(manager, bundle)
    assert not bundle.exists()
    assert manager.releases.names() == ["a"]
    assert mode(manager.releases.path("a")) == 0o755
    assert not (manager.releases.path("a") / "wheels").exists()
    assert not built(manager, bundle)


@pytest.mark.usefixtures("pip")
def test_a_release_whose_interpreter_is_gone_is_built_again(
    manager: Manager, host: FakeHost, tmp_path: Path
) -> None:
    assert built(manager, tmp_path / "wheelhouse.tar")
    marker = manager.releases.path("a") / "of-the-former-python"
    marker.touch()
    host.broken.add("a")
    assert not carry_out(manager, option("status", "a"), False)["built"]
    # A new build that does not start either is not complete.
    with pytest.raises(Failure, match="user pixel can't start it: cannot execute"):
        built(manager, tmp_path / "wheelhouse.tar")
    assert manager.releases.names() == []
    host.broken.clear()
    assert built(manager, tmp_path / "wheelhouse.tar")
    assert not marker.exists()


def test_modes_do_not_depend_on_the_umask(manager: Manager) -> None:
    before = os.umask(0o077)
    try:
        deploy(manager, "a")
    finally:
        os.umask(before)
    assert mode(manager.etc / "pixel.env") == 0o644
    assert mode(manager.etc) == 0o755
    assert mode(manager.unit_dir / "pixel.service") == 0o644


def test_status_reports_release_service_and_redis(manager: Manager, host: FakeHost) -> None:
    empty = carry_out(manager, option("status", "", urls=["http://10.0.0.1:8000"]), True)
    assert (empty["current"], empty["service"]["state"], empty["redis"]) == ("", "inactive", ["no answer"])
    deploy(manager, "a")
    status = carry_out(manager, option("status", ""), True)
    assert status["service"] | {"age_s": 0} == {"state": "active", "restarts": 2, "age_s": 0, "workers": 0}
    assert status["redis"] == ["ok"]
    host.faults.add("a")
    assert carry_out(manager, option("status", ""), True)["redis"] == ["status 503"]


def test_a_port_in_use_is_detected() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert Host("t2").port_user(port) != ""
    assert Host("t2").port_user(port) == ""


def test_requests_to_the_fleet_use_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0.2)
        # The request arrives, though it is not answered.
        assert Host("t2").ask(f"http://127.0.0.1:{port}/readyz", 0.2)[0] == 0
        connection, _ = server.accept()
        connection.settimeout(1)
        assert connection.recv(1000).startswith(b"GET /readyz HTTP/1.1\r\n")
        connection.close()


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "home" / "lock"
    order: list[str] = []

    def second() -> None:
        with locked(lock):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(lock):
        assert lock.read_text() == f"{os.getpid()}\n"
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_failed_command_raises_its_error_output() -> None:
    with pytest.raises(Failure, match="no such thing"):
        Host("t2").run("sh", "-c", "echo no such thing >&2; exit 3")
    with pytest.raises(Failure, match="/nowhere: No such file"):
        Host("t2").run("/nowhere")


def test_the_documentation_agrees_with_the_parameters() -> None:
    documented = yaml.safe_load(DOCUMENTATION)["options"]
    for option in (*documented.values(), *ARGUMENTS.values()):
        option.setdefault("type", "str")
        option.pop("description", None)
        option.pop("no_log", None)
    assert documented == ARGUMENTS
    assert isinstance(yaml.safe_load(EXAMPLES), list)
    assert {"current", "previous", "rolled_back_from", "history"} <= set(yaml.safe_load(RETURN))


def test_the_account_of_the_user_is_reported(manager: Manager) -> None:
    manager.user = "root"
    assert carry_out(manager, option("status", "a"), True)["account"]["home"] == "/root"
    manager.user = "nobody-has-this-name"
    assert carry_out(manager, option("status", "a"), True)["account"] == {}
