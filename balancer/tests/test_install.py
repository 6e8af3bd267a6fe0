"""Files are applied, and restored if Nginx rejects them."""

from __future__ import annotations

from typing import Any

import pytest
from pixel_lb import install
from pixel_lb.errors import Refused
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
