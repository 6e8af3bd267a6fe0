"""The Docker engine: install it, start it, and run its command."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bootstrap import ROOT, Problem, as_root, find, install_packages, run, say

SCARCE_DISK = 3 * 1024**3


class Docker:
    """Runs the `docker` command, with sudo if this user may not use the engine."""

    def __init__(self) -> None:
        self.command: tuple[str, ...] = ("docker",)

    def __call__(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(*self.command, *args, **options)

    def _refusal(self) -> str:
        """Return the engine's error message; empty if this user can use it."""
        try:
            done = self("version", "--format", "{{.Server.Version}}", check=False, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            return str(error)
        return "" if done.returncode == 0 else done.stderr.strip() or "no answer"

    def ensure(self) -> str:
        """Install and start the engine if necessary; return its version and cgroup version."""
        refusal = self._refusal()
        if refusal and not _forbidden(refusal):
            if not find("dockerd") or not find("docker"):
                # Since Debian 13 the client is a separate package.
                install_packages("docker.io", if_known=("docker-cli",))
            # The package's scripts may have started the engine.
            refusal = self._refusal()
            if refusal and not _forbidden(refusal):
                self._start()
                refusal = self._refusal()
        if _forbidden(refusal):
            self._through_sudo()
            refusal = self._refusal()
        if refusal:
            raise Problem(f"the Docker engine doesn't answer: {refusal}")
        return self("info", "--format", "{{.ServerVersion}}, cgroup v{{.CgroupVersion}}").stdout.strip()

    def _through_sudo(self) -> None:
        if os.geteuid() == 0 or not shutil.which("sudo"):
            raise Problem(
                "you may not use Docker: add yourself to its group"
                " (`sudo usermod -aG docker $USER`, then log in again), or run this as root."
            )
        self.command = ("sudo", "docker")

    def _start(self) -> None:
        say("starting the Docker engine")
        if Path("/run/systemd/system").is_dir():
            run(*as_root("systemctl", "enable", "--now", "docker.service"))
            return
        for pid_file in (Path("/var/run/docker.pid"), Path("/var/run/docker/containerd/containerd.pid")):
            drop_stale(pid_file)
        # Without systemd, dockerd runs as a separate process that outlives this program.
        log = ROOT / ".fleet" / "dockerd.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            engine = subprocess.Popen(
                as_root("dockerd"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
            )

        def answers() -> bool:
            refusal = self._refusal()
            return not refusal or _forbidden(refusal)

        wait_until(lambda: answers() or engine.poll() is not None, seconds=60)
        if not answers():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise Problem(f"dockerd did not start; the end of {log}:\n{tail}")


def _forbidden(refusal: str) -> bool:
    return "permission denied" in refusal


def drop_stale(pid_file: Path) -> None:
    """Remove a pid file whose process has ended or is another program."""
    try:
        pid = pid_file.read_text().strip()
    except OSError:
        return
    try:
        name = Path("/proc", pid, "comm").read_text().strip()
    except OSError:
        name = ""
    if name not in ("dockerd", "containerd"):
        run(*as_root("rm", "-f", str(pid_file)))


def require_disk_space(docker: Docker) -> None:
    """Raise `Problem` if there is no space for another image or host."""
    root = docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    for folder in (root, str(ROOT)):
        free = shutil.disk_usage(folder).free
        if free < SCARCE_DISK:
            raise Problem(
                f"only {free / 1024**3:.1f} GiB are free under {folder}, 3 GiB are needed:"
                " free some (`docker system prune` removes images and containers that are not in use)."
            )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition twice a second; return whether it became true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
