"""The controller on both balancers, with two backends whose readiness and CPU figures the tests set."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pixel_lb.credits import baseline

RECORDS = Path(__file__).resolve().parents[3] / "balancer" / "tests" / "data"
BOTH = ("debian12", "debian13")
VARIABLES = {"nginx_lb_weights": "adaptive", "nginx_lb_slow_start": 30}
testinfra_hosts = ["debian12"]


@pytest.fixture(scope="module")
def converge(play: Any) -> Callable[..., None]:
    """Run the role; keyword arguments become extra variables."""
    return lambda **variables: play("playbooks/nginx_lb.yml", **variables).changes()


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(1)


@pytest.fixture
def backends(shell: Any) -> Callable[[str], dict[str, Any]]:
    """Return the backends in `pixel-lb status` of a balancer."""

    def status(balancer: str = "debian12") -> dict[str, Any]:
        while not (report := json.loads(shell("pixel-lb status", on=balancer)))["loaded"]:
            time.sleep(0.5)  # A reload is pending.
        found: dict[str, Any] = report["backends"]
        return found

    return status


@pytest.fixture
def seen(shell: Any) -> Callable[[], dict[str, Any]]:
    """Return /lb/status as seen on the balancer's own host."""
    return lambda: json.loads(json.loads(shell("client one /lb/status"))[2])


def test_both_controllers_run_in_a_sandbox(host: Any, shell: Any) -> None:
    for balancer in BOTH:
        assert shell("systemctl is-active pixel-lb; systemctl is-enabled pixel-lb", on=balancer).split() == [
            "active",
            "enabled",
        ]
    score = re.search(
        r"level for pixel-lb.service: ([0-9.]+)", host.run("systemd-analyze security pixel-lb").stdout
    )
    assert score is not None
    assert float(score[1]) < 3


def test_a_second_run_keeps_the_weights_that_the_controller_set(converge: Any, shell: Any) -> None:
    before = shell("cat /etc/nginx/pixel/upstreams.conf")
    converge(**VARIABLES)
    assert shell("cat /etc/nginx/pixel/upstreams.conf") == before


def test_a_backend_that_is_not_ready_is_removed_and_returns_in_steps(
    shell: Any, backends: Any, seen: Any
) -> None:
    shell("touch /run/unready", on="debian13")
    try:
        until(lambda: all(backends(each)["debian13"]["state"] == "down" for each in BOTH), 30)
        assert set(json.loads(shell("client many 20 /who"))) == {"debian12"}
        (removed,) = (each for each in seen()["backends"] if each["name"] == "debian13")
        assert removed["why"].startswith("down: /readyz returned 503")
        refused = shell("pixel-lb drain debian12; echo $?")
        assert refused.strip() == "3"
    finally:
        shell("rm /run/unready", on="debian13")
    weights = []

    def has_base_weight() -> bool:
        now = backends()
        if now["debian13"]["state"] == "up":
            weights.append((now["debian12"]["weight"], now["debian13"]["weight"]))
        return weights[-1:] == [(3, 2)]

    until(has_base_weight, 90)
    # The base weights are 3 and 2; debian13 first gets half of its own.
    assert (3, 1) in weights
    assert Counter(json.loads(shell("client many 50 /who"))) == {"debian12": 30, "debian13": 20}


def test_if_no_backend_is_ready_none_is_removed(shell: Any, backends: Any, seen: Any) -> None:
    for name in BOTH:
        shell("touch /run/unready", on=name)
    try:
        until(lambda: seen()["alarm"] != "", 30)
        assert {each["state"] for each in backends().values()} == {"up"}
        assert set(json.loads(shell("client many 20 /who"))) == set(BOTH)
    finally:
        for name in BOTH:
            shell("rm /run/unready", on=name)
    assert "NO BACKEND IS READY" in shell("journalctl --unit=pixel-lb --output=cat")
    until(lambda: seen()["alarm"] == "", 30)


def test_a_host_with_cpu_steal_gets_a_lower_weight(shell: Any, backends: Any, seen: Any) -> None:
    for name, record in (("debian12", "working"), ("debian13", "throttled")):
        content = (RECORDS / f"stat-{record}").read_text()
        shell(f"cat >/run/stat <<'END'\n{content}END", on=name)
    try:
        until(lambda: all("stolen" in backends(each)["debian13"]["why"] for each in BOTH), 90)
        now = backends()
        assert now["debian13"]["weight"] / now["debian12"]["weight"] < 0.8 * 2 / 3
        (slow,) = (each for each in seen()["backends"] if each["name"] == "debian13")
        assert slow["cpu_steal"] > 0.5
        assert slow["cpu_busy"] < 0.3
    finally:
        for name in BOTH:
            shell("rm /run/stat", on=name)
    # Without new figures the base weights return after half a minute.
    until(lambda: backends()["debian13"]["weight"] == 2, 75)


# The machine that runs the test hosts may itself be an EC2 instance; do not use its credentials.
JOURNAL = "journalctl --unit=pixel-lb --output=cat"
NO_CREDENTIALS = """
mkdir -p /run/systemd/system/pixel-lb.service.d
cat >/run/systemd/system/pixel-lb.service.d/no-credentials.conf <<END
[Service]
Environment=AWS_EC2_METADATA_DISABLED=true
END
systemctl daemon-reload
systemctl restart pixel-lb
"""


def facts(shell: Any) -> dict[str, Any]:
    """The backends' facts that the role writes from the inventory."""
    found: dict[str, Any] = json.loads(shell("cat /etc/nginx/pixel/backends.json"))
    return found


def test_credits_are_queried_outside_the_control_loop_and_may_stay_unknown(
    shell: Any, play: Any, converge: Any, backends: Any
) -> None:
    for name in BOTH:
        shell(NO_CREDENTIALS, on=name)
    asking = VARIABLES | {"nginx_lb_credit_source": "cloudwatch", "nginx_lb_credit_region": "eu-central-1"}
    refused = play("playbooks/nginx_lb.yml", **asking)
    assert refused.returncode != 0
    assert "needs an instance_id, such as i-0123456789abcdef0, of debian13" in refused.words
    converge(**asking, instance_id="i-0123456789abcdef0")
    until(lambda: all("Unable to locate credentials" in shell(JOURNAL, on=each) for each in BOTH), 60)
    (host,) = (each for each in facts(shell)["hosts"] if each["instance_id"])
    assert (host["instance_id"], host["instance_type"]) == ("i-0123456789abcdef0", "t2.xlarge")
    assert baseline(host["instance_type"]) == 0.225
    assert host["vcpus"] == int(shell("nproc", on="debian13"))
    assert {each["state"] for each in backends().values()} == {"up"}
    converge(**VARIABLES)
    assert {each["instance_id"] for each in facts(shell)["hosts"]} == {""}


def test_a_dry_run_prints_its_decisions_and_changes_nothing(shell: Any, backends: Any) -> None:
    shell("systemctl stop pixel-lb; touch /run/unready", on="debian12")
    try:
        output = shell("timeout 12 pixel-lb watch --dry-run 2>&1")
    finally:
        shell("rm /run/unready; systemctl start pixel-lb", on="debian12")
    assert "debian12 is marked down: /readyz returned 503" in output
    assert "would set debian12 down" in output
    assert {each["state"] for each in backends().values()} == {"up"}


def test_the_last_valid_file_is_kept_when_nginx_refuses_a_new_one(shell: Any, backends: Any) -> None:
    before = shell("cat /etc/nginx/pixel/upstreams.conf")
    shell("echo 'nonsense;' >>/etc/nginx/pixel/server.conf; touch /run/unready", on="debian12")
    try:
        until(lambda: "the last good configuration is kept" in shell("journalctl -u pixel-lb -o cat"), 30)
        assert shell("cat /etc/nginx/pixel/upstreams.conf") == before
        assert len(json.loads(shell("client many 20 /who"))) == 20
    finally:
        shell("sed -i '/^nonsense;$/d' /etc/nginx/pixel/server.conf; rm /run/unready", on="debian12")
