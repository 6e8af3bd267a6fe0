"""site.yml as an operator uses it, and what it says to wrong variables."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def play(*arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ansible-playbook", "site.yml", *arguments, "--extra-vars", json.dumps(variables)],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        text=True,
        capture_output=True,
        check=False,
    )


def changes(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {host: int(count) for host, count in re.findall(r"^(\S+)\s+: .*changed=(\d+)", done.stdout, re.M)}


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        (("--check",), {"c5", "t2"}),
        (("--limit", "t2"), {"t2"}),
        (("--tags", "nginx_lb"), {"c5", "t2"}),
    ],
)
def test_a_run_that_has_nothing_to_do_changes_nothing(arguments: tuple[str, ...], hosts: set[str]) -> None:
    assert changes(play(*arguments)) == dict.fromkeys(hosts, 0)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("redis_port", 80),
        ("redis_address", "10.255.255.1"),
        ("redis_appendfsync", "sometimes"),
        ("redis_maxmemory_mb", 1),
        ("redis_app_user", "default"),
        ("redis_app_password", "short"),
        ("redis_maxclients", "many"),
        ("redis_backup_keep", 0),
        ("pixel_app_port", 70000),
        ("pixel_app_workers", 0),
        ("pixel_app_keep_releases", 1),
        ("pixel_app_canvas_width", -5),
        ("pixel_app_release", "../up"),
        ("pixel_app_redis_url", "http://10.0.0.1"),
        ("pixel_app_memory_max", "plenty"),
        ("pixel_app_settings", {"CANVAS": "1"}),
        ("pixel_app_log_level", "loud"),
        ("nginx_lb_group", "nobody"),
        ("nginx_lb_weight", -3),
        ("nginx_lb_body_limit", "2 megabytes"),
        ("nginx_lb_keepalive", 0),
        ("nginx_lb_local_socket", "run/pixel.sock"),
        ("nginx_lb_factors", {"c5": 0}),
        ("nginx_lb_weights", "guessed"),
        ("nginx_lb_reload_interval", 5),
        ("nginx_lb_dead_band", 5),
        ("nginx_lb_health_fails", 0),
    ],
)
def test_a_wrong_variable_stops_the_play_before_anything_is_done(variable: str, value: Any) -> None:
    role = next(role for role in ("redis", "pixel_app", "nginx_lb") if variable.startswith(role))
    # Only what is tagged `always` runs: the preflights.
    done = play("--tags", f"preflight_of_{role}", **{variable: value})
    assert done.returncode != 0
    message = re.split(r"^(?:fatal|failed): ", done.stdout, maxsplit=1, flags=re.M)[1]
    assert variable in message
    assert not any(changed for changed in re.findall(r"changed=(\d+)", done.stdout) if changed != "0")
