#!/usr/bin/python3
"""Back up the canvas to a restic repository, and restore every backup once to verify it.

    pixel-backup run                   make a backup, verify it, remove old ones
    pixel-backup list [BACKUP]         list all backups, or one
    pixel-backup dump BACKUP FILE      write a file of a backup to standard output
    pixel-backup status                print the results of the last run as JSON
    pixel-backup restic ARGUMENT...    run restic on the repository

BACKUP is the beginning of an ID, or `latest`, the newest backup that was verified.

A backup begins with a copy of Redis's log, so the running Redis does nothing for it. A second Redis, which
only this program can reach, loads the copy and writes it as one file. That file is backed up, read back from
the repository and loaded by another second Redis; the digests of all keys must be the same in both.

The program is started by root, but it has the rights of the user in its settings, as restic and both servers
have. It reads the log with the rights of the log's owner, and writes the metrics with those of root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SETTINGS = Path("/etc/pixel-backup.json")
# Role history installs it on the hosts of its group.
PIXEL_HISTORY = "/usr/local/sbin/pixel-history"
MANIFEST = "appendonly.aof.manifest"
CANVAS = "canvas.rdb"
HISTORY = "history.sqlite"
# Tags of snapshots in the repository.
OURS, VERIFIED = "pixel", "verified"
# Seconds in which the repository must answer at first. Without this limit restic tries for 15 minutes.
PATIENCE = 60
# Space that must stay free on the disk.
MARGIN = 64 * 1024 * 1024
CHUNK = 1024 * 1024


class Problem(Exception):
    """An error that the operator can fix; the text says how."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings, which role redis writes."""

    repository: str
    password: str
    # Further variables of restic's environment, such as AWS_ACCESS_KEY_ID.
    environment: dict[str, str]
    # Name under which the backups are in the repository, which may have backups of other fleets.
    fleet: str
    # Number of backups to keep by `hourly`, `daily`, `weekly` and `monthly`.
    keep: dict[str, int]
    # Directory of Redis's append-only log.
    log: Path
    # Directory of the history's service, or none.
    history: Path | None
    # Lua scripts: `digests` returns a line for every key, `occupied` counts the keys with content.
    scripts: dict[str, str]
    # Working directory, which belongs to the user.
    home: Path
    # Directory of the node exporter's text files, which may not exist.
    metrics: Path
    # The user that the program becomes; none to stay the one that started it.
    user: str | None

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the settings from a JSON file."""
        values = json.loads(path.read_text())
        for name in ("log", "history", "home", "metrics"):
            values[name] = Path(values[name]) if values[name] else None
        return cls(**values)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program, which can't become root again as this one can."""
        options |= {"user": os.geteuid(), "group": os.getegid()} if os.getuid() == 0 else {}
        # The user may not be able to read the current directory, such as /root.
        options.setdefault("cwd", self.home)
        basics = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.home), "TZ": "UTC"}
        options["env"] = basics | options.get("env", {})
        return subprocess.Popen(command, text=True, **options)


@dataclasses.dataclass
class Status:
    """Results of the last run and of successful ones before it."""

    # The repository that has been used, as a digest, because its address may contain a password.
    repository: str = ""
    # Error of the last run.
    error: str = ""
    # When the newest backup and the newest verified one were made, in seconds since 1970; 0 for never.
    time: int = 0
    verified: int = 0
    # Bytes and duration in seconds of the newest verified backup.
    size: int = 0
    seconds: float = 0

    @classmethod
    def read(cls, home: Path) -> Status:
        """Read the status; without a file, nothing has been done yet."""
        try:
            return cls(**json.loads((home / "status.json").read_text()))
        except FileNotFoundError:
            return cls()

    def write(self, settings: Settings) -> None:
        """Write the status, and the metrics if the host has a node exporter."""
        replace(settings.home / "status.json", json.dumps(dataclasses.asdict(self)), 0o600)
        if self.time and settings.metrics.is_dir():
            lines = [
                f"pixel_backup_timestamp_seconds {self.time}",
                f"pixel_backup_verified_timestamp_seconds {self.verified}",
                f"pixel_backup_size_bytes {self.size}",
                f"pixel_backup_duration_seconds {self.seconds}",
            ]
            with rights_of(0, 0):
                replace(settings.metrics / "pixel_backup.prom", "\n".join([*lines, ""]), 0o644)


def replace(path: Path, text: str, mode: int) -> None:
    """Write a file in one step. The node exporter ignores names that don't end in .prom."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.chmod(mode)
    fresh.rename(path)


@contextlib.contextmanager
def rights_of(user: int, group: int) -> Iterator[None]:
    """Have the rights of another user for a while, if root has started the program."""
    if os.getuid() != 0:
        yield
        return
    before = os.geteuid(), os.getegid()
    become(user, group)
    try:
        yield
    finally:
        become(*before)


def become(user: int, group: int) -> None:
    """Change the effective user and group, which root may do."""
    os.seteuid(0)
    os.setegid(group)
    os.seteuid(user)


def rights_of_owner(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Have the rights of a directory's owner, so that a link that the owner made there leads nowhere else."""
    owner = directory.stat()
    return rights_of(owner.st_uid, owner.st_gid)


def open_log(directory: Path) -> dict[str, IO[bytes]]:
    """Open the manifest and the files of Redis's log as they are at one moment.

    Redis writes a new manifest before it starts another file, and appends to the last file only. If the
    manifest is the same before and after the files have been opened, they are the whole log, even if Redis
    removes some while they are read.
    """
    for _ in range(10):
        with contextlib.ExitStack() as stack:
            try:
                manifest = stack.enter_context((directory / MANIFEST).open("rb"))
            except FileNotFoundError:
                break
            text = manifest.read()
            # Lines have the form `file NAME seq 7 type i`. Files of type h are no longer needed.
            names = re.findall(r"(?m)^file (\S+) .*?type [bi]", text.decode())
            try:
                files = {name: stack.enter_context((directory / name).open("rb")) for name in names}
            except FileNotFoundError:
                continue
            if (directory / MANIFEST).read_bytes() == text:
                manifest.seek(0)
                stack.pop_all()
                return {MANIFEST: manifest} | files
    raise Problem(f"{directory} has no complete log: does Redis run, with `appendonly yes`?")


def copy(source: IO[bytes], path: Path) -> None:
    """Copy what a file contains now, even if it grows meanwhile."""
    left = os.fstat(source.fileno()).st_size
    with path.open("xb") as target:
        while left and (part := source.read(min(left, CHUNK))):
            target.write(part)
            left -= len(part)


def check_space(needed: int, directory: Path) -> None:
    """Raise Problem if the disk lacks space."""
    free = shutil.disk_usage(directory).free
    if free < needed + MARGIN:
        raise Problem(
            f"the disk of {directory} has {free / 1e6:.0f} MB free, and the backup needs"
            f" {(needed + MARGIN) / 1e6:.0f} MB: free some, or use a larger disk."
        )


class Server:
    """A second Redis with data of its own, on a socket that only root and the user can use."""

    def __init__(self, settings: Settings, directory: Path, *options: str) -> None:
        self._settings = settings
        self._directory = directory
        self._output = directory / "output"
        with self._output.open("w") as output:
            self._process = settings.start(
                *("redis-server", "--port", "0", "--unixsocket", "socket", "--unixsocketperm", "700"),
                *("--save", "", "--dbfilename", CANVAS, "--auto-aof-rewrite-percentage", "0"),
                # restic compresses the file, and finds more unchanged parts in one that isn't compressed.
                *("--rdbcompression", "no", *options),
                cwd=directory,
                stdout=output,
                stderr=output,
            )

    def __enter__(self) -> Server:
        try:
            # While it loads the data, every command fails.
            while self._ask("PING")[0] != 0:
                if self._process.poll() is not None:
                    raise Problem(self._failure())
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, *command: str) -> tuple[int, str]:
        asking = self._settings.start(
            *("redis-cli", "-e", "-s", "socket", *command),
            cwd=self._directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        answer = asking.communicate()[0].strip()
        return asking.returncode, answer

    def _failure(self) -> str:
        if self._process.returncode == -9:
            return "the second Redis was killed, because it needs more memory than redis_backup_memory_max."
        lines = [re.sub(r"^.*? [.*#] ", "", line) for line in self._output.read_text().splitlines()]
        return f"a second Redis can't load the data: {' '.join(lines[-2:])}"

    def run(self, *command: str) -> str:
        """Return the answer to a command."""
        status, answer = self._ask(*command)
        if self._process.poll() is not None:
            raise Problem(self._failure())
        if status != 0:
            raise Problem(f"the second Redis answered {command[0]} with an error: {answer}")
        return answer

    def digests(self) -> list[str]:
        """Return each key that doesn't expire, and the digest of its value."""
        return self.run("EVAL", self._settings.scripts["digests"], "0").splitlines()

    def is_empty(self) -> bool:
        """Tell whether no key has content."""
        return self.run("EVAL", self._settings.scripts["occupied"], "0") == "0"

    def save(self) -> None:
        """Write all keys to the file CANVAS."""
        self.run("SAVE")


class Repository:
    """The restic repository."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._environment = settings.environment | {
            "RESTIC_REPOSITORY": settings.repository,
            "RESTIC_PASSWORD": settings.password,
        }
        self._ours = ("--host", settings.fleet, "--tag", OURS)

    @property
    def address(self) -> str:
        """The repository's address without a password."""
        return re.sub(r"//[^/@]*@", "//", self._settings.repository)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start restic. It keeps no cache, so everything that it reads comes from the repository."""
        return self._settings.start("restic", "--no-cache", *arguments, env=self._environment, **options)

    def _run(self, *arguments: str, timeout: float | None = None, **options: Any) -> str:
        """Return restic's output."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        with self.start(*arguments, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException as error:
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise Problem(
                        f"the repository {self.address} didn't answer within {PATIENCE} s: check the address"
                        " (redis_backup_repository), and that this host can reach it."
                    ) from None
                raise
        if process.returncode == 0:
            return output or ""
        if "wrong password" in errors:
            raise Problem(
                f"redis_backup_password is not the password of the repository {self.address}. Use the one"
                " that it was created with: without it, nobody can read the backups."
            )
        reason = " ".join(errors.replace(self._settings.repository, self.address).split())
        raise Problem(f"restic {arguments[0]} failed on {self.address}: {reason.removeprefix('Fatal: ')}")

    def open(self, status: Status) -> None:
        """Open the repository, or create it in a place that has not been used before."""
        digest = hashlib.sha256(self._settings.repository.encode()).hexdigest()
        if self.address.startswith("/") and not os.access(self.address, os.W_OK, effective_ids=True):
            owner = pwd.getpwuid(os.geteuid()).pw_name
            raise Problem(
                f"{self.address} is not a directory that user {owner} can write to. Mount the disk of the"
                f" repository, then type: install -d -o {owner} -g {owner} -m 0700 {self.address}"
            )
        try:
            # Removes the locks of processes that no longer exist.
            self._run("unlock", timeout=PATIENCE)
        except Problem as problem:
            if "Is there a repository at" not in str(problem):
                raise
            if status.repository == digest:
                raise Problem(
                    f"the repository {self.address} can't be opened. Can this host reach it, and is its disk"
                    f" mounted? To begin a new one, remove {self._settings.home / 'status.json'}. ({problem})"
                ) from None
            self._run("init", timeout=PATIENCE)
        status.repository = digest

    def snapshots(self) -> list[dict[str, Any]]:
        """Return the snapshots of this fleet, the newest last."""
        output = self._run("snapshots", "--json", *self._ours, timeout=PATIENCE)
        return sorted(json.loads(output), key=lambda snapshot: str(snapshot["time"]))

    def find(self, name: str) -> dict[str, Any]:
        """Return a snapshot by the beginning of its ID, or the newest verified one."""
        known = self.snapshots()
        if name == "latest":
            matching = [one for one in known if VERIFIED in one["tags"]][-1:]
        else:
            matching = [one for one in known if one["id"].startswith(name)]
        if len(matching) != 1:
            fault = "several backups match" if matching else "no backup matches"
            listing = "\n".join(describe(known)) if known else f"nothing of '{self._settings.fleet}'"
            raise Problem(f"{fault} '{name}'. {self.address} has:\n{listing}")
        return matching[0]

    def save(self, directory: Path) -> str:
        """Back up the files of a directory; return the snapshot's ID."""
        names = sorted(path.name for path in directory.iterdir())
        lines = self._run("backup", "--json", "--quiet", *self._ours, *names, cwd=directory).splitlines()
        return str(json.loads(lines[-1])["snapshot_id"])

    def dump(self, snapshot: str, name: str, target: IO[Any]) -> None:
        """Write a file of a snapshot to an open file."""
        self._run("dump", snapshot, f"/{name}", stdout=target)

    def mark_verified(self, snapshot: str) -> None:
        """Tag a snapshot; this changes its ID."""
        self._run("tag", "--add", VERIFIED, snapshot)

    def remove(self, snapshots: list[str]) -> None:
        """Remove snapshots."""
        if snapshots:
            self._run("forget", *snapshots)

    def remove_old(self) -> None:
        """Remove the snapshots that the settings don't keep, and data that no snapshot needs."""
        kept = [f"--keep-{unit}={number}" for unit, number in self._settings.keep.items() if number]
        self._run("forget", "--prune", "--group-by", "host", *self._ours, *kept)


def describe(snapshots: list[dict[str, Any]]) -> list[str]:
    """Return a table of snapshots."""
    row = "{:<8}  {:<17}  {:<8}  {}".format
    return [
        row("ID", "TIME", "VERIFIED", "FILES"),
        *(
            row(
                one["short_id"],
                one["time"][:16].replace("T", " ") + "Z",
                "yes" if VERIFIED in one["tags"] else "no",
                ", ".join(Path(path).name for path in one["paths"]),
            )
            for one in snapshots
        ),
    ]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Backup:
    """One backup, in a temporary directory."""

    def __init__(self, settings: Settings, work: Path) -> None:
        self._settings = settings
        self._work = work
        self._digests: list[str] = []
        # Digest of the history's file, if there is one.
        self._history = ""
        # Why there is no backup of the history. That of the canvas is made nevertheless.
        self.history_problem: Problem | None = None
        self.files = self._directory("files")

    def _directory(self, name: str) -> Path:
        path = self._work / name
        path.mkdir()
        return path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.iterdir())

    def take(self, may_be_empty: bool) -> None:
        """Write the files to back up, and remember their digests."""
        settings = self._settings
        if settings.history:
            try:
                self._take_history(settings.history)
            except Problem as problem:
                self.history_problem = problem
        with contextlib.ExitStack() as stack:
            with rights_of_owner(settings.log.parent):
                log = open_log(settings.log)
            for file in log.values():
                stack.enter_context(file)
            # The log, the file made of it, and the file read back.
            check_space(3 * sum(os.fstat(file.fileno()).st_size for file in log.values()), self._work)
            directory = self._directory("log")
            (directory / "appendonlydir").mkdir()
            for name, file in log.items():
                copy(file, directory / "appendonlydir" / name)
        with Server(settings, directory, "--appendonly", "yes") as server:
            if server.is_empty() and not may_be_empty:
                raise Problem(
                    "the canvas is empty, and there are backups of it, so it was not backed up. Restore one"
                    " (playbooks/restore.yml); the next run after the first new pixel makes a backup again."
                )
            self._digests = server.digests()
            server.save()
        (directory / CANVAS).rename(self.files / CANVAS)
        shutil.rmtree(directory)

    def _take_history(self, directory: Path) -> None:
        # The service's user writes the copy, into the directory of the service.
        made = directory / "pixel-backup.sqlite"
        with rights_of_owner(directory):
            made.unlink(missing_ok=True)
        with rights_of(0, 0):
            done = subprocess.run(
                [PIXEL_HISTORY, "backup", made], text=True, capture_output=True, check=False
            )
        if done.returncode != 0:
            raise Problem(f"pixel-history backup failed: {' '.join(done.stderr.split())}")
        with rights_of_owner(directory):
            source = made.open("rb")
            made.unlink()
        with source:
            # The copy, and the file read back.
            check_space(2 * os.fstat(source.fileno()).st_size, self._work)
            copy(source, self.files / HISTORY)
        self._history = digest_of(self.files / HISTORY)

    def verify(self, repository: Repository, snapshot: str) -> None:
        """Read the files back from the repository and compare them with what was backed up."""
        directory = self._directory("restored")
        for name in sorted(path.name for path in self.files.iterdir()):
            with (directory / name).open("wb") as file:
                repository.dump(snapshot, name, file)
        with Server(self._settings, directory, "--appendonly", "no") as server:
            restored = server.digests()
        if different := set(restored) ^ set(self._digests):
            keys = sorted({line.split()[0] for line in different})
            raise Problem(f"the restored canvas differs from the one that was backed up: {', '.join(keys)}")
        if self._history:
            if digest_of(directory / HISTORY) != self._history:
                raise Problem("the restored history differs from the one that was backed up.")
            try:
                with contextlib.closing(sqlite3.connect(directory / HISTORY)) as database:
                    [(result,)] = database.execute("PRAGMA quick_check(1)")
            except sqlite3.DatabaseError as error:
                result = str(error)
            if result != "ok":
                raise Problem(f"the history's database is damaged: {result}")


@contextlib.contextmanager
def working_directory(settings: Settings) -> Iterator[Path]:
    """Create a temporary directory, after removing that of an interrupted run."""
    with (settings.home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem("another backup is being made; wait until it has ended.") from None
        for leftover in settings.home.glob("work.*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix="work.", dir=settings.home))
        try:
            yield work
        finally:
            shutil.rmtree(work)


def make_backup(settings: Settings, status: Status) -> None:
    """Make a backup, verify it, and remove old ones."""
    began = time.monotonic()
    repository = Repository(settings)
    with working_directory(settings) as work:
        repository.open(status)
        backup = Backup(settings, work)
        now = int(time.time())
        former = repository.snapshots()
        backup.take(may_be_empty=not former)
        snapshot = repository.save(backup.files)
        status.time = now
        backup.verify(repository, snapshot)
        repository.mark_verified(snapshot)
        status.verified, status.size = now, backup.size
    # A verified backup replaces earlier ones that could not be verified.
    repository.remove([str(one["id"]) for one in former if VERIFIED not in one["tags"]])
    repository.remove_old()
    status.seconds = round(time.monotonic() - began, 1)
    if backup.history_problem:
        raise backup.history_problem
    print(f"{settings.fleet}: {status.size} bytes backed up and verified in {status.seconds} s.")


def run(settings: Settings) -> None:
    """Make a backup and record the result."""
    status = Status.read(settings.home)
    status.error = "interrupted"
    try:
        make_backup(settings, status)
        status.error = ""
    except (OSError, Problem) as error:
        status.error = str(error)
        raise
    finally:
        status.write(settings)


def main(arguments: list[str], path: Path = SETTINGS) -> int:
    """Run a command of the command line; return the exit status."""
    os.umask(0o077)
    try:
        settings = Settings.read(path)
    except PermissionError:
        print("pixel-backup: only root can read its settings: use sudo.", file=sys.stderr)
        return 1
    try:
        if settings.user:
            user = pwd.getpwnam(settings.user)
            os.setgroups([])
            become(user.pw_uid, user.pw_gid)
        match arguments:
            case ["run"]:
                run(settings)
            case ["list", *names]:
                repository = Repository(settings)
                found = [repository.find(name) for name in names] if names else repository.snapshots()
                print("\n".join(describe(found)))
            case ["dump", name, file]:
                repository = Repository(settings)
                repository.dump(str(repository.find(name)["id"]), file, sys.stdout)
            case ["status"]:
                print(json.dumps(dataclasses.asdict(Status.read(settings.home))))
            case ["restic", *rest]:
                return Repository(settings).start(*rest).wait()
            case _:
                print(__doc__)
                return 2
    except (OSError, Problem) as error:
        print(f"pixel-backup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
