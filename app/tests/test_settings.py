"""Errors in settings: one line each, and the exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GUNICORN

SRC = Path(__file__).parent.parent / "src"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_defaults_are_valid() -> None:
    done = run("-m", "pixel.settings")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("settings are valid: instance ")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("PIXEL_PORT", "http", "valid integer"),
        ("PIXEL_PORT", "0", "greater than or equal to 1"),
        ("PIXEL_WORKERS", "0", "greater than or equal to 1"),
        ("PIXEL_BIND", "8000", "pattern"),
        ("PIXEL_INSTANCE", "a\nb", "pattern"),
        ("PIXEL_REDIS_URL", "http://127.0.0.1", "redis://, rediss:// or unix://"),
        ("PIXEL_REDIS_URL", "redis://", "names no server"),
        ("PIXEL_REDIS_URL", "redis://h:port", "Port could not be cast"),
        ("PIXEL_REDIS_URL", "redis://h/zero", "no number"),
        ("PIXEL_REDIS_URL", "unix://run/redis.sock", "names no socket"),
        ("PIXEL_REDIS_URL", "redis://a,b", "must begin with redis://"),
        ("PIXEL_REDIS_URL", "redis://a,", "must begin with redis://"),
        ("PIXEL_REDIS_URL", "redis://a,rediss://b", "nodes of a cluster"),
        ("PIXEL_REDIS_URL", "redis://a,unix:///run/redis.sock", "nodes of a cluster"),
        ("PIXEL_REDIS_URL", "redis://a,redis://b/1", "nodes of a cluster"),
        ("PIXEL_REDIS_CA", "/etc/ssl/ca.pem", "base64 of certificates in PEM format"),
        ("PIXEL_REDIS_CA", "Y2E=", "base64 of certificates in PEM format"),
        ("PIXEL_REDIS_TIMEOUT", "5", "less than or equal to 0.9"),
        ("PIXEL_CANVAS_WIDTH", "65537", "less than or equal to 65536"),
        ("PIXEL_FRAME_PAUSE_MAX", "2", "less than or equal to 1"),
        ("PIXEL_WRITE_QUEUE", "9", "greater than or equal to 10000"),
        ("PIXEL_LOG_LEVEL", "loud", "'info'"),
        ("PIXEL_PEERS", "http://a", "Invalid JSON"),
        ("PIXEL_PEERS", '["a:8000"]', "URL"),
        ("PIXEL_ANONYMOUS", "write", "'paint', 'read' or 'none'"),
        ("PIXEL_ANONYMOUS_BUDGET", "600", "dictionary"),
        ("PIXEL_ANONYMOUS_BUDGET", '{"per_minute": 0, "burst": 1}', "greater than or equal to 1"),
        ("PIXEL_ANONYMOUS_BUDGET", '{"per_minute": 1, "burst": 1, "rate": 1}', "nexpected"),
        ("PIXEL_BUDGET_EXEMPT", '["10.0.0"]', "IPv4 or IPv6 network"),
        ("PIXEL_CANVAS_WIDHT", "10", "did you mean PIXEL_CANVAS_WIDTH?"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(name: str, value: str, hint: str) -> None:
    done = run("-m", "pixel.settings", **{name: value})
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"pixel: {name}: ")
    assert hint in done.stderr


def test_a_canvas_that_a_browser_could_not_show_is_refused() -> None:
    size = {"PIXEL_CANVAS_WIDTH": "4096", "PIXEL_CANVAS_HEIGHT": "4096"}
    assert run("-m", "pixel.settings", **size).returncode == 0
    done = run("-m", "pixel.settings", **size | {"PIXEL_CANVAS_WIDTH": "4097"})
    assert done.returncode == 78
    assert done.stderr == (
        "pixel: PIXEL_CANVAS_WIDTH times PIXEL_CANVAS_HEIGHT is more than 16777216 pixels, the"
        " largest canvas\n"
    )


def test_the_bounds_of_a_pause_are_in_order() -> None:
    done = run("-m", "pixel.settings", PIXEL_FRAME_PAUSE_MIN="0.6")
    assert done.returncode == 78
    assert done.stderr == "pixel: PIXEL_FRAME_PAUSE_MIN is more than PIXEL_FRAME_PAUSE_MAX\n"


def test_gunicorn_reports_bad_settings_like_the_check() -> None:
    bad = {"PIXEL_PORT": "x", "PIXEL_WORKERS": "x"}
    done = run("-m", *GUNICORN, **bad)
    assert done.returncode == 78
    assert done.stderr == run("-m", "pixel.settings", **bad).stderr


def test_every_bad_setting_has_its_line() -> None:
    done = run("-m", "pixel.settings", PIXEL_PORT="x", PIXEL_WORKERS="x", PIXEL_OTHER="x")
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize("url", ["redis://pixel:hush@127.0.0.1", "unix:///run/r?password=hush"])
def test_a_password_in_the_address_is_refused(url: str) -> None:
    done = run("-m", "pixel.settings", PIXEL_REDIS_URL=url)
    assert done.returncode == 78
    assert "hush" not in done.stderr
    assert "PIXEL_REDIS_PASSWORD" in done.stderr


def test_the_password_may_be_a_credential_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "pixel_redis_password").write_text("hush\n")
    code = (
        "from pixel.settings import load; s = load();"
        "assert s.redis_password.get_secret_value() == 'hush'; print(repr(s), s)"
    )
    done = run("-c", code, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert done.returncode == 0
    assert "hush" not in done.stdout


@pytest.mark.parametrize("package", ["uvloop", "httptools"])
def test_a_missing_fast_package_is_a_fault_not_a_slow_service(package: str) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None;"
        "from importlib import util; found = util.find_spec;"
        f"util.find_spec = lambda name: None if name == '{package}' else found(name);"
        "import pixel.gunicorn_conf"
    )
    done = run("-c", code)
    assert done.returncode == 78
    assert done.stderr == (f"pixel: the package {package} is missing: install what requirements.txt lists\n")
