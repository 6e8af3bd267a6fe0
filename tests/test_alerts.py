"""The alert rules and the dashboard, checked with promtool: each alert fires only when it should."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.filter import pixel_fleet

ROOT = Path(__file__).resolve().parents[1]
ROLE = ROOT / "roles" / "monitoring"
CASES = SHORT, LONG, BUDGETS = [
    ROOT / "tests" / name for name in ("alerts.yml", "alerts_long.yml", "slo.yml")
]


def write_rules(directory: Path, **chosen: Any) -> Path:
    """Render the rules with the role's defaults and the given variables."""
    environment = jinja2.Environment(
        variable_start_string="[[",
        variable_end_string="]]",
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    # The default refers to the inventory.
    probes = {"monitoring_probe_urls": ["https://pixel.example.org"]}
    groups = {"redis": ["c5", "t2", "m5"], "history": ["c5"]}
    variables = {"ansible_managed": "test", "groups": groups} | defaults | probes | chosen
    path = directory / "pixel.rules.yml"
    # The first line sets the delimiters; Ansible removes it.
    template = (ROLE / "templates" / "pixel.rules.yml.j2").read_text().partition("\n")[2]
    path.write_text(environment.from_string(template).render(variables))
    return path


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules of a fleet in which every group has a host, and the cases in the same directory."""
    path = write_rules(tmp_path_factory.mktemp("rules"))
    groups = yaml.safe_load(path.read_text())["groups"]
    budgets = {"groups": [group for group in groups if group["name"].startswith("slo")]}
    path.with_name("slo.rules.yml").write_text(yaml.safe_dump(budgets))
    for cases in CASES:
        shutil.copy(cases, path.parent)
    return path


def alerts(rules: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def hours(duration: str) -> float:
    """Convert a duration of the cases, such as 90s, 4m or 28h, to hours."""
    return int(duration[:-1]) / {"s": 3600, "m": 60, "h": 1}[duration[-1]]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_rules(rules: Path) -> None:
    # Besides alerts, two ratios in five windows.
    assert f"{len(alerts(rules)) + 10} rules found" in promtool("check", "rules", rules)


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_every_alert_fires_and_resolves(rules: Path, cases: Path) -> None:
    promtool("test", "rules", rules.parent / cases.name)


def test_every_alert_has_a_case_that_is_inactive_fires_and_resolves(rules: Path) -> None:
    cases = [case for path in CASES for case in yaml.safe_load(path.read_text())["tests"]]
    assert sorted(case["name"] for case in cases) == sorted(rule["alert"] for rule in alerts(rules))
    for case in cases:
        checks = [check for check in case["alert_rule_test"] if check["alertname"] == case["name"]]
        # Some cases also check that a similar alert does not fire.
        others = [check for check in case["alert_rule_test"] if check not in checks]
        assert not any(check.get("exp_alerts") for check in others), case["name"]
        assert [bool(check.get("exp_alerts")) for check in checks] == [False, True, False], case["name"]
        times = [hours(check["eval_time"]) for check in checks]
        assert times == sorted(set(times)), case["name"]


def test_a_managed_redis_has_no_alerts_about_backups(tmp_path: Path) -> None:
    own = alerts(write_rules(tmp_path, groups={"redis": ["c5"]}))
    managed = write_rules(tmp_path, groups={})
    left_out = [rule["alert"] for rule in own if rule not in alerts(managed)]
    assert left_out == ["BackupTooOld", "BackupMissing"]
    promtool("check", "rules", managed)


def test_a_single_redis_has_no_replicas_and_writes_need_it(rules: Path, tmp_path: Path) -> None:
    single = write_rules(tmp_path, groups={"redis": ["c5"], "history": ["c5"]})
    different = [rule["alert"] for rule in alerts(rules) if rule not in alerts(single)]
    assert different == ["RedisDown", "RedisOneReplica", "RedisVoteMissing"]
    [down] = [rule for rule in alerts(single) if rule["alert"] == "RedisDown"]
    assert "doesn't answer, so nothing can be written: journalctl" in down["annotations"]["summary"]
    promtool("check", "rules", single)


def test_a_fleet_without_a_history_has_no_alerts_about_it(rules: Path, tmp_path: Path) -> None:
    without = write_rules(tmp_path, groups={"redis": ["c5", "t2", "m5"]})
    left_out = [rule["alert"] for rule in alerts(rules) if rule not in alerts(without)]
    assert left_out == ["HistoryDown", "HistoryBehind", "HistoryGap"]
    promtool("check", "rules", without)


def test_a_missing_redis_is_detected_with_a_scrape_interval_of_a_minute(tmp_path: Path) -> None:
    write_rules(tmp_path, monitoring_scrape_seconds=60)
    file = yaml.safe_load(SHORT.read_text())
    [case] = [case for case in file["tests"] if case["name"] == "AppWithoutRedis"]
    case["interval"] = "1m"
    for check, time in zip(case["alert_rule_test"], ("10m", "18m", "38m"), strict=True):
        check["eval_time"] = time
    path = tmp_path / "cases.yml"
    path.write_text(yaml.safe_dump(file | {"tests": [case]}))
    promtool("test", "rules", path)


def test_errors_during_maintenance_raise_no_alert(rules: Path) -> None:
    file = yaml.safe_load(BUDGETS.read_text())
    [case] = [case for case in file["tests"] if case["name"] == "ErrorBudgetFast"]
    series = 'pixel_maintenance_workers{state="read-only",instance="c5"}'
    case["input_series"].append({"series": series, "values": "0x60 4x120"})
    del case["alert_rule_test"][1]["exp_alerts"]
    path = rules.parent / "maintenance.yml"
    path.write_text(yaml.safe_dump(file | {"tests": [case]}))
    promtool("test", "rules", path)


def test_a_backup_that_was_not_verified_does_not_count(rules: Path) -> None:
    file = yaml.safe_load(LONG.read_text())
    [case] = [case for case in file["tests"] if case["name"] == "BackupTooOld"]
    [series] = case["input_series"]
    verified = {"series": series["series"].replace("backup_", "backup_verified_")} | {
        "values": series["values"]
    }
    # A new backup every five minutes.
    case["input_series"] = [series | {"values": "0+300x500"}, verified]
    path = rules.parent / "verified.yml"
    path.write_text(yaml.safe_dump(file | {"tests": [case]}))
    promtool("test", "rules", path)


def test_few_requests_use_up_no_budget(rules: Path) -> None:
    """All of them fail, but there are fewer than monitoring_slo_least_requests in the short window."""
    series = 'pixel_edge_requests_total{instance="c5",route="/pixel",status="502",by="balancer"}'
    case = {
        "name": "few",
        "interval": "1m",
        "input_series": [{"series": series, "values": "0+10x200"}],
        "alert_rule_test": [{"alertname": "ErrorBudgetFast", "eval_time": "2h"}],
    }
    path = rules.parent / "few.yml"
    cases = {"rule_files": [rules.name], "evaluation_interval": "10m", "tests": [case]}
    cases["group_eval_order"] = ["slo", "slo-alerts"]
    path.write_text(yaml.safe_dump(cases))
    promtool("test", "rules", path)
    case["input_series"] = [{"series": series, "values": "0+100x200"}]
    path.write_text(yaml.safe_dump(cases))
    with pytest.raises(AssertionError, match=r"got:\[\s+0:"):
        promtool("test", "rules", path)


def test_the_heartbeat_fires_always_if_somebody_receives_it(tmp_path: Path) -> None:
    rules = write_rules(tmp_path, monitoring_heartbeat_url="https://outside.example.org")
    assert alerts(rules)[-1]["alert"] == "Heartbeat"
    fired = {"exp_labels": {"severity": "none"}, "exp_annotations": alerts(rules)[-1]["annotations"]}
    checks = [{"alertname": "Heartbeat", "eval_time": time, "exp_alerts": [fired]} for time in ("0m", "3h")]
    path = tmp_path / "heartbeat.yml"
    cases = {"rule_files": [rules.name], "evaluation_interval": "10m", "tests": [{"alert_rule_test": checks}]}
    path.write_text(yaml.safe_dump(cases))
    promtool("test", "rules", path)


def test_every_alert_has_a_severity_and_a_summary(rules: Path) -> None:
    for rule in alerts(rules):
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"][-1] in ".?", rule["alert"]


def test_targets_of_a_host_share_its_host_label() -> None:
    """Alertmanager inhibits alerts of a host that is down by this label."""
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    fleet_filters = pixel_fleet.FilterModule().filters().items()
    environment.filters |= {f"pixel.endpoint.{name}": value for name, value in fleet_filters} | {
        "extract": lambda key, container, name: container[key][name],
        "regex_replace": lambda text, _, end: text + end,
        "to_json": json.dumps,
        "combine": lambda mapping, other: mapping | other,
    }
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    variables = defaults | yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
    text = environment.from_string((ROLE / "templates" / "prometheus.yml.j2").read_text()).render(
        variables
        | {"monitoring_app_port": 8000, "_monitoring_servers": ["c5"], "ansible_managed": "test"}
        | {"monitoring_probe_urls": ["https://a"], "monitoring_probe_pixel": {"x": 0}},
        groups={"pixel_app": ["c5", "t2"], "nginx_lb": ["t2"], "history": ["t2"]},
        hostvars={
            "c5": {"inventory_hostname": "c5", "private_address": "10.0.0.1", "pixel_app_instances": 2},
            "t2": {"inventory_hostname": "t2", "private_address": "10.0.0.2"},
        },
    )
    jobs = yaml.safe_load(text)["scrape_configs"]
    found = [
        (job["job_name"], *each["labels"].values())
        for job in jobs
        for each in job["static_configs"] or []
        if "labels" in each
    ]
    assert found[:3] == [("pixel", "c5", "c5"), ("pixel", "c5-8001", "c5"), ("pixel", "t2", "t2")]
    assert found[3:6] == [("history", "t2", "t2"), ("node", "c5", "c5"), ("node", "t2", "t2")]
    targets = [each["targets"] for job in jobs for each in job["static_configs"] or []]
    assert targets[:6] == [
        [f"10.0.0.{where}"] for where in ("1:8000", "1:8001", "2:8000", "2:8100", "1:9100", "2:9100")
    ]
    probes = [(job["params"]["module"], job["static_configs"][0]["targets"]) for job in jobs[-2:]]
    assert probes == [(["read"], ["https://a/ping"]), (["write"], ["https://a/pixel"])]
    assert jobs[-1]["relabel_configs"][2]["replacement"] == "10.0.0.1:9115"
    assert "equal: [host]" in (ROLE / "templates" / "alertmanager.yml.j2").read_text()


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
