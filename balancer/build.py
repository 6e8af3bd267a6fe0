#!/usr/bin/env python3
"""Build the agent's zipapp: build.py TARGET.

The result depends only on the sources, not on file times, modes, the time zone or the umask, so installing it
again changes nothing. It is not compressed, because zlib's output differs between machines.
"""

from __future__ import annotations

import io
import os
import sys
import zipapp
import zipfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "src"
INTERPRETER = "/usr/bin/python3"
# The earliest time that a zip file can store.
EPOCH = (1980, 1, 1, 0, 0, 0)
ENTRY_POINT = SOURCE / "pixel_lb" / "__main__.py"


def build(target: Path) -> None:
    """Write the zipapp, replacing it atomically."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((SOURCE / "pixel_lb").rglob("*.py")):
            file.writestr(_entry(path.relative_to(SOURCE).as_posix()), path.read_bytes())
        file.writestr(_entry("__main__.py"), ENTRY_POINT.read_bytes())
    archive.seek(0)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    zipapp.create_archive(archive, temporary, INTERPRETER)
    temporary.chmod(0o755)
    temporary.replace(target)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.create_system = 3  # Unix, on every platform
    entry.external_attr = 0o100644 << 16
    return entry


if __name__ == "__main__":
    build(Path(sys.argv[1]))
