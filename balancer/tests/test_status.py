"""The public description of the agent's state."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pixel_lb.weights import FULL, Share

README = Path(__file__).resolve().parents[1] / "README.md"
REPORT = {
    "alarm": "no backend is ready",
    "error": "nginx -t failed",
    "backends": [
        {"name": "b", "ready": True, "cpu_credits": 12.5, "cpu_steal": 0.6, "why": "60% stolen", "age_s": 1}
    ],
}


@pytest.fixture
def report(balancer: Any) -> Any:
    """Write a controller's report with a given age in seconds."""

    def write(age: float) -> None:
        path = balancer.paths.report
        path.write_text(json.dumps(REPORT))
        os.utime(path, (time.time() - age, time.time() - age))

    return write


def test_the_controllers_alarm_and_error_are_shown(balancer: Any, report: Any) -> None:
    assert balancer.status()["controller"] == {"state": "stopped", "age_s": None, "alarm": "", "error": ""}
    report(100)
    shown = balancer.status()["controller"]
    assert shown | {"age_s": 0} == {
        "state": "stopped",
        "age_s": 0,
        "alarm": "no backend is ready",
        "error": "nginx -t failed",
    }
    assert 99 <= shown["age_s"] <= 110
    report(0)
    assert balancer.status()["controller"]["state"] == "running"


def test_a_controller_with_long_rounds_is_running_between_them(balancer: Any, report: Any) -> None:
    balancer.facts["controller"] |= {"interval": 60, "timeout": 60}
    balancer.write_facts()
    report(150)
    assert balancer.status()["controller"]["state"] == "running"


def test_without_health_checks_and_adaptive_weights_there_is_no_controller(balancer: Any) -> None:
    balancer.facts["controller"]["health_checks"] = False
    balancer.write_facts()
    assert balancer.status()["controller"]["state"] == "disabled"
    balancer.write_facts(weights="adaptive")
    assert balancer.status()["controller"]["state"] == "stopped"


def test_measurements_are_shown_only_while_the_controller_runs(balancer: Any, report: Any) -> None:
    report(0)
    backends = balancer.status()["backends"]
    assert (backends["b"]["cpu_credits"], backends["b"]["cpu_steal"], backends["b"]["probe_age_s"]) == (
        12.5,
        0.6,
        1,
    )
    assert (backends["a"]["ready"], backends["a"]["cpu_credits"]) == (None, None)
    report(100)
    backend = balancer.status()["backends"]["b"]
    assert (backend["ready"], backend["cpu_credits"], backend["cpu_steal"]) == (None, None, None)
    # The reason stays, because the share is still in force.
    assert backend["why"] == "60% stolen"


def test_weight_and_share_are_those_in_force(balancer: Any) -> None:
    balancer.apply_shares(a=FULL, b=Share(0.5, False))
    backend = balancer.status()["backends"]["b"]
    assert (backend["base"], backend["weight"], backend["share"], backend["state"]) == (2, 1, 0.5, "up")
    balancer.drain("b")
    backend = balancer.status()["backends"]["b"]
    assert (backend["state"], backend["why"]) == ("drained", "drained by an operator")


def test_the_holder_of_the_address_is_shown(balancer: Any) -> None:
    assert balancer.status()["address"] is None
    balancer.write_facts(address="127.0.0.1")
    assert balancer.status()["address"] == {"ip": "127.0.0.1", "held": True}
    balancer.write_facts(address="192.0.2.1")
    assert balancer.status()["address"] == {"ip": "192.0.2.1", "held": False}


def test_every_field_is_documented(balancer: Any) -> None:
    documented = set(re.findall(r"^\| `([a-z_.<>]+)` \|", README.read_text().partition("## Status")[2], re.M))
    status = balancer.status()
    fields = {"running", "loaded", "address"}
    fields |= {f"controller.{name}" for name in status["controller"]}
    fields |= {f"backends.<name>.{name}" for name in status["backends"]["a"]}
    assert documented == fields
