"""Paths of the agent's files; reading, atomic replacement and locking."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The agent's directories; tests use others."""

    nginx: Path = Path("/etc/nginx")
    state: Path = Path("/var/lib/pixel-lb")
    run: Path = Path("/run/pixel-lb")

    @property
    def staged(self) -> Path:
        """The configuration that `pixel-lb install` checks and applies."""
        return self.nginx / "staged"

    @property
    def facts(self) -> Path:
        """The inventory's facts in force."""
        return self.nginx / "pixel" / "backends.json"

    @property
    def upstreams(self) -> Path:
        """The upstreams in force."""
        return self.nginx / "pixel" / "upstreams.conf"

    @property
    def drains(self) -> Path:
        """The latest drain or undrain of each host, which Nginx serves to other balancers as `/lb/drains`."""
        return self.state / "drains.json"

    @property
    def former_drains(self) -> Path:
        """Releases before `drains.json` had a directory with one empty file for each drained host."""
        return self.state / "drained"

    @property
    def shares(self) -> Path:
        """The controller's shares in force."""
        return self.state / "shares.json"

    @property
    def canary(self) -> Path:
        """The host whose weight is limited for some time; see `Canary`."""
        return self.state / "canary.json"

    @property
    def report(self) -> Path:
        """The controller's latest report, which Nginx serves as `/lb/status`."""
        return self.run / "status.json"

    @property
    def pauses(self) -> Path:
        """The host's pauses, which Nginx serves as `/lb/pauses`; see `PauseRecord`."""
        return self.run / "pauses"

    @property
    def loaded(self) -> Path:
        """The fingerprint of the files that Nginx runs with."""
        return self.run / "loaded"

    @property
    def closing(self) -> Path:
        """While it exists, Nginx closes client connections after each answer."""
        return self.run / "closing"

    @property
    def lock(self) -> Path:
        """The lock of every command that changes something."""
        return self.run / "lock"


def read(path: Path) -> bytes | None:
    """Read a file.

    Returns:
        Its content, or None if it does not exist.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write(path: Path, content: bytes | None) -> bool:
    """Replace a file atomically, or remove it.

    Args:
        path: The file.
        content: Its new content, or None to remove it.

    Returns:
        Whether anything changed; a file with equal content is not written.
    """
    if read(path) == content:
        return False
    if content is None:
        path.unlink()
        return True
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        # Not through a link; with its final mode before it has its name.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            # Private keys are readable by root only, independent of the directory's mode.
            os.fchmod(descriptor, 0o600 if path.parent.name == "tls" else 0o644)
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # The error of a full disk does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return True


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file, waiting until it is free."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
