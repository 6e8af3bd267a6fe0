#!/usr/bin/python3
"""The balancer's upstreams: which backends take requests, at what weight.

What the inventory says lies in `backends.json`, what an operator has taken out in `drained/`, what
the controller thinks of each backend in `shares.json`; together they make `upstreams.conf`. Nginx
never sees a file that `nginx -t` refuses: the new configuration is staged and checked, then put in
place, and the former one comes back if the reload fails.

    pixel-lb install        put the staged configuration in force
    pixel-lb drain NAME     give this host no new requests (never the last one, unless --force),
                            and wait until those in flight have ended
    pixel-lb undrain NAME   give it requests again, and wait until it answers some (where requests go by
                            a key, or to a backup, none may come: then it doesn't wait)
    pixel-lb certificate FOLDER
                            put this certificate and its key in force (certbot calls it after a renewal)
    pixel-lb reload         make Nginx read its files again
    pixel-lb watch          the controller: look at the backends, and keep shares.json (see watch.py)
    pixel-lb status         what is in force, as JSON
    pixel-lb loaded         note that Nginx has just read its files (the unit calls it)

A reload is announced: for some seconds before it, answers ask clients to connect anew for their next
request. Nginx closes idle connections when it reloads, and would lose what is just on its way there.

The first three say `changed` or `unchanged`. Exit status: 0 done, 1 refused and nothing changed,
3 refused because it is the last backend, 4 changed but the wait was in vain.

Only the standard library is used: the host's own Python runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import pwd
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controller import Share

NGINX = Path("/etc/nginx")
STATE = Path("/var/lib/pixel-lb")
RUN = Path("/run/pixel-lb")
# As whom Nginx' workers run.
WORKERS = "www-data"
RELOAD_SECONDS = 10.0
# Longer than busy clients leave a connection idle.
ANNOUNCE_SECONDS = 2.0
WHOLE = Share(1.0, False)
# Methods that send all requests of one client, or with one key, to one server.
KEYED = {"ip_hash", "hash"}


class Refused(Exception):
    """Something the operator can mend; nothing was changed."""

    status = 1


class LastBackend(Refused):
    """Without it nobody would answer."""

    status = 3


class InVain(Refused):
    """It is changed, but what should have followed did not."""

    status = 4


class Balancer:
    """Files under one root, so that tests can have a root of their own."""

    def __init__(self, nginx: Path = NGINX, state: Path = STATE, run: Path = RUN) -> None:
        self.nginx = nginx
        self.staged = nginx / "staged"
        self.drained_dir = state / "drained"
        self.shares_file = state / "shares.json"
        self.status_file = run / "status.json"
        self.stamp = run / "loaded"
        self.lock = run / "lock"
        self.closing = run / "closing"

    # --- what is wanted ---------------------------------------------------------------------

    def backends(self, root: Path) -> dict[str, Any]:
        """The inventory's view: `{"probe": URL, "upstreams": {name: {"lines": {…}, "servers": [{…}]}}}`.

        Upstream `pixel` has all the servers; others have some of them, or choose in another way.
        """
        loaded: dict[str, Any] = json.loads((root / "pixel" / "backends.json").read_text())
        return loaded

    def drained(self) -> list[str]:
        return sorted(path.name for path in self.drained_dir.glob("*"))

    def hosts(self, backends: dict[str, Any]) -> list[str]:
        return sorted({server["host"] for server in backends["upstreams"]["pixel"]["servers"]})

    def shares(self) -> dict[str, Share]:
        """What the controller gives each server, of its base weight; the whole where it says nothing."""
        content = _read(self.shares_file)
        return {name: Share(*share) for name, share in json.loads(content or b"{}").items()}

    def out(self, backends: dict[str, Any]) -> set[str]:
        """The hosts that get no requests: drained, or not ready."""
        shares = self.shares()
        servers = backends["upstreams"]["pixel"]["servers"]
        up = {each["host"] for each in servers if not shares.get(each["name"], WHOLE).down}
        return set(self.drained()) | (set(self.hosts(backends)) - up)

    def render(self, backends: dict[str, Any]) -> str:
        """The text of `upstreams.conf`."""
        drained, shares = set(self.drained()), self.shares()
        parts = ["# Written by pixel-lb from backends.json; what is drained or not ready is marked down.\n"]
        for name, upstream in backends["upstreams"].items():
            servers = upstream["servers"]
            given = [shares.get(server["name"], WHOLE) for server in servers]
            # On a ring, a weight is how many items a server has; they are to stay where they are.
            weights = weigh(servers, [WHOLE] * len(servers) if upstream["ring"] else given)
            # Where nobody would be left, who isn't drained stays in.
            sparing = all(
                share.down or server["host"] in drained for server, share in zip(servers, given, strict=True)
            )
            parts.append(f"upstream {name} {{\n")
            parts += [f"    {line};\n" for line in upstream["lines"]["first"]]
            downs = [
                server["host"] in drained or (share.down and not sparing)
                for server, share in zip(servers, given, strict=True)
            ]
            # Who is left alone is the only server that Nginx sees. It is then asked again if it closed a kept
            # connection just as a request went out on it (of several, Nginx would ask another one), and never
            # left out for failures.
            alone = downs.count(False) == 1
            for server, weight, down in zip(servers, weights, downs, strict=True):
                flags = " backup" * (server["backup"] and not alone) + " down" * down
                parts.append(
                    f"    {'# ' * (alone and down)}server {server['address']} weight={weight}"
                    f" max_fails={server['max_fails']} fail_timeout={server['fail_timeout']}{flags};"
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
        return self._put({file: (self.staged / file).read_bytes() for file in files})

    def certificate(self, source: Path) -> bool:
        """Put a renewed certificate and its key in force; they lie in a folder. True if they are new."""
        names = ("fullchain.pem", "privkey.pem")
        wanted = {Path("tls", name): (source / name).read_bytes() for name in names}
        changed = self._put(wanted)
        # What is staged next has it as well.
        for file, content in wanted.items():
            replace(self.staged / file, content)
        return changed

    def _put(self, wanted: dict[Path, bytes]) -> bool:
        """Put files in place and reload, or leave all as it was. True if anything changed."""
        former = {file: _read(self.nginx / file) for file in wanted}
        for file, content in wanted.items():
            replace(self.nginx / file, content)
        try:
            reloaded = self.reload_if_needed()
        except Refused:
            for file, content_before in former.items():
                _restore(self.nginx / file, content_before)
            raise
        return former != wanted or reloaded

    def fingerprint(self) -> str:
        """One word for all the files that Nginx reads."""
        digest = hashlib.sha256()
        certificate = (self.nginx / "tls").glob("fullchain.pem")
        for path in [self.nginx / "nginx.conf", *sorted((self.nginx / "pixel").glob("*.conf")), *certificate]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def note_loaded(self) -> None:
        self.stamp.write_text(self.fingerprint())

    def reload_if_needed(self) -> bool:
        """Reload Nginx if it runs with other files than there are; also after an interrupted run."""
        if master_pid() is None or (self.stamp.exists() and self.stamp.read_text() == self.fingerprint()):
            return False
        self.reload()
        return True

    def reload(self) -> None:
        """Check the files, announce the reload to clients, and see it happen."""
        wanted = self.fingerprint()
        master = master_pid()
        if master is None:
            raise Refused("Nginx doesn't run: systemctl start nginx")
        checked = nginx("-t", "-q")
        if checked.returncode != 0:
            raise Refused(f"nginx -t refuses, the running configuration stays:\n{checked.stderr.strip()}")
        before = worker_pids(master)
        try:
            self.closing.touch()
            time.sleep(ANNOUNCE_SECONDS)
            done = nginx("-s", "reload")
            if done.returncode != 0:
                raise Refused(f"Nginx did not reload: {done.stderr.strip()}")
            # The signal is taken some time later, and the old workers go on after the new ones have begun:
            # until the last of them takes no more requests, clients are told not to keep connections.
            deadline = time.monotonic() + RELOAD_SECONDS
            while not (workers := worker_pids(master)) or workers & before:
                if time.monotonic() > deadline:
                    late = (
                        f"old workers still serve {RELOAD_SECONDS:.0f} s after the reload; see the error log"
                    )
                    if not workers - before:
                        # It may still come to it: whatever files there are then have to be read anew.
                        self.stamp.unlink(missing_ok=True)
                        raise Refused(late)
                    # New ones are there, and so the new files are in force.
                    print(f"pixel-lb: {late}", file=sys.stderr)
                    break
                time.sleep(0.02)
        finally:
            self.closing.unlink(missing_ok=True)
        self.stamp.write_text(wanted)

    # --- draining ---------------------------------------------------------------------------

    def drain(self, name: str, *, force: bool = False) -> bool:
        """Mark it down. True if that is new."""
        backends = self.backends(self.nginx)
        self._known(name, backends)
        left = set(self.hosts(backends)) - self.out(backends) - {name}
        if not left and not force:
            raise LastBackend(
                f"{name} is the last backend that takes requests; --force drains it all the same"
            )
        return self._mark(name, True, backends)

    def undrain(self, name: str) -> bool:
        """Take the mark away. True if there was one."""
        backends = self.backends(self.nginx)
        self._known(name, backends)
        return self._mark(name, False, backends)

    def _mark(self, name: str, drained: bool, backends: dict[str, Any]) -> bool:
        """Drained or not; the former mark stays if Nginx doesn't take it."""
        mark = self.drained_dir / name
        former = _read(mark)
        _restore(mark, b"" if drained else None)
        try:
            return self._apply(backends)
        except Refused:
            _restore(mark, former)
            raise

    def give(self, shares: dict[str, Share]) -> None:
        """Put the controller's shares in force; the former ones stay if Nginx doesn't take them."""
        former = _read(self.shares_file)
        replace(self.shares_file, json.dumps(shares, indent=1).encode())
        try:
            self._apply(self.backends(self.nginx))
        except Refused:
            _restore(self.shares_file, former)
            raise

    def _known(self, name: str, backends: dict[str, Any]) -> None:
        names = self.hosts(backends)
        if name not in names:
            raise Refused(f"there is no backend {name!r}; there are {', '.join(names)}")

    def _apply(self, backends: dict[str, Any]) -> bool:
        path = self.nginx / "pixel" / "upstreams.conf"
        former = _read(path)
        text = self.render(backends).encode()
        if former != text:
            replace(path, text)
        try:
            return self.reload_if_needed()
        except Refused:
            _restore(path, former)
            raise

    def wait_until_idle(self, name: str, seconds: float) -> None:
        """Wait for the end of what the old workers still have in flight there.

        New workers don't connect to a backend that is down, and old ones close what is idle; so
        every connection of theirs to it that is left is a request.
        """
        deadline = time.monotonic() + seconds
        while left := sum(connections(address) for address in self._addresses(name)):
            if time.monotonic() > deadline:
                raise InVain(f"{name} still has {left} requests in flight after {seconds:.0f} s")
            time.sleep(0.05)

    def wait_until_seen(self, name: str, seconds: float) -> None:
        """Wait until it has answered a request that came through Nginx, if one of ours can come to it."""
        backends = self.backends(self.nginx)
        url = backends["probe"]
        servers = {
            each["name"]
            for each in backends["upstreams"]["pixel"]["servers"]
            if each["host"] == name and not each["backup"]
        }
        if not servers or backends["watch"]["method"] in KEYED:
            return
        deadline = time.monotonic() + seconds
        while ask(url) not in servers:
            if time.monotonic() > deadline:
                raise InVain(f"{name} has answered none of the requests to {url} within {seconds:.0f} s")
            time.sleep(0.02)

    def _addresses(self, name: str) -> set[str]:
        upstreams = self.backends(self.nginx)["upstreams"].values()
        servers = (server for upstream in upstreams for server in upstream["servers"])
        return {server["address"] for server in servers if server["host"] == name}

    def status(self) -> dict[str, Any]:
        """Backends with address, weight and state, and whether Nginx runs with these files."""
        drained, shares = self.drained(), self.shares()
        said = json.loads(_read(self.status_file) or b"{}")
        thoughts = {each["name"]: each["why"] for each in said.get("backends", [])}
        servers = self.backends(self.nginx)["upstreams"]["pixel"]["servers"]
        given = [shares.get(server["name"], WHOLE) for server in servers]
        backends = {
            server["name"]: {
                "host": server["host"],
                "address": server["address"],
                "base": server["weight"],
                "weight": weight,
                "state": "drained" if server["host"] in drained else "down" if share.down else "up",
                "why": "taken out by hand" if server["host"] in drained else thoughts.get(server["name"], ""),
                "connections": connections(server["address"]),
            }
            for server, share, weight in zip(servers, given, weigh(servers, given), strict=True)
        }
        loaded = self.stamp.exists() and self.stamp.read_text() == self.fingerprint()
        controller = {
            "age_s": round(time.time() - self.status_file.stat().st_mtime) if said else None,
            "alarm": said.get("alarm", ""),
            "error": said.get("error", ""),
        }
        running = master_pid() is not None
        return {"backends": backends, "controller": controller, "running": running, "loaded": loaded}


def weigh(servers: list[dict[str, Any]], shares: list[Share]) -> list[int]:
    """Weights for Nginx: the base weights, or, where shares differ, whole numbers in their ratio."""
    base = [int(server["weight"]) for server in servers]
    if all(share.factor == 1 for share in shares):
        return base
    weights = [max(1, round(100 * one * share.factor)) for one, share in zip(base, shares, strict=True)]
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


# --- connections ------------------------------------------------------------------------------


def connections(address: str, user: str = WORKERS) -> int:
    """Connections that Nginx has open to a backend: `unix:/path` or `a.b.c.d:port`."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        table = Path("/proc/net/unix").read_text().splitlines()[1:]
        # A connected socket at the server's end bears the path of the one that listens.
        return sum(line.endswith(" " + path) and line.split()[5] == "03" for line in table)
    host, port = address.rsplit(":", 1)
    remote = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{int(port):04X}"
    # Others look at the backends as well: Prometheus keeps its connections.
    state, owner = "01", str(pwd.getpwnam(user).pw_uid)
    rows = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum((fields[2], fields[3], fields[7]) == (remote, state, owner) for fields in rows)


def ask(url: str) -> str | None:
    """Which instance answers; None if none does."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            name: str | None = answer.headers["X-Pixel-Instance"]
            return name
    except (OSError, urllib.error.URLError):
        return None


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


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all; untouched if it is so already."""
    if _read(path) == content:
        return
    half = path.with_name(path.name + ".new")
    # The folder of keys is root's alone; they are so by themselves as well.
    half.touch(0o600 if path.parent.name == "tls" else 0o644)
    half.write_bytes(content)
    half.replace(path)


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        replace(path, content)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One change at a time; the next waits."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(changed: bool) -> None:
    print("changed" if changed else "unchanged", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="pixel-lb", description="The balancer's upstreams.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="put the staged configuration in force")
    draining = commands.add_parser("drain", help="give a backend no new requests")
    draining.add_argument("--force", action="store_true", help="even if it is the last one")
    returning = commands.add_parser("undrain", help="give it requests again")
    for command in (draining, returning):
        command.add_argument("name")
        command.add_argument("--wait", type=float, default=10, metavar="SECONDS", help="default 10")
    renewing = commands.add_parser("certificate", help="put this certificate and its key in force")
    renewing.add_argument("folder", type=Path, help="with fullchain.pem and privkey.pem")
    commands.add_parser("reload", help="make Nginx read its files again")
    commands.add_parser("status", help="what is in force, as JSON")
    watching = commands.add_parser("watch", help="the controller; runs until it is stopped")
    watching.add_argument("--dry-run", action="store_true", help="say what it would do, and do nothing")
    commands.add_parser("loaded", help="note that Nginx has just read its files")
    args = parser.parse_args()
    if args.command == "watch":
        program = str(Path(__file__).resolve().with_name("watch.py"))
        os.execv(sys.executable, [sys.executable, program, *["--dry-run"] * args.dry_run])
    balancer = Balancer()
    try:
        if args.command == "status":
            print(json.dumps(balancer.status(), indent=2))
            return 0
        with alone(balancer.lock):
            # Left by a run that was killed.
            balancer.closing.unlink(missing_ok=True)
            if args.command == "reload":
                balancer.reload()
            elif args.command == "loaded":
                balancer.note_loaded()
            elif args.command == "certificate":
                say(balancer.certificate(args.folder))
            elif args.command == "install":
                say(balancer.install())
            elif args.command == "drain":
                say(balancer.drain(args.name, force=args.force))
            else:
                say(balancer.undrain(args.name))
        # Not in the others' way: the controller may have to take another backend out meanwhile.
        if args.command == "drain":
            balancer.wait_until_idle(args.name, args.wait)
        elif args.command == "undrain":
            balancer.wait_until_seen(args.name, args.wait)
    except Refused as refusal:
        print(f"pixel-lb: {refusal}", file=sys.stderr)
        return refusal.status
    except FileNotFoundError as error:
        print(f"pixel-lb: {error.filename} is missing: run playbooks/nginx_lb.yml", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
