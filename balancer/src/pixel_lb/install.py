"""Apply files: write, check and reload them; restore the former ones on failure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pixel_lb.errors import Refused
from pixel_lb.files import Paths, read, write
from pixel_lb.fleet import Fleet
from pixel_lb.nginx import Nginx, run_nginx
from pixel_lb.state import State
from pixel_lb.upstreams import render

CERTIFICATE_FILES = ("fullchain.pem", "privkey.pem")


def apply(nginx: Nginx, changes: Mapping[Path, bytes | None]) -> bool:
    """Write files and reload Nginx; on failure, restore them all.

    Args:
        nginx: The Nginx that reads them.
        changes: The content of each file, None to remove it.

    Returns:
        Whether a file was changed or Nginx was reloaded.

    Raises:
        Refused: Nginx rejects the files; the former ones are restored.
    """
    former = {path: read(path) for path in changes}
    changed = False
    try:
        for path, content in changes.items():
            changed |= write(path, content)
        reloaded = nginx.reload_if_needed()
    except (OSError, Refused):
        # Removals first: they need no space on a full disk.
        for path, content in sorted(former.items(), key=lambda item: item[1] is not None):
            write(path, content)
        raise
    return changed or reloaded


def install(paths: Paths, nginx: Nginx, *, dry_run: bool = False) -> bool:
    """Check the staged configuration, copy it into place, and reload Nginx.

    Args:
        paths: The agent's directories.
        nginx: The Nginx that reads them.
        dry_run: Change nothing; only return whether anything would change.

    Returns:
        Whether anything changed.

    Raises:
        Refused: The staged configuration is invalid; the running one is kept.
    """
    staged, state = paths.staged, State(paths)
    fleet = Fleet.load(staged / "pixel" / "backends.json")
    rendered = render(fleet, state.drained(), state.shares())
    if not dry_run:
        (staged / "pixel" / "upstreams.conf").write_text(rendered)
        checked = run_nginx("-t", "-q", "-c", str(staged / "nginx.conf"))
        if checked.returncode != 0:
            raise Refused(
                f"the staged configuration is invalid, the running one is kept:\n{checked.stderr.strip()}"
            )
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    wanted: dict[Path, bytes | None] = {
        paths.nginx / path.relative_to(staged): path.read_bytes() for path in files
    }
    wanted[paths.upstreams] = rendered.encode()
    if dry_run:
        unread = nginx.is_running() and not nginx.is_current()
        return unread or any(read(path) != content for path, content in wanted.items())
    return apply(nginx, wanted)


def install_certificate(paths: Paths, nginx: Nginx, source: Path) -> bool:
    """Install a renewed certificate and its key, and stage them for the next install.

    Args:
        paths: The agent's directories.
        nginx: The Nginx that reads them.
        source: A directory with `fullchain.pem` and `privkey.pem`.

    Returns:
        Whether anything changed.

    Raises:
        Refused: Nginx rejects them; the former ones are kept.
    """
    content = {name: (source / name).read_bytes() for name in CERTIFICATE_FILES}
    changed = apply(nginx, {paths.nginx / "tls" / name: content[name] for name in CERTIFICATE_FILES})
    for name in CERTIFICATE_FILES:
        write(paths.staged / "tls" / name, content[name])
    return changed
