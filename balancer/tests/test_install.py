"""Files are applied, and restored if Nginx rejects them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from pixel_lb import install
from pixel_lb.errors import Refused
from pixel_lb.files import write
from pixel_lb.nginx import Nginx


def test_files_are_written_once(balancer: Any) -> None:
    new, old = balancer.paths.nginx / "new", balancer.paths.nginx / "old"
    old.write_text("old")
    assert install.apply(balancer.nginx, {new: b"new", old: None})
    assert (new.read_text(), old.exists()) == ("new", False)
    assert not install.apply(balancer.nginx, {new: b"new", old: None})


def test_a_reload_without_changed_files_counts_as_a_change(
    balancer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an interrupted run."""
    monkeypatch.setattr(Nginx, "reload_if_needed", lambda _: True)
    assert install.apply(balancer.nginx, {})


@pytest.mark.parametrize("error", [Refused("nginx -t failed"), OSError("disk full")])
def test_a_failure_restores_all_files(
    balancer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: Nginx) -> bool:
        raise error

    monkeypatch.setattr(Nginx, "reload_if_needed", fail)
    new, old, changed = (balancer.paths.nginx / name for name in ("new", "old", "changed"))
    old.write_text("old")
    changed.write_text("before")
    with pytest.raises(type(error)):
        install.apply(balancer.nginx, {new: b"new", old: None, changed: b"after"})
    assert (new.exists(), old.read_text(), changed.read_text()) == (False, "old", "before")


def test_a_dry_run_tells_what_an_install_would_change(balancer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = balancer.paths
    (paths.staged / "pixel").mkdir(parents=True)
    (paths.staged / "nginx.conf").write_text("new")
    (paths.staged / "pixel" / "backends.json").write_text(paths.facts.read_text())
    monkeypatch.setattr(install, "run_nginx", lambda *_: subprocess.CompletedProcess([], 0))

    def files() -> dict[Path, str]:
        return {path: path.read_text() for path in paths.nginx.rglob("*") if path.is_file()}

    def dry_run() -> bool:
        before = files()
        would: bool = install.install(paths, balancer.nginx, dry_run=True)
        assert files() == before
        return would

    assert dry_run()
    assert install.install(paths, balancer.nginx)
    assert not dry_run()
    for changed in (paths.nginx / "nginx.conf", paths.upstreams):
        changed.write_text("by hand")
        assert dry_run()
        assert install.install(paths, balancer.nginx)
        assert not dry_run()
    # Nginx runs, and there is no record of what it has read.
    monkeypatch.setattr(Nginx, "is_running", lambda _: True)
    assert dry_run()
    balancer.nginx.mark_loaded()
    assert not dry_run()


def test_a_certificate_is_staged_for_the_next_install(balancer: Any) -> None:
    source = balancer.paths.run / "renewed"
    for directory in (source, balancer.paths.nginx / "tls", balancer.paths.staged / "tls"):
        directory.mkdir(parents=True)
    for name in install.CERTIFICATE_FILES:
        (source / name).write_text(name)
    assert install.install_certificate(balancer.paths, balancer.nginx, source)
    assert not install.install_certificate(balancer.paths, balancer.nginx, source)
    for root in (balancer.paths.nginx, balancer.paths.staged):
        key = root / "tls" / "privkey.pem"
        assert (key.read_text(), key.stat().st_mode & 0o777) == ("privkey.pem", 0o600)


def test_a_file_is_replaced_with_its_final_mode_and_through_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    secret.chmod(0o600)
    for directory, mode in (("tls", 0o600), ("pixel", 0o644)):
        path = tmp_path / directory / "file"
        path.parent.mkdir()
        for planted in (path, path.with_name("file.new")):
            planted.symlink_to(secret)
        assert write(path, b"new")
        assert not path.is_symlink()
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", mode)
        # What an agent left that was killed may have another mode.
        path.with_name("file.new").write_text("half")
        path.with_name("file.new").chmod(0o666)
        assert write(path, b"newer")
        assert path.stat().st_mode & 0o777 == mode
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("kept", 0o600)
