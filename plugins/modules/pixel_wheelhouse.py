#!/usr/bin/python
"""Ansible module: pack all wheels that a host needs to build a release into one file."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pixel_wheelhouse
short_description: Make the wheelhouse of a release on the control node
description:
  - Downloads the locked libraries for a Python version and an architecture, builds the app's wheel, and packs
    them with a C(requirements.txt) that has all hashes into one tar file. Results are cached.
  - Files in the cache get their final name when they are complete, so an interrupted run leaves no incomplete
    result.
options:
  source:
    description: Directory of the app, with C(pyproject.toml) and C(requirements.txt).
    type: path
    required: true
  cache:
    description: Cache directory for wheels and wheelhouses.
    type: path
    required: true
  name:
    description: Release name, as the lookup P(pixel.endpoint.pixel_source#lookup) returns it.
    type: str
    required: true
  python_version:
    description: Python of the host, such as V(3.11).
    type: str
    required: true
  architecture:
    description: Machine architecture of the host, such as V(x86_64).
    type: str
    required: true
  python:
    description: Python on the control node whose pip is used. The default is the one that runs the module.
    type: path
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Make the wheelhouse
  pixel.endpoint.pixel_wheelhouse:
    source: app
    cache: .cache
    name: "{{ lookup('pixel.endpoint.pixel_source', 'app') }}"
    python_version: "3.11"
    architecture: x86_64
  delegate_to: localhost
"""

RETURN = r"""
path:
  description: The wheelhouse's tar file.
  type: str
  returned: success
"""

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

GLIBC = range(17, 37)
"""Minor versions of glibc 2 that wheels may require: Debian 12, the oldest supported system, has 2.36."""


class Failure(Exception):
    """The wheelhouse cannot be made; the text is for the operator."""


def run(*argv: str | Path) -> None:
    """Run a command.

    Raises:
        Failure: the exit status is not 0.
    """
    done = subprocess.run([str(part) for part in argv], text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise Failure((done.stderr.strip() or done.stdout.strip())[-2000:])


def libraries(folder: Path, lock: Path, python: str, version: str, architecture: str) -> Path:
    """Download the locked libraries into a directory; return the directory."""
    if not folder.exists():
        new = _empty(folder)
        # pip evaluates markers for the Python that runs it, not for the host's. So remove the markers and
        # download all libraries; the host's pip evaluates the markers when it installs.
        plain = new / "all.txt"
        plain.write_text(re.sub(r" ; [^\\\n]+", " ", lock.read_text()))
        platforms = [f"manylinux_2_{minor}_{architecture}" for minor in GLIBC] + [
            f"manylinux2014_{architecture}"
        ]
        run(
            *(
                python,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--only-binary",
                ":all:",
            ),
            *("--implementation", "cp", "--python-version", version, "--dest", new, "--requirement", plain),
            *(part for platform in platforms for part in ("--platform", platform)),
        )
        plain.unlink()
        new.rename(folder)
    return folder


def own_wheel(folder: Path, source: Path, python: str) -> Path:
    """Build the app's wheel into a directory; return its path."""
    if not folder.exists():
        new = _empty(folder)
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        run(python, "-m", "pip", "wheel", *options, "--wheel-dir", new, source)
        new.rename(folder)
    (wheel,) = folder.glob("pixel-*.whl")
    return wheel


def pack(bundle: Path, wheels: Path, own: Path, lock: Path) -> None:
    """Pack the wheels and their hashes into one file."""
    version = own.name.split("-")[1]
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    requirements = bundle.with_suffix(".txt")
    requirements.write_text(f"{lock.read_text()}\npixel=={version} --hash=sha256:{digest}\n")
    new = bundle.with_suffix(".new")
    with tarfile.open(new, "w") as tar:
        tar.add(requirements, "requirements.txt")
        for wheel in (own, *sorted(wheels.glob("*.whl"))):
            tar.add(wheel, wheel.name)
    requirements.unlink()
    new.rename(bundle)


def make(
    source: Path, cache: Path, name: str, python: str, version: str, architecture: str
) -> tuple[Path, bool]:
    """Return the wheelhouse of a source for a Python version and an architecture, and whether it is new."""
    lock = source / "requirements.txt"
    platform = f"{version}-{architecture}"
    bundle = cache / "wheelhouses" / f"{name}-{platform}.tar"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    # Tasks for several hosts run at the same time, and operators may share a cache.
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if bundle.exists():
            return bundle, False
        digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
        wheels = libraries(cache / "libraries" / f"{platform}-{digest}", lock, python, version, architecture)
        own = own_wheel(cache / "own" / name, source, python)
        pack(bundle, wheels, own, lock)
    return bundle, True


def _empty(folder: Path) -> Path:
    """Create an empty temporary directory beside the one that it is renamed to when it is complete."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def main() -> None:
    text = {"required": True}
    path = {"type": "path", "required": True}
    module = AnsibleModule(
        argument_spec={
            "source": path,
            "cache": path,
            "name": text,
            "python_version": text,
            "architecture": text,
            "python": {"type": "path"},
        },
        # Also fills the cache in check mode, so that a dry run reports a failing download or build.
        supports_check_mode=True,
    )
    option = module.params
    try:
        bundle, changed = make(
            Path(option["source"]),
            Path(option["cache"]),
            option["name"],
            option["python"] or sys.executable,
            option["python_version"],
            option["architecture"],
        )
    except (Failure, OSError) as error:
        module.fail_json(msg=f"no wheelhouse for release {option['name']}: {error}")
    module.exit_json(path=str(bundle), changed=changed)


if __name__ == "__main__":
    main()
