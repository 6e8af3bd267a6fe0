"""Nginx's processes: checks, announced reloads, open connections."""

from __future__ import annotations

import contextlib
import hashlib
import pwd
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from pixel_lb.errors import Refused
from pixel_lb.files import Paths

# The user of Nginx's workers.
WORKERS_USER = "www-data"
RELOAD_SECONDS = 10.0
# Longer than the time that a busy client leaves a connection idle. Nginx looks for the file once a second.
ANNOUNCE_SECONDS = 2.5


class Nginx:
    """The running Nginx and its files.

    A reload is announced: for some seconds before it, answers contain `Connection: close`, so that clients
    open a new connection for their next request. Nginx closes idle connections when it reloads, and would
    lose requests that arrive on them.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def fingerprint(self) -> str:
        """Return a hash of all files that Nginx reads."""
        root = self._paths.nginx
        digest = hashlib.sha256()
        certificates = (root / "tls").glob("fullchain.pem")
        for path in [root / "nginx.conf", *sorted((root / "pixel").glob("*.conf")), *certificates]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def mark_loaded(self) -> None:
        """Record that Nginx has loaded the current files."""
        self._paths.loaded.write_text(self.fingerprint())

    def is_running(self) -> bool:
        """Return whether Nginx runs."""
        return master_pid() is not None

    def is_current(self) -> bool:
        """Return whether Nginx has loaded the files that are on disk."""
        stamp = self._paths.loaded
        return stamp.exists() and stamp.read_text() == self.fingerprint()

    def reload_if_needed(self) -> bool:
        """Reload Nginx if it has not loaded the current files, as after an interrupted run.

        Returns:
            Whether it was reloaded.

        Raises:
            Refused: Nginx rejects the files.
        """
        if not self.is_running() or self.is_current():
            return False
        self.reload()
        return True

    def reload(self) -> None:
        """Check the files, announce the reload to clients, reload, and wait for new workers.

        Raises:
            Refused: Nginx does not run, rejects the files, or starts no new worker.
        """
        fingerprint = self.fingerprint()
        master = master_pid()
        if master is None:
            raise Refused("Nginx is not running: systemctl start nginx")
        checked = run_nginx("-t", "-q")
        if checked.returncode != 0:
            raise Refused(f"nginx -t failed, the running configuration is kept:\n{checked.stderr.strip()}")
        before = worker_pids(master)
        try:
            self._paths.closing.touch()
            time.sleep(ANNOUNCE_SECONDS)
            done = run_nginx("-s", "reload")
            if done.returncode != 0:
                raise Refused(f"nginx -s reload failed: {done.stderr.strip()}")
            # Nginx handles the signal asynchronously, and old workers keep accepting for a while after new
            # ones have started. Keep the announcement until the last old worker accepts no more requests.
            deadline = time.monotonic() + RELOAD_SECONDS
            while not (workers := worker_pids(master)) or workers & before:
                if time.monotonic() > deadline:
                    late = (
                        f"old workers still serve {RELOAD_SECONDS:.0f} s after the reload; see the error log"
                    )
                    if not workers - before:
                        # Nginx may still reload later, with the files of that time.
                        self._paths.loaded.unlink(missing_ok=True)
                        raise Refused(late)
                    # New workers have started, so the new files are loaded.
                    print(f"pixel-lb: {late}", file=sys.stderr)
                    break
                time.sleep(0.02)
        finally:
            self._paths.closing.unlink(missing_ok=True)
        self._paths.loaded.write_text(fingerprint)


def run_nginx(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the Nginx binary."""
    return subprocess.run(["/usr/sbin/nginx", *args], text=True, capture_output=True, check=False)


def master_pid() -> int | None:
    """Return the pid of the running master, or None."""
    try:
        pid = int(Path("/run/nginx.pid").read_text())
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"master process" in title else None


def worker_pids(master: int) -> set[int]:
    """Return the pids of workers that accept connections, without those that are shutting down."""
    pids = set()
    for child in Path(f"/proc/{master}/task/{master}/children").read_text().split():
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{child}/cmdline").read_bytes()
            if re.match(rb"nginx: worker process(?! is)", title):
                pids.add(int(child))
    return pids


def connections(address: str, user: str = WORKERS_USER) -> int:
    """Count the connections that Nginx has open to a backend.

    Args:
        address: `unix:/path` or `a.b.c.d:port`.
        user: Owner of the connections, because other programs such as Prometheus connect to backends too.

    Returns:
        The number of established connections.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        table = Path("/proc/net/unix").read_text().splitlines()[1:]
        # The server's end of a connection has the path of the listening socket.
        return sum(line.endswith(" " + path) and line.split()[5] == "03" for line in table)
    host, port = address.rsplit(":", 1)
    remote = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{int(port):04X}"
    state, owner = "01", str(pwd.getpwnam(user).pw_uid)
    rows = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum((fields[2], fields[3], fields[7]) == (remote, state, owner) for fields in rows)
