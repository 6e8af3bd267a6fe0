"""The alert rules and the dashboard, by Prometheus' own tools: each fires when it should, and only then."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROLE = ROOT / "roles" / "monitoring"
CASES = ROOT / "tests" / "alerts.yml"


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as the role writes them with its defaults, and the cases beside them."""
    environment = jinja2.Environment(
        variable_start_string="[[", variable_end_string="]]", undefined=jinja2.StrictUndefined
    )
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    text = (ROLE / "templates" / "rules.yml.j2").read_text()
    path = tmp_path_factory.mktemp("rules") / "pixel.rules.yml"
    path.write_text(environment.from_string(text).render(ansible_managed="test", **defaults))
    shutil.copy(CASES, path.parent)
    return path


def alerts(rules: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def hours(duration: str) -> float:
    """Of a duration as the cases have it: 90s, 4m, 28h."""
    return int(duration[:-1]) / {"s": 3600, "m": 60, "h": 1}[duration[-1]]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules(rules: Path) -> None:
    assert f"{len(alerts(rules))} rules found" in promtool("check", "rules", rules)


def test_every_alert_fires_and_resolves(rules: Path) -> None:
    promtool("test", "rules", rules.parent / CASES.name)


def test_every_alert_has_a_case_that_is_quiet_that_fires_and_that_resolves(rules: Path) -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    assert [case["name"] for case in cases] == [rule["alert"] for rule in alerts(rules)]
    for case in cases:
        checks = case["alert_rule_test"]
        assert {check["alertname"] for check in checks} == {case["name"]}
        assert [bool(check.get("exp_alerts")) for check in checks] == [False, True, False], case["name"]
        times = [hours(check["eval_time"]) for check in checks]
        assert times == sorted(set(times)), case["name"]


def test_every_alert_says_what_to_do_and_how_urgent_it_is(rules: Path) -> None:
    for rule in alerts(rules):
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"][-1] in ".?", rule["alert"]


def test_every_query_of_the_dashboard_can_be_parsed(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "docs" / "dashboards" / "pixel.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", path)
