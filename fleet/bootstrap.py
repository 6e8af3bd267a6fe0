#!/usr/bin/env python3
"""Prepare a control node: install Debian packages, and the locked Python libraries in `.venv`.

It needs only the standard library, so it runs on a fresh Debian or Ubuntu.

    bootstrap.py control    for `site.yml`: ansible-core
    bootstrap.py aws        also for `playbooks/provision.yml`: the collection amazon.aws
    bootstrap.py report     also for the load report: matplotlib
    bootstrap.py locust     for bench/load/locustfile.py: Locust
    bootstrap.py test       for all tests
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
ESLINT = ROOT / ".config" / "eslint"
LOCKS = {
    "control": ("control.txt",),
    "aws": ("aws.txt",),
    "report": ("control.txt", "report.txt"),
    "locust": ("locust.txt",),
    "test": ("test.txt", "report.txt", "locust.txt"),
}
# Commands that the tests run, and their Debian packages.
TEST_COMMANDS = {
    "chromium": "chromium",
    "curl": "curl",
    "ffmpeg": "ffmpeg",
    "git": "git",
    "nginx": "nginx",
    "node": "nodejs",
    "npm": "npm",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "restic": "restic",
    "wrk": "wrk",
}
# In Ubuntu chromium is only a snap. Without a browser only the tests that open a page fail.
OPTIONAL = ("chromium",)

_started = time.monotonic()


class Problem(Exception):
    """An error that the user can fix; the text says how."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.monotonic() - _started:6.1f} s  {text}", flush=True)


def run(
    *command: str, check: bool = True, stdin: str | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is shown only if it fails."""
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, timeout=timeout)
    if check and done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise Problem(f"`{' '.join(command[:6])}` failed:\n{tail}")
    return done


def as_root(*command: str) -> tuple[str, ...]:
    """Return the command, with sudo unless this user is root."""
    if os.geteuid() == 0:
        return command
    if not shutil.which("sudo"):
        raise Problem(f"`{command[0]}` needs root: run as root, or install sudo.")
    return ("sudo", *command)


def install_packages(*packages: str, if_known: tuple[str, ...] = ()) -> None:
    """Install Debian packages, and those of `if_known` that this release has."""
    if not shutil.which("apt-get"):
        raise Problem(f"install {', '.join(packages)} by hand: this system has no apt-get.")
    say(f"installing {', '.join(packages + if_known)}")
    apt = as_root("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet")
    run(*apt, "update")
    # For a purely virtual package apt-cache succeeds and prints nothing.
    known = [package for package in if_known if run("apt-cache", "show", package, check=False).stdout]
    run(*apt, "install", "--yes", "--no-install-recommends", *packages, *known)


def find(command: str) -> str | None:
    """Return the path of a command, also in /usr/sbin and /sbin, which a user's PATH may lack."""
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def ensure_packages(profile: str) -> None:
    wanted = {"ssh": "openssh-client", **(TEST_COMMANDS if profile == "test" else {})}
    missing = sorted({package for command, package in wanted.items() if not find(command)})
    # Debian has the files that `python3 -m venv` needs in a separate package.
    if run(sys.executable, "-c", "import ensurepip, venv", check=False).returncode != 0:
        missing.append("python3-venv")
    if missing:
        optional = tuple(package for package in missing if package in OPTIONAL)
        install_packages(*(package for package in missing if package not in optional), if_known=optional)
        for package in optional:
            if not find(package):
                say(f"apt has no {package}; install it by hand, or the tests that need it fail")


def ensure_venv(profile: str) -> None:
    """Install the locked libraries in `.venv`; replace an incomplete `.venv`."""
    python = VENV / "bin" / "python"
    if not python.exists() or run(str(python), "-m", "pip", "--version", check=False).returncode != 0:
        say("creating .venv")
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
    locks = [ROOT / "requirements" / name for name in LOCKS[profile]]
    wanted = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    stamp = VENV / f"{profile}.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say(f"installing the locked libraries ({profile})")
    files = [part for lock in locks for part in ("--requirement", str(lock))]
    run(str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--require-hashes", *files)
    # pip would compile on one processor, also the collections of the package `ansible`, of which one is used.
    # Some libraries have templates that aren't valid Python.
    unused = "/ansible_collections/(?!amazon/)"
    run(str(python), "-m", "compileall", "-q", "-j", "0", "-x", unused, str(VENV / "lib"), check=False)
    stamp.write_text(wanted)


def ensure_eslint() -> None:
    """Install the locked ESLint, which checks the live page."""
    wanted = hashlib.sha256((ESLINT / "package-lock.json").read_bytes()).hexdigest()
    stamp = ESLINT / "node_modules" / "lock.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("installing the locked ESLint")
    run("npm", "--prefix", str(ESLINT), "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    stamp.write_text(wanted)


def main() -> None:
    profile = sys.argv[1] if len(sys.argv) == 2 else ""
    if profile not in LOCKS:
        raise SystemExit(f"usage: bootstrap.py {'|'.join(LOCKS)}")
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python gets this message)
        raise SystemExit(
            f"this is Python {sys.version.split()[0]}; 3.11 or newer is needed. Name one:"
            " make PYTHON=/path/to/python3.11 …"
        )
    try:
        ensure_packages(profile)
        ensure_venv(profile)
        if profile == "test":
            ensure_eslint()
    except (Problem, OSError, subprocess.TimeoutExpired) as problem:
        raise SystemExit(f"bootstrap: {problem}") from None


if __name__ == "__main__":
    main()
