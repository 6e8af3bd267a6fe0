"""A host's weight that is limited for some time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pixel_lb import canary, cli
from pixel_lb.controller import Controller, Sample, Settings
from pixel_lb.errors import Refused, WaitTimeout
from pixel_lb.state import Canary, State
from pixel_lb.weights import FULL, Share, effective_weights

SERVERS = {"a": "a", "b-8000": "b", "b-8001": "b"}


def decide(controller: Controller, now: float, limit: Canary | None) -> dict[str, Share] | None:
    for name in SERVERS:
        controller.observe(name, Sample(now, True))
    return controller.decide(now, canary=limit)


def test_all_instances_of_the_host_get_a_part_of_their_weight_and_then_all_of_it() -> None:
    controller = Controller(Settings(), 0.0)
    controller.configure(SERVERS, dict.fromkeys(SERVERS, FULL), Settings())
    limited = decide(controller, 20.0, Canary("b", 0.2, 0.0))
    assert limited == {"a": FULL, "b-8000": Share(0.2, False), "b-8001": Share(0.2, False)}
    assert effective_weights([4, 1, 1], list(limited.values())) == [20, 1, 1]
    controller.mark_applied(20.0, limited)
    assert controller.explain(controller.backends["b-8000"], 20.0) == "canary: at most 20% of its weight"
    assert decide(controller, 22.0, None) is None  # Nginx isn't reloaded more often than every 15 s.
    assert decide(controller, 36.0, None) == dict.fromkeys(SERVERS, FULL)


def test_it_limits_what_load_and_recovery_leave() -> None:
    controller = Controller(Settings(slow_start=45, reload_interval=15), 0.0)
    controller.configure(SERVERS, {"b-8000": Share(1.0, True)}, Settings())
    for now in (20.0, 22.0):
        controller.observe("b-8000", Sample(now, True))
        controller.observe("b-8001", Sample(now, True))
    shares = controller.decide(22.0, canary=Canary("b", 0.5, 0.0))
    assert shares is not None
    assert (shares["b-8000"].factor, shares["b-8001"].factor) == (round(0.5 / 3, 4), 0.5)


def test_a_limit_ends_by_itself_and_by_command(balancer: Any) -> None:
    state = State(balancer.paths)
    assert state.canary() is None
    assert canary.begin(balancer.paths, "b", 20, 60)
    known = state.canary()
    assert known is not None
    assert known[:2] == ("b", 0.2)
    assert 55 < known.until - time.time() <= 60
    assert canary.end(balancer.paths)
    assert state.canary() is None
    assert not canary.end(balancer.paths)
    canary.begin(balancer.paths, "b", 20, -1)
    assert state.canary() is None


@pytest.mark.parametrize(
    ("facts", "host", "message"),
    [
        ({}, "c", "known backends: a, b"),
        ({"controller": {"health_checks": False}}, "b", "set nginx_lb_health_checks or"),
        ({"method": "hash"}, "b", "weights decide where keys are"),
    ],
)
def test_a_limit_without_effect_is_refused(balancer: Any, facts: Any, host: str, message: str) -> None:
    balancer.facts["controller"] |= facts.pop("controller", {})
    balancer.facts |= facts
    balancer.write_facts()
    with pytest.raises(Refused, match=message):
        canary.begin(balancer.paths, host, 20, 60)
    assert not balancer.paths.canary.exists()


def test_the_wait_ends_when_the_controller_has_applied_it(balancer: Any) -> None:
    with pytest.raises(WaitTimeout, match="the weight of b was not limited within 0 s"):
        canary.wait_until_limited(balancer.paths, "b", 20, 0)
    balancer.paths.shares.write_text(json.dumps({"a": [1.0, False], "b": [0.2, False]}))
    canary.wait_until_limited(balancer.paths, "b", 20, 0)


@pytest.mark.parametrize("percent", ["0", "101", "x"])
def test_other_percentages_are_refused(percent: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["canary", "b", "--percent", percent])
    assert "--percent" in capsys.readouterr().err
