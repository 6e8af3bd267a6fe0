#!/usr/bin/python
"""Ansible module: the releases of the pixel app on a host, and the active deployment."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pixel_release
short_description: Build, try and switch releases of the pixel app
description:
  - Owns the layout below O(home) (C(releases/), C(current), C(history), C(former/)) and O(etc).
  - A release is a directory that can serve. A deployment is a release with its settings, password and units.
    The running service carries the fingerprint of its deployment in its environment (C(DEPLOYMENT)).
  - Releases are never banned, because the host may have caused a failure. The next run tries a release again.
options:
  action:
    description:
      - V(status) reports releases, history and the state of the service. It changes nothing.
      - V(build) builds O(release) from O(wheelhouse), unless it is complete and its interpreter starts.
      - V(stage) writes O(files) and O(password) to C(staged/) below O(etc), after the release has accepted
        its settings. It changes nothing if the deployment is already active.
      - V(try) starts the staged deployment as C(pixel-candidate.service) on O(candidate_port) and checks it.
        If the check fails, C(staged/) and a release that has never served on this host are removed.
      - V(switch) activates the staged deployment and checks it. If the check fails, it restores the former
        deployment. Then it enables O(units), stops surplus instances, removes all but O(keep) releases,
        and removes a staged deployment that was given up.
      - V(back) restores the deployment that the last switch replaced, and fails with O(reason).
    type: str
    choices: [status, build, stage, try, switch, back]
    default: status
  release:
    description: Name of the release.
    type: str
    default: ""
  deployment:
    description: The fingerprint of the staged deployment, which V(stage) has returned.
    type: str
    default: ""
  rollback:
    description: Record the switch as a rollback from the release that runs.
    type: bool
    default: false
  reason:
    description: Why V(back) restores the former deployment.
    type: str
    default: ""
  wheelhouse:
    description:
      - Tar file on the host with all wheels and a C(requirements.txt) with their hashes. V(build) removes it.
    type: path
  files:
    description:
      - Staged files by their relative path, C(pixel.env), C(candidate.env), C(candidate.service), and
        C(units/NAME) for the unit files of the service.
    type: dict
    default: {}
  password:
    description: The app's Redis password.
    type: str
    default: ""
  units:
    description: Names of the instances' units without a suffix, in the order in which they are restarted.
    type: list
    elements: str
    default: [pixel]
  urls:
    description: Base URLs of the instances, whose C(/readyz) is checked.
    type: list
    elements: str
    default: []
  candidate_port:
    description: Loopback TCP port on which a release is tried.
    type: int
    default: 7999
  host:
    description: Name of the host in messages. The default is its own name.
    type: str
  timeout:
    description: Seconds within which C(/readyz) must answer 200 after a start.
    type: int
    default: 30
  keep:
    description: Number of releases to keep. The current one, those that served last, and the newest are kept.
    type: int
    default: 3
  user:
    description: User of the service.
    type: str
    default: pixel
  home:
    description: Directory of the releases.
    type: path
    default: /opt/pixel
  etc:
    description: Directory of the settings.
    type: path
    default: /etc/pixel
  unit_dir:
    description: Directory of the units.
    type: path
    default: /etc/systemd/system
  runtime_unit_dir:
    description: Directory of the candidate's unit.
    type: path
    default: /run/systemd/system
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Report the releases
  pixel.endpoint.pixel_release:
  register: __releases

- name: Build the release
  pixel.endpoint.pixel_release:
    action: build
    release: 1.0.0-0123456789ab
    wheelhouse: /opt/pixel/wheelhouse.tar

- name: Switch to the staged deployment
  pixel.endpoint.pixel_release:
    action: switch
    release: 1.0.0-0123456789ab
    deployment: "{{ fingerprint }}"
    urls: [http://10.0.0.11:8000]
"""

RETURN = r"""
current:
  description: The release that C(current) points to; empty if there is none.
  type: str
  returned: success
release:
  description: O(release), as it was given.
  type: str
  returned: success
deployment:
  description: The fingerprint of release, files, password and units after V(stage); otherwise O(deployment).
  type: str
  returned: success
previous:
  description: The newest other release in the history that is still on the host; the target of a rollback.
  type: str
  returned: success
rolled_back_from:
  description: The release that the last rollback replaced, if the current release is the rollback's target.
  type: str
  returned: success
releases:
  description: Releases that are complete.
  type: list
  elements: str
  returned: success
history:
  description: Releases that served, the latest last, each with C(time), C(release) and C(rolled_back_from).
  type: list
  elements: dict
  returned: success
built:
  description: Whether O(release) is complete and its interpreter starts.
  type: bool
  returned: when O(release) is set
account:
  description: The C(home) and the C(shell) of O(user); empty if there is no such user.
  type: dict
  returned: when O(release) is set
service:
  description: C(state), C(restarts), C(age_s) and C(workers) of all instances together.
  type: dict
  returned: when O(action) is V(status)
renames:
  description: Whether O(release) uses other names of keys in Redis than the current release, or is the first.
  type: bool
  returned: when O(action) is V(stage)
warning:
  description: Warning that this run deploys a release that was rolled back; also shown as an Ansible warning.
  type: str
  returned: when O(action) is V(stage) and it changes something
tidied:
  description: Units that were enabled, started or stopped, and paths that were removed.
  type: list
  elements: str
  returned: when O(action) is V(switch)
replaced:
  description: The release of the deployment that this run has replaced; empty if there is none.
  type: str
  returned: when O(action) is V(switch)
redis:
  description: State of Redis as each of O(urls) reports it, or C(no answer).
  type: list
  elements: str
  returned: when O(action) is V(status)
maintenance:
  description: C(state), C(message) and C(since) of maintenance, from each of O(urls) that is in it.
  type: list
  elements: dict
  returned: when O(action) is V(status)
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "action": {"choices": ["status", "build", "stage", "try", "switch", "back"], "default": "status"},
    "release": {"default": ""},
    "deployment": {"default": ""},
    "rollback": {"type": "bool", "default": False},
    "reason": {"default": ""},
    "wheelhouse": {"type": "path"},
    "files": {"type": "dict", "default": {}},
    "password": {"default": "", "no_log": True},
    "units": {"type": "list", "elements": "str", "default": ["pixel"]},
    "urls": {"type": "list", "elements": "str", "default": []},
    "candidate_port": {"type": "int", "default": 7999},
    "timeout": {"type": "int", "default": 30},
    "keep": {"type": "int", "default": 3},
    "host": {},
    "user": {"default": "pixel"},
    "home": {"type": "path", "default": "/opt/pixel"},
    "etc": {"type": "path", "default": "/etc/pixel"},
    "unit_dir": {"type": "path", "default": "/etc/systemd/system"},
    "runtime_unit_dir": {"type": "path", "default": "/run/systemd/system"},
}
CANDIDATE = "pixel-candidate.service"
PIP_WHEELS = Path("/usr/share/python-wheels")
JOURNAL_LINES = 25
BAD_PIXEL = {"x": 0, "y": 0, "channel": "R", "value": 256}


class Failure(Exception):
    """The action failed; the text is for the operator."""


# --- the host --------------------------------------------------------------------------------------


class Host:
    """Commands, processes and sockets of this host. Tests replace it.

    Args:
        name: its name in messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *argv: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run a command and return its standard output.

        Raises:
            Failure: the exit status is not 0, and `check` is set.
        """
        command = [str(part) for part in argv]
        try:
            done = subprocess.run(command, text=True, capture_output=True, env=env, check=False)
        except OSError as error:
            raise Failure(f"{command[0]}: {error.strerror}") from error
        if check and done.returncode != 0:
            output = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise Failure(output or f"{' '.join(command[:3])} ended with status {done.returncode}")
        return done.stdout

    def systemctl(self, *argv: str, check: bool = True) -> str:
        return self.run("systemctl", *argv, check=check)

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a systemd unit."""
        text = self.systemctl("show", f"--property={','.join(names)}", unit, check=False)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def environment(self, unit: str) -> dict[str, str]:
        """Return the environment of a unit's main process; empty if the unit is not running."""
        pid = self.properties(unit, "MainPID").get("MainPID", "0")
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace") if pid != "0" else ""
        except OSError:
            return {}
        return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)

    def further_instances(self, *options: str) -> list[str]:
        """List the loaded units `pixel@PORT`, without a suffix."""
        text = self.systemctl("list-units", *options, "--plain", "--no-legend", "pixel@*", check=False)
        return sorted(set(re.findall(r"(?m)^(pixel@\d+)[.]", text)))

    def children(self, pid: str) -> int:
        """Count the child processes of a process."""
        return len(self.run("pgrep", "--parent", pid, check=False).split()) if pid != "0" else 0

    def journal_cursor(self) -> str:
        text = self.run("journalctl", "--lines=0", "--show-cursor", "--quiet", check=False)
        return text.rpartition("-- cursor: ")[2].strip()

    def journal(self, units: Iterable[str], cursor: str) -> str:
        """Return the last lines of the units after the cursor."""
        since = [f"--after-cursor={cursor}"] if cursor else []
        names = [f"--unit={unit}" for unit in units]
        shape = (f"--lines={JOURNAL_LINES}", "--no-pager", "--quiet", "--output=cat")
        return self.run("journalctl", *names, *since, *shape, check=False).strip()

    def port_user(self, port: int, address: str = "127.0.0.1") -> str:
        """Name the process that uses a TCP port of an address; empty if the port is free."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except PermissionError:
                return "the system, which reserves it for root"
            except OSError:
                pass
            else:
                return ""
        try:
            text = self.run("ss", "-Hltnp", f"sport = :{port}", check=False)
        except Failure:
            text = ""
        users = sorted(set(re.findall(r'"([^"]+)",pid=(\d+)', text)))
        return ", ".join(f"{name} (process {pid})" for name, pid in users) or "another process"

    def ask(self, url: str, timeout: float, body: Any = None) -> tuple[int, str]:
        """Return status and body of an HTTP answer, or 0 and the error. No proxy is used."""
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", parts.path)
            else:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", parts.path, json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error) or type(error).__name__
        finally:
            connection.close()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


# --- files -----------------------------------------------------------------------------------------


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file atomically. Its mode does not depend on the umask."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read(path: Path) -> str | None:
    """Return the text of a file; None if it doesn't exist."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def make_directory(path: Path, mode: int = 0o755) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file or a directory with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the file contains the holder's process id.

    After an interrupted run the module continues on the host; the next run waits until it has ended.
    """
    make_directory(path.parent)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


# --- releases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A line of the history: a release served from this time on."""

    time: str
    release: str
    rolled_back_from: str = ""


class Releases:
    """The directory `home`: releases, the current one, and the history of those that served."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.current_link = home / "current"
        self.history_file = home / "history"

    def path(self, release: str) -> Path:
        return self.home / "releases" / release

    def has_key_names(self, release: str) -> bool:
        """Return whether a release uses the present names of keys in Redis; those before 1.1 use others."""
        return any(self.path(release).glob("lib/python3*/site-packages/pixel/names.py"))

    def names(self) -> list[str]:
        """Complete releases: release.env is the last file that a build writes."""
        return sorted(file.parent.name for file in self.home.glob("releases/*/release.env"))

    def current(self) -> str:
        try:
            return os.path.basename(os.readlink(self.current_link))
        except OSError:
            return ""

    def link_current(self, release: str) -> None:
        new = self.current_link.with_name("current.new")
        new.unlink(missing_ok=True)
        new.symlink_to(self.path(release))
        new.replace(self.current_link)

    def history(self) -> list[Served]:
        lines = [line.split() for line in (read(self.history_file) or "").splitlines()]
        return [
            Served(words[0], words[1], words[3] if len(words) > 3 else "")
            for words in lines
            if len(words) > 1
        ]

    def record(self, release: str, left: str, rollback: bool) -> None:
        """Append a release that serves to the history.

        Args:
            left: the release that served before.
            rollback: the switch is a rollback.
        """
        origin = left if rollback and left != release else ""
        if left == release and not origin:
            origin = self.rolled_back_from()
        words = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), release]
        words += ["rolled-back-from", origin] if origin else []
        write(self.history_file, (read(self.history_file) or "") + " ".join(words) + "\n")

    def served(self, release: str) -> bool:
        return release == self.current() or any(entry.release == release for entry in self.history())

    def previous(self) -> str:
        """Return the newest complete release of the history that isn't the current one; empty if none."""
        complete, current = self.names(), self.current()
        served = [entry.release for entry in self.history()]
        return next((name for name in reversed(served) if name in complete and name != current), "")

    def rolled_back_from(self) -> str:
        """Return the release that the last rollback replaced, while its target is the current release."""
        history = self.history()
        return history[-1].rolled_back_from if history and history[-1].release == self.current() else ""

    def report(self) -> dict[str, Any]:
        """Return the results common to all actions."""
        return {
            "current": self.current(),
            "previous": self.previous(),
            "rolled_back_from": self.rolled_back_from(),
            "releases": self.names(),
            "history": [asdict(entry) for entry in self.history()],
        }

    def spare(self, keep: int) -> list[str]:
        """List what `releases/` contains beyond the releases to keep."""
        complete = self.names()
        folders = [path for path in self.home.glob("releases/*") if path.is_dir()]
        newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        order = [
            self.current(),
            *(entry.release for entry in reversed(self.history())),
            *(path.name for path in newest),
        ]
        kept = [name for name in dict.fromkeys(order) if name in complete][:keep]
        return sorted(path.name for path in folders if path.name not in kept)


# --- deployments -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """A release with its settings, password and units, as `staged/` and `former/` store it."""

    release: str
    fingerprint: str
    units: list[str]
    urls: list[str]
    files: dict[str, str] = field(repr=False)
    """Texts by relative path: `pixel.env`, `credentials/redis_password`, `units/NAME`."""

    def save(self, directory: Path) -> None:
        """Replace a directory with this deployment."""
        new = directory.with_name(f"{directory.name}.new")
        remove(new)
        make_directory(new, 0o700)
        for name, text in self.files.items():
            make_directory((new / name).parent, 0o700)
            write(new / name, text, 0o600)
        facts = {name: value for name, value in asdict(self).items() if name != "files"}
        write(new / "deployment.json", json.dumps(facts, indent=2) + "\n", 0o600)
        remove(directory)
        new.rename(directory)

    @classmethod
    def load(cls, directory: Path) -> Deployment | None:
        """Read a deployment from a directory; None if it contains none."""
        text = read(directory / "deployment.json")
        if text is None:
            return None
        paths = [path for path in directory.rglob("*") if path.is_file()]
        files = {str(path.relative_to(directory)): path.read_text() for path in paths}
        return cls(**json.loads(text), files={k: v for k, v in files.items() if k != "deployment.json"})


def mode_of(name: str) -> int:
    """Return the mode of an installed file: the password and the fingerprint are for root only."""
    return 0o600 if name.startswith(("credentials/", "deployment.")) else 0o644


class Manager:
    """Carries out the actions of the module.

    Args:
        home, etc, unit_dir, runtime_unit_dir: directories of the host.
        user: the service's user.
        timeout: seconds that a started service has until it is ready.
    """

    def __init__(
        self,
        host: Host,
        home: Path,
        etc: Path,
        unit_dir: Path,
        runtime_unit_dir: Path,
        user: str = "pixel",
        timeout: float = 30,
    ) -> None:
        self.host = host
        self.releases = Releases(home)
        self.etc = etc
        self.unit_dir = unit_dir
        self.candidate_unit = runtime_unit_dir / CANDIDATE
        self.user = user
        self.timeout = timeout
        self.staged = etc / "staged"
        self.former = home / "former"

    # Status

    def running(self) -> str:
        """Return the fingerprint of the running deployment. The first instance is restarted last."""
        return self.host.environment("pixel.service").get("DEPLOYMENT", "")

    def start_error(self, release: str) -> str:
        """Return why the service's user cannot start the release; empty if it can."""
        python = self.releases.path(release) / "bin" / "python"
        try:
            self.host.run("runuser", "-u", self.user, "--", python, "-Ic", "import gunicorn, pixel")
        except Failure as failure:
            return str(failure).splitlines()[-1]
        return ""

    def is_built(self, release: str) -> bool:
        return release in self.releases.names() and not self.start_error(release)

    def installed(self, name: str) -> Path:
        """Return the path at which a file of a deployment is installed."""
        return self.unit_dir / name.removeprefix("units/") if name.startswith("units/") else self.etc / name

    def installed_files(self) -> dict[str, str]:
        """Read the installed files, by their relative paths."""
        names = ["pixel.env", "deployment.env", "deployment.json", "credentials/redis_password"]
        names += [f"units/{path.name}" for path in sorted(self.unit_dir.glob("pixel[.@]*")) if path.is_file()]
        texts = {name: read(self.installed(name)) for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    def in_force(self) -> Deployment:
        """Return the running deployment with the installed files."""
        files = self.installed_files()
        facts = json.loads(files.pop("deployment.json", "{}"))
        units = [*self.host.further_instances(), "pixel"]
        # Older versions of this module did not record URLs.
        urls = facts.get("urls", []) if sorted(facts.get("units", [])) == sorted(units) else []
        return Deployment(self.releases.current(), self.running(), units, urls, files)

    def status(self, urls: Sequence[str]) -> dict[str, Any]:
        units = ["pixel", *self.host.further_instances("--all")]
        names = ("ActiveState", "NRestarts", "ActiveEnterTimestampMonotonic", "MainPID")
        shown = [self.host.properties(f"{unit}.service", *names) for unit in units]
        started = max(int(each.get("ActiveEnterTimestampMonotonic") or 0) for each in shown) / 1e6
        answers = [self.host.ask(f"{url}/readyz", 3) for url in urls]
        return {
            "service": {
                "state": ", ".join(sorted({each.get("ActiveState", "unknown") for each in shown})),
                "restarts": sum(int(each.get("NRestarts") or 0) for each in shown),
                "age_s": round(time.clock_gettime(time.CLOCK_MONOTONIC) - started) if started else None,
                "workers": sum(self.host.children(each.get("MainPID", "0")) for each in shown),
            },
            "redis": [_redis_state(status, body) for status, body in answers],
            "maintenance": [known for _, body in answers if (known := json_object(body).get("maintenance"))],
        }

    # Build

    def build(self, release: str, wheelhouse: Path) -> None:
        """Build a release from the wheelhouse alone. `release.env` marks it as complete."""
        path = self.releases.path(release)
        wheels = path / "wheels"
        pips = sorted(PIP_WHEELS.glob("pip-*.whl"))
        if not pips:
            raise Failure(f"there is no pip in {PIP_WHEELS}: install python3-venv")
        for directory in (self.releases.home, self.releases.home / "releases"):
            make_directory(directory)
        remove(path)
        try:
            make_directory(path)
            make_directory(wheels)
            self.host.run(
                "tar", "--extract", "--no-same-owner", f"--file={wheelhouse}", f"--directory={wheels}"
            )
            # Without pip: a release does not need it to run, and it would be a third of the files.
            self.host.run(sys.executable, "-m", "venv", "--without-pip", path)
            options = ("--isolated", "--quiet", "--no-index", "--require-hashes", "--no-cache-dir")
            self.host.run(
                *(path / "bin" / "python", pips[-1] / "pip", "install", *options, f"--find-links={wheels}"),
                f"--requirement={wheels / 'requirements.txt'}",
            )
            remove(wheels)
            if reason := self.start_error(release):
                raise Failure(f"user {self.user} can't start it: {reason}")
            write(path / "release.env", f"PIXEL_RELEASE={release}\n")
        except (Failure, OSError) as error:
            raise Failure(f"release {release} was not built: {error}") from error
        wheelhouse.unlink()

    # Stage

    def is_in_force(self, wanted: Deployment) -> bool:
        files = {name: text for name, text in wanted.files.items() if not name.startswith("candidate.")}
        installed = self.installed_files()
        return (
            self.running() == wanted.fingerprint
            and self.releases.current() == wanted.release
            and all(installed.get(name) == text for name, text in files.items())
        )

    def validate(self, wanted: Deployment) -> None:
        """Let the release validate its settings."""
        python = self.releases.path(wanted.release) / "bin" / "python"
        settings = dict(re.findall(r"(?m)^(PIXEL_[A-Z_]+)='(.*)'$", wanted.files["pixel.env"]))
        self.host.run(python, "-m", "pixel.settings", env={"PATH": os.environ.get("PATH", ""), **settings})

    def renames(self, release: str) -> bool:
        """Return whether a release has to take over the canvas under other names of keys in Redis.

        Raises:
            Failure: the release would not find the canvas, because a later one has taken it over.
        """
        current = self.releases.current()
        if release not in self.releases.names():
            return False  # a dry run, before the release is built
        if current and self.releases.has_key_names(current):
            if self.releases.has_key_names(release):
                return False
            raise Failure(
                f"Release {release} can't serve on {self.host.name}: it is older than 1.1 and uses other"
                f" names of keys in Redis than release {current}, so it would show an empty canvas. Nothing"
                " was changed."
                " Deploy release 1.1 or a later one."
            )
        return self.releases.has_key_names(release)

    def warning(self, release: str) -> str:
        """Return a warning if the release was rolled back; empty otherwise."""
        if self.releases.rolled_back_from() != release:
            return ""
        rollback = self.releases.history()[-1]
        return (
            f"This run deploys release {release} to {self.host.name} again, which was rolled back to"
            f" {rollback.release} at {rollback.time}."
            f" To stay with {rollback.release}: -e pixel_app_release={rollback.release}"
        )

    def is_staged(self, fingerprint: str) -> bool:
        staged = Deployment.load(self.staged)
        return staged is not None and staged.fingerprint == fingerprint

    def staged_deployment(self, release: str, fingerprint: str) -> Deployment:
        staged = Deployment.load(self.staged)
        if staged is None or (staged.release, staged.fingerprint) != (release, fingerprint):
            raise Failure(f"release {release} is not staged with these settings: run the whole role")
        return staged

    # Try

    def check_ports(self, staged: Deployment) -> None:
        """Check that ports that the running deployment doesn't have are free."""
        ours = self.in_force()
        # Without recorded URLs it isn't known which ports a running deployment has.
        is_known = ours.urls or not ours.release
        for url in [url for url in staged.urls if is_known and url not in ours.urls]:
            parts = urllib.parse.urlsplit(url)
            # An interrupted run may have opened it.
            own = self.host.properties(f"pixel@{parts.port}.socket", "ActiveState")
            if own.get("ActiveState") == "active":
                continue
            if user := self.host.port_user(parts.port or 0, parts.hostname or ""):
                raise Failure(
                    f"port {parts.port} on {self.host.name} is in use by {user}."
                    " Free it, or set pixel_app_port to another one."
                    f" Nothing was switched; run the play again for release {staged.release}."
                )

    def attempt(self, staged: Deployment, port: int) -> None:
        """Start the staged deployment on a port of the loopback address, check it, and stop it."""
        self.host.systemctl("stop", CANDIDATE, check=False)
        if user := self.host.port_user(port):
            raise Failure(
                f"port {port} on {self.host.name} is in use by {user}."
                " Free it, or set pixel_app_candidate_port to another one."
                f" Nothing was switched; run the play again for release {staged.release}."
            )
        self.check_ports(staged)
        cursor = self.host.journal_cursor()
        make_directory(self.candidate_unit.parent)
        write(self.candidate_unit, staged.files["candidate.service"])
        self.host.systemctl("daemon-reload")
        try:
            self.host.systemctl("start", CANDIDATE)
            self.check(f"http://127.0.0.1:{port}", staged.release)
        except Failure as failure:
            journal = self.host.journal([CANDIDATE], cursor)
            kept = self.releases.served(staged.release)
            if not kept:
                remove(self.releases.path(staged.release))
            removed = "" if kept else f" The release was removed from {self.host.name}."
            raise Failure(
                f"Release {staged.release} failed its trial on {self.host.name}: {failure}\n"
                f"Nothing was switched on any host.{removed}"
                f" Running the play again tries it again.\nLast lines of its journal:\n{journal}"
            ) from failure
        finally:
            self.host.systemctl("stop", CANDIDATE, check=False)
            self.host.systemctl("reset-failed", CANDIDATE, check=False)
            remove(self.candidate_unit)

    def wait_until_ready(self, url: str) -> dict[str, Any]:
        """Wait for status 200 from `/readyz` and return its answer.

        Raises:
            Failure: the timeout has passed.
        """
        end = time.monotonic() + self.timeout
        while True:
            status, body = self.host.ask(f"{url}/readyz", 2)
            if status == 200:
                return json_object(body)
            if time.monotonic() >= end:
                answer = f"{status}: {body[:500]}" if status else body
                raise Failure(f"{url}/readyz is not ready after {self.timeout:g} s; it answers {answer}")
            self.host.sleep(0.2)

    def check(self, url: str, release: str) -> None:
        """Check that this release answers, can write to Redis, and serves reads and writes of pixels.

        No pixel is written, because another client may set the same pixel between the check's read and write.
        `/readyz` has already written to Redis.
        """
        ready = self.wait_until_ready(url)
        answering = ready.get("release")
        if answering != release:
            raise Failure(f"{url} is release {answering}, not {release}")
        maintenance = (ready.get("maintenance") or {}).get("state")
        for request, path, body, expected in (
            ("GET", "/pixel/0/0", None, 503 if maintenance == "on" else 200),
            ("POST", "/pixel", BAD_PIXEL, 503 if maintenance else 422),
        ):
            status, answer = self.host.ask(url + path, 5, body)
            if status != expected:
                raise Failure(f"{request} {url}{path} answers {status} instead of {expected}: {answer[:500]}")

    # Switch

    def switch(self, staged: Deployment, rollback: bool = False) -> None:
        """Activate the staged deployment and check it; restore the former one if the check fails."""
        before = self.in_force() if self.running() else None
        left = self.releases.current()
        if before is not None:
            saved = Deployment.load(self.former)
            # An interrupted switch has saved it already; the installed files are the new ones by now.
            if saved is not None and saved.fingerprint == before.fingerprint:
                before, left = saved, saved.release
            else:
                before.save(self.former)
        cursor = self.host.journal_cursor()
        changed_sockets: set[str] = set()
        try:
            self.put_in_force(staged, changed_sockets)
            for url in staged.urls:
                self.check(url, staged.release)
        except (Failure, OSError) as error:
            journal = self.host.journal(["pixel.service", "pixel@*.service"], cursor)
            outcome = self.switch_back(before, changed_sockets) if before else "No deployment ran before."
            remove(self.staged)
            raise Failure(
                f"{self.host.name} did not take release {staged.release}: {error}\n{outcome}"
                f" Hosts after it were not touched.\nLast lines of the journal:\n{journal}"
            ) from error
        self.releases.record(staged.release, left, rollback)
        remove(self.staged)

    def replaced(self) -> Deployment | None:
        """Return the deployment that the last switch replaced, if it does not run."""
        former = Deployment.load(self.former)
        return former if former is not None and former.fingerprint != self.running() else None

    def back(self, reason: str, keep: int) -> str:
        """Restore the deployment that the last switch replaced. Returns the outcome for the operator."""
        former, left = self.replaced(), self.releases.current()
        if former is None:
            raise Failure(f"{self.host.name} runs release {left}: {reason}. There is no former deployment.")
        outcome = self.switch_back(former, set())
        self.releases.record(former.release, left, rollback=True)
        self.tidy(former.units, keep, dry=False)
        return (
            f"Release {left} was given up on {self.host.name}: {reason}.\n{outcome}"
            " Hosts after it were not touched."
        )

    def put_in_force(self, wanted: Deployment, changed_sockets: set[str]) -> None:
        """Install settings and units, make the release the current one, and restart the service once.

        systemd keeps the sockets open during the restart. A socket whose file has changed cannot be restarted
        while its service runs; its name is added to `changed_sockets` before its file is written.
        """
        make_directory(self.etc)
        make_directory(self.etc / "credentials", 0o700)
        files = {name: text for name, text in wanted.files.items() if not name.startswith("candidate.")}
        facts = {"units": wanted.units, "urls": wanted.urls}
        files["deployment.json"] = json.dumps(facts, indent=2) + "\n"
        files["deployment.env"] = f"DEPLOYMENT={wanted.fingerprint}\n"
        for name, text in files.items():
            if read(self.installed(name)) != text and name.endswith(".socket"):
                changed_sockets.add(name.removeprefix("units/"))
            write(self.installed(name), text, mode_of(name))
        self.releases.link_current(wanted.release)
        self.host.systemctl("daemon-reload")
        moved = [unit for unit in wanted.units if re.sub("@.*", "@", unit) + ".socket" in changed_sockets]
        if moved:
            self.host.systemctl("stop", *(f"{unit}.service" for unit in moved), check=False)
            self.host.systemctl("restart", *(f"{unit}.socket" for unit in moved))
        for unit in wanted.units:
            self.host.systemctl("restart", f"{unit}.service")

    def switch_back(self, before: Deployment, changed_sockets: set[str]) -> str:
        """Restore the former deployment. Returns the outcome as a sentence for the operator."""
        try:
            self.put_in_force(before, changed_sockets)
            self.stop_surplus(before.units)
            for url in before.urls:
                self.wait_until_ready(url)
        except (Failure, OSError) as error:
            return f"Its former deployment (release {before.release}) was restored, but isn't ready: {error}"
        return f"Its former deployment (release {before.release}) was restored and serves."

    def tidy(self, units: Sequence[str], keep: int, dry: bool, paths: Sequence[Path] = ()) -> list[str]:
        """Enable and start the units; remove surplus instances, releases and paths. Returns the actions."""
        done = []
        wanted = [f"{unit}.{kind}" for unit in units for kind in ("socket", "service")]
        for unit in wanted:
            state = self.host.properties(unit, "UnitFileState", "ActiveState")
            for verb, is_done in (
                ("enable", state.get("UnitFileState") == "enabled"),
                ("start", state.get("ActiveState") in ("active", "activating", "reloading")),
            ):
                if not is_done:
                    done.append(f"{verb} {unit}")
                    if not dry:
                        self.host.systemctl(verb, unit)
        surplus = [unit for unit in self.host.further_instances("--all") if unit not in units]
        done += [f"stop {unit}" for unit in surplus]
        if not dry:
            self.stop_surplus(units)
        templates = [self.unit_dir / f"pixel@.{kind}" for kind in ("socket", "service")]
        for path in [] if len(units) > 1 else [path for path in templates if path.exists()]:
            done.append(f"remove {path}")
            if not dry:
                path.unlink()
        spare = [self.releases.path(release) for release in self.releases.spare(keep)]
        for path in [*paths, *spare]:
            done.append(f"remove {path}")
            if not dry:
                remove(path)
        return done

    def stop_surplus(self, units: Sequence[str]) -> None:
        """Stop and disable all other further instances."""
        for unit in self.host.further_instances("--all"):
            if unit not in units:
                both = (f"{unit}.socket", f"{unit}.service")
                self.host.systemctl("disable", "--now", *both, check=False)
                self.host.systemctl("stop", *both, check=False)
                self.host.systemctl("reset-failed", *both, check=False)


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; return an empty one for any other text."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


def _redis_state(status: int, body: str) -> str:
    return str(json_object(body).get("redis", f"status {status}")) if status else "no answer"


# --- the module ------------------------------------------------------------------------------------


def difference(manager: Manager, wanted: Deployment) -> list[dict[str, str]]:
    """Compare the installed files with the wanted ones for `--diff`, without the password."""
    installed = manager.installed_files()
    names = [name for name in wanted.files if not name.startswith(("candidate.", "credentials/"))]
    return [
        {
            "before_header": str(manager.installed(name)),
            "after_header": str(manager.installed(name)),
            "before": installed.get(name, ""),
            "after": wanted.files[name],
        }
        for name in names
        if installed.get(name) != wanted.files[name]
    ]


def account(user: str) -> dict[str, str]:
    """Return the home and the shell of a user; nothing if there is no such user."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return {}
    return {"home": found.pw_dir, "shell": found.pw_shell}


def fingerprint_of(option: dict[str, Any]) -> str:
    """Return the fingerprint of everything that a service is started with.

    It is in the service's environment, so that a run can compare the running deployment with the wanted one,
    also after an interrupted run.
    """
    facts = [option[name] for name in ("release", "files", "password", "units")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def carry_out(manager: Manager, option: dict[str, Any], dry: bool) -> dict[str, Any]:
    """Carry out an action.

    Args:
        option: the module's parameters.
        dry: only report what would change.

    Returns:
        The module's result.

    Raises:
        Failure: the action failed.
    """
    release, fingerprint = option["release"], option["deployment"]
    result: dict[str, Any] = {"changed": False, "release": release, "deployment": fingerprint}
    match option["action"]:
        case "status":
            result |= manager.status(option["urls"])
            if release:
                result["built"] = manager.is_built(release)
                result["account"] = account(manager.user)
        case "build":
            result["changed"] = not manager.is_built(release)
            if result["changed"] and not dry:
                manager.build(release, Path(option["wheelhouse"]))
        case "stage":
            files = option["files"] | {"credentials/redis_password": option["password"]}
            fingerprint = result["deployment"] = fingerprint_of(option)
            wanted = Deployment(release, fingerprint, option["units"], option["urls"], files)
            result["changed"] = not manager.is_in_force(wanted)
            result["renames"] = manager.renames(release)
            if result["changed"]:
                result["diff"] = difference(manager, wanted)
                result["warning"] = "" if option["rollback"] else manager.warning(release)
                if not dry or manager.is_built(release):
                    manager.validate(wanted)
                if not dry:
                    make_directory(manager.etc)
                    wanted.save(manager.staged)
        case "try":
            if not dry:
                staged = manager.staged_deployment(release, fingerprint)
                try:
                    manager.attempt(staged, option["candidate_port"])
                except Failure:
                    remove(manager.staged)
                    raise
        case "switch":
            # Also if it runs but is staged: files were altered, or a switch was interrupted at its end.
            is_new = manager.running() != fingerprint or manager.is_staged(fingerprint)
            if is_new and not dry:
                manager.switch(manager.staged_deployment(release, fingerprint), option["rollback"])
            # A trial failed on another host, or was interrupted.
            given_up = [manager.staged] if manager.staged.exists() and not is_new else []
            result["tidied"] = manager.tidy(option["units"], option["keep"], dry, given_up)
            result["changed"] = is_new or bool(result["tidied"])
            replaced = manager.replaced() if is_new and not dry else None
            result["replaced"] = replaced.release if replaced else ""
        case "back":
            raise Failure(manager.back(option["reason"], option["keep"]))
    return result | manager.releases.report()


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        required_if=[
            ("action", "build", ["release", "wheelhouse"]),
            ("action", "stage", ["release", "files"]),
            ("action", "try", ["release", "deployment"]),
            ("action", "switch", ["release", "deployment"]),
            ("action", "back", ["reason"]),
        ],
        supports_check_mode=True,
    )
    # A release must be readable by its user, whatever sudo's umask is.
    os.umask(0o022)
    option = module.params
    manager = Manager(
        Host(option["host"] or socket.gethostname()),
        home=Path(option["home"]),
        etc=Path(option["etc"]),
        unit_dir=Path(option["unit_dir"]),
        runtime_unit_dir=Path(option["runtime_unit_dir"]),
        user=option["user"],
        timeout=option["timeout"],
    )
    changes = option["action"] != "status" and not module.check_mode
    try:
        with locked(manager.releases.home / "lock") if changes else contextlib.nullcontext():
            result = carry_out(manager, option, module.check_mode)
    except (Failure, OSError) as error:
        module.fail_json(msg=str(error))
    if result.get("warning"):
        module.warn(result["warning"])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
