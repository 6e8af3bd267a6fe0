#!/usr/bin/python3
"""The balancer's upstreams: which backends take requests, at what weight.

What the inventory says lies in `backends.json`, what an operator or a deploy has taken out in
`drained/`; together they make `upstreams.conf`. Nginx never sees a file that `nginx -t` refuses:
the new configuration is staged and checked, then put in place, and the former one comes back if
the reload fails.

    pixel-lb install        put the staged configuration in force; says `changed` or `unchanged`
    pixel-lb drain NAME     give this backend no new requests (never the last one, unless --force)
    pixel-lb undrain NAME   give it requests again
    pixel-lb status         what is in force, as JSON
    pixel-lb loaded         note that Nginx has just read its files (the unit calls it)

Only the standard library is used: the host's own Python runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NGINX = Path("/etc/nginx")
STATE = Path("/var/lib/pixel-lb")
RUN = Path("/run/pixel-lb")
RELOAD_SECONDS = 10.0


class Refused(Exception):
    """Something the operator can mend; nothing was changed."""


class Balancer:
    """Files under one root, so that tests can have a root of their own."""

    def __init__(self, nginx: Path = NGINX, state: Path = STATE, run: Path = RUN) -> None:
        self.nginx = nginx
        self.staged = nginx / "staged"
        self.drained_dir = state / "drained"
        self.stamp = run / "loaded"
        self.lock = run / "lock"

    # --- what is wanted ---------------------------------------------------------------------

    def backends(self, root: Path) -> dict[str, Any]:
        """The inventory's view: `{"upstreams": {name: {"lines": […], "servers": [{…}]}}}`."""
        loaded: dict[str, Any] = json.loads((root / "pixel" / "backends.json").read_text())
        return loaded

    def drained(self) -> list[str]:
        return sorted(path.name for path in self.drained_dir.glob("*"))

    def names(self, backends: dict[str, Any]) -> list[str]:
        servers = (server for upstream in backends["upstreams"].values() for server in upstream["servers"])
        return sorted({server["name"] for server in servers})

    def render(self, backends: dict[str, Any]) -> str:
        """The text of `upstreams.conf`."""
        drained = set(self.drained())
        parts = ["# Written by pixel-lb from backends.json; what is drained is marked down.\n"]
        for name, upstream in backends["upstreams"].items():
            parts.append(f"upstream {name} {{\n")
            parts += [f"    {line};\n" for line in upstream["lines"]["first"]]
            for server in upstream["servers"]:
                down = " down" if server["name"] in drained else ""
                parts.append(
                    f"    server {server['address']} weight={server['weight']}"
                    f" max_fails={server['max_fails']} fail_timeout={server['fail_timeout']}{down};"
                    f" # {server['name']}\n"
                )
            parts += [f"    {line};\n" for line in upstream["lines"]["last"]]
            parts.append("}\n")
        return "".join(parts)

    # --- putting it in force ----------------------------------------------------------------

    def install(self) -> bool:
        """Check what is staged, put it in place, reload. True if anything changed."""
        (self.staged / "pixel" / "upstreams.conf").write_text(self.render(self.backends(self.staged)))
        files = sorted(path.relative_to(self.staged) for path in self.staged.rglob("*") if path.is_file())
        checked = nginx("-t", "-q", "-c", str(self.staged / "nginx.conf"))
        if checked.returncode != 0:
            raise Refused(f"the staged files are wrong, the running ones stay:\n{checked.stderr.strip()}")
        former = {file: _read(self.nginx / file) for file in files}
        wanted = {file: (self.staged / file).read_bytes() for file in files}
        differs = former != wanted
        for file, content in wanted.items():
            _replace(self.nginx / file, content)
        try:
            reloaded = self.reload_if_needed()
        except Refused:
            for file, content_before in former.items():
                if content_before is None:
                    (self.nginx / file).unlink()
                else:
                    _replace(self.nginx / file, content_before)
            raise
        return differs or reloaded

    def fingerprint(self) -> str:
        """One word for all the files that Nginx reads."""
        digest = hashlib.sha256()
        for path in [self.nginx / "nginx.conf", *sorted((self.nginx / "pixel").glob("*.conf"))]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def note_loaded(self) -> None:
        self.stamp.write_text(self.fingerprint())

    def reload_if_needed(self) -> bool:
        """Reload Nginx if it runs with other files than there are; also after an interrupted run."""
        wanted = self.fingerprint()
        master = master_pid()
        if master is None or (self.stamp.exists() and self.stamp.read_text() == wanted):
            return False
        before = worker_pids(master)
        checked = nginx("-t", "-q")
        if checked.returncode != 0:
            raise Refused(f"nginx -t refuses, the running configuration stays:\n{checked.stderr.strip()}")
        done = nginx("-s", "reload")
        if done.returncode != 0:
            raise Refused(f"Nginx did not reload: {done.stderr.strip()}")
        # The signal is taken some time later; only new workers show that the reload happened.
        deadline = time.monotonic() + RELOAD_SECONDS
        while not worker_pids(master) - before:
            if time.monotonic() > deadline:
                raise Refused(
                    f"no new workers within {RELOAD_SECONDS:.0f} s of the reload; see the error log"
                )
            time.sleep(0.02)
        self.stamp.write_text(wanted)
        return True

    # --- draining ---------------------------------------------------------------------------

    def drain(self, name: str, force: bool) -> bool:
        backends = self.backends(self.nginx)
        self._known(name, backends)
        left = [other for other in self.names(backends) if other != name and other not in self.drained()]
        if not left and not force:
            raise Refused(f"{name} is the last backend that takes requests; --force drains it all the same")
        return self._mark(name, True, backends)

    def undrain(self, name: str) -> bool:
        backends = self.backends(self.nginx)
        self._known(name, backends)
        return self._mark(name, False, backends)

    def _known(self, name: str, backends: dict[str, Any]) -> None:
        names = self.names(backends)
        if name not in names:
            raise Refused(f"there is no backend {name!r}; there are {', '.join(names)}")

    def _mark(self, name: str, down: bool, backends: dict[str, Any]) -> bool:
        mark = self.drained_dir / name
        if down:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
        path = self.nginx / "pixel" / "upstreams.conf"
        former = _read(path)
        text = self.render(backends).encode()
        if former != text:
            _replace(path, text)
        try:
            return self.reload_if_needed()
        except Refused:
            if former is not None:
                _replace(path, former)
            raise

    def status(self) -> dict[str, Any]:
        """Backends with address, weight and state, and whether Nginx runs with these files."""
        drained = self.drained()
        backends = {}
        for upstream, spec in self.backends(self.nginx)["upstreams"].items():
            for server in spec["servers"]:
                backends[server["name"]] = {
                    "upstream": upstream,
                    "address": server["address"],
                    "weight": server["weight"],
                    "state": "drained" if server["name"] in drained else "up",
                }
        loaded = self.stamp.exists() and self.stamp.read_text() == self.fingerprint()
        return {"backends": backends, "running": master_pid() is not None, "loaded": loaded}


# --- Nginx' processes ------------------------------------------------------------------------


def nginx(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/usr/sbin/nginx", *args], text=True, capture_output=True, check=False)


def master_pid() -> int | None:
    """The pid of the running master, or None."""
    try:
        pid = int(Path("/run/nginx.pid").read_text())
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"master process" in title else None


def worker_pids(master: int) -> set[int]:
    """Workers that take connections; those that only finish theirs are not among them."""
    pids = set()
    for child in Path(f"/proc/{master}/task/{master}/children").read_text().split():
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{child}/cmdline").read_bytes()
            if re.match(rb"nginx: worker process(?! is)", title):
                pids.add(int(child))
    return pids


# --- files -----------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all; untouched if it is so already."""
    if _read(path) == content:
        return
    half = path.with_name(path.name + ".new")
    half.write_bytes(content)
    half.replace(path)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One change at a time; the next waits."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="pixel-lb", description="The balancer's upstreams.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="put the staged configuration in force")
    draining = commands.add_parser("drain", help="give a backend no new requests")
    draining.add_argument("name")
    draining.add_argument("--force", action="store_true", help="even if it is the last one")
    commands.add_parser("undrain", help="give it requests again").add_argument("name")
    commands.add_parser("status", help="what is in force, as JSON")
    commands.add_parser("loaded", help="note that Nginx has just read its files")
    args = parser.parse_args()
    balancer = Balancer()
    try:
        with alone(balancer.lock):
            if args.command == "status":
                print(json.dumps(balancer.status(), indent=2))
            elif args.command == "loaded":
                balancer.note_loaded()
            else:
                changed = (
                    balancer.install()
                    if args.command == "install"
                    else balancer.drain(args.name, args.force)
                    if args.command == "drain"
                    else balancer.undrain(args.name)
                )
                print("changed" if changed else "unchanged")
    except Refused as refusal:
        print(f"pixel-lb: {refusal}", file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print(f"pixel-lb: {error.filename} is missing: run playbooks/nginx_lb.yml", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
