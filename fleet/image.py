"""The host image: Debian with systemd and SSH."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from bootstrap import ROOT, Problem, as_root, install_packages, run, say
from engine import Docker, require_disk_space

RECIPE = Path(__file__).with_name("Containerfile")


def ensure_image(docker: Docker, suite: str) -> str:
    """Return the tag of the host image for a Debian suite; build the image if it does not exist."""
    own = os.environ.get("PIXEL_HOST_IMAGE")
    if own:
        if docker("image", "inspect", own, check=False).returncode != 0:
            say(f"pulling {own}")
            docker("pull", own)
        return own
    recipe = hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:12]
    tag = f"pixel-host:{suite}-{recipe}"
    path = ROOT / ".fleet" / "images.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        # If two fleets need the image at the same time, the second one waits and uses it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if docker("image", "inspect", tag, check=False).returncode == 0:
            return tag
        require_disk_space(docker)
        base = base_image(docker, suite)
        say(f"building {tag}")
        build = ("--build-arg", f"BASE={base}", "--tag", tag, str(RECIPE.parent))
        docker("build", "--file", str(RECIPE), *build)
    return tag


def base_image(docker: Docker, suite: str) -> str:
    """Return a minimal Debian, built from this machine's apt sources if possible, or the public image."""
    public = f"debian:{suite}-slim"
    sources = apt_sources(suite)
    if not sources:
        return public
    base = f"pixel-base:{suite}"
    if docker("image", "inspect", base, check=False).returncode == 0:
        return base
    try:
        _bootstrap(docker, suite, sources, base)
    except Problem as problem:
        say(f"mmdebstrap failed, using the public image {public}: {problem}")
        return public
    return base


def _bootstrap(docker: Docker, suite: str, sources: list[str], base: str) -> None:
    if not shutil.which("mmdebstrap"):
        install_packages("mmdebstrap")
    say(f"bootstrapping Debian {suite} from this machine's apt sources")
    scratch = ROOT / ".fleet" / "bootstrap"
    # An interrupted run may have left files that belong to root.
    run(*as_root("rm", "-rf", str(scratch)))
    scratch.mkdir(parents=True)
    archive = scratch / f"{suite}.tar"
    try:
        run(
            *as_root("mmdebstrap", "--variant=minbase", "--include=ca-certificates", suite),
            *(str(archive), "-"),
            stdin="\n".join(sources) + "\n",
        )
        docker("import", str(archive), base)
    finally:
        run(*as_root("rm", "-rf", str(scratch)))


def apt_sources(suite: str) -> list[str]:
    """Return this machine's Debian sources, rewritten for the suite; empty on other systems."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    own_suite = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID") != "debian" or not own_suite or not shutil.which("apt-get"):
        return []
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    listing = run("apt-get", "indextargets", "--format", fields, "Created-By: Packages")
    lines = set()
    for entry in listing.stdout.splitlines():
        if len(words := entry.split()) != 3:
            continue  # A flat repository has no component; Debian's own repositories have one.
        uri, release_name, component = words
        pocket = release_name.removeprefix(own_suite)
        if pocket in ("", "-updates", "-security") and component == "main":
            lines.add(f"deb {uri} {suite}{pocket} main")
    return sorted(lines)


def remove_images(docker: Docker) -> None:
    """Remove the host images; Docker keeps those that containers use."""
    for repository in ("pixel-host", "pixel-base"):
        for tag in docker("images", "--format", "{{.Repository}}:{{.Tag}}", repository).stdout.split():
            docker("rmi", tag, check=False)
