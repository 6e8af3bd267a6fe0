"""site.yml and the operator's playbooks: unchanged runs, invalid variables, documented arguments."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

testinfra_hosts = ["c5"]

ROOT = Path(__file__).resolve().parents[3]


# test_drift.py has a whole run, and a dry run that shows nothing but the drift.
@pytest.mark.parametrize(
    ("arguments", "hosts"), [(("--limit", "t2"), {"t2"}), (("--tags", "nginx_lb"), {"c5", "t2"})]
)
def test_a_second_run_changes_nothing(play: Any, arguments: tuple[str, ...], hosts: set[str]) -> None:
    assert play("site.yml", *arguments).changes() == dict.fromkeys(hosts, 0)


def test_a_managed_redis_needs_no_change_on_the_hosts(play: Any, tmp_path: Path) -> None:
    """An inventory without group redis, whose endpoint is this fleet's own Redis."""
    inventory = tmp_path / "managed"
    shutil.copytree(ROOT / "inventory" / "local", inventory)
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    (own,) = hosts.pop("redis")["hosts"]
    endpoint = f"redis://{{{{ hostvars['{own}'].private_address }}}}:6379/0"
    hosts["fleet"]["vars"] = {"pixel_app_redis_url": endpoint}
    (inventory / "hosts.yml").write_text(json.dumps(hosts))
    # Monitoring would change: a managed Redis has no exporters.
    done = play("site.yml", "--skip-tags", "monitoring", hosts=str(inventory))
    assert done.changes() == {"c5": 0, "t2": 0}
    assert "PLAY [Redis (2 of 10)] *" in done.words
    assert "skipping: no hosts matched" in done.words


def test_an_invalid_variable_stops_the_play_before_any_change(play: Any) -> None:
    done = play("site.yml", "--tags", "nginx_lb", nginx_lb_weight=-3)
    assert done.returncode != 0
    assert "Invalid variables of c5:" in done.words
    assert "nginx_lb_weight -3 is out of range: 1 to 1000, or 0" in done.words
    assert "changed=0" in done.stdout
    assert not any(f"changed={count}" in done.stdout for count in range(1, 10))


def test_invalid_variables_of_all_roles_are_reported_by_the_first_play(play: Any) -> None:
    done = play("site.yml", nginx_lb_method="leastconn", redis_port=80, nginx_lb_limit_rat=20)
    assert done.returncode != 0
    assert (
        "nginx_lb_method 'leastconn' is invalid: least_conn, round_robin, random, ip_hash or hash."
        in done.words
    )
    assert "redis_port 80 is out of range: 1024 to 65535." in done.words
    assert (
        "nginx_lb_limit_rat is not a variable of role nginx_lb: did you mean nginx_lb_limit_rate?"
        in done.words
    )
    assert "PLAY [Redis" not in done.stdout


def test_status_prints_all_hosts_in_one_table(play: Any) -> None:
    done = play("playbooks/status.yml")
    assert done.returncode == 0
    for host, weight in (("c5", 3), ("t2", 2)):
        assert re.search(rf"^ *{host} +\S+ +active +up +{weight} +", done.stdout, re.M), done.stdout
    assert "balancer c5:" in done.stdout


def test_status_includes_hosts_that_do_not_answer(play: Any) -> None:
    done = play("playbooks/status.yml", ansible_port=9, ansible_ssh_retries=0)
    for host in ("c5", "t2"):
        assert re.search(rf"^ *{host} +– +unreachable +– +– +", done.stdout, re.M), done.stdout
    assert "balancer c5 does not answer" in done.stdout


def test_an_unreachable_host_outside_the_limit_does_not_stop_the_run(play: Any, tmp_path: Path) -> None:
    inventory = tmp_path / "away"
    shutil.copytree(ROOT / "inventory" / "local", inventory)
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    hosts["fleet"]["hosts"]["t2"] |= {"ansible_port": 9, "ansible_ssh_retries": 0}
    (inventory / "hosts.yml").write_text(json.dumps(hosts))
    done = play("site.yml", "--limit", "c5", hosts=str(inventory))
    assert done.changes() == {"c5": 0}


def test_a_proxy_in_the_hosts_environment_is_not_used_for_local_checks(play: Any, shell: Any) -> None:
    line = "http_proxy=http://127.0.0.1:9"
    for host in ("c5", "t2"):
        shell(f"echo {line} >>/etc/environment", on=host)
    try:
        done = play("site.yml", "--tags", "nginx_lb,monitoring")
        assert done.changes() == {"c5": 0, "t2": 0}
        assert play("playbooks/status.yml").words.count("no answer") == 0
    finally:
        for host in ("c5", "t2"):
            shell(f"sed -i '\\|^{line}|d' /etc/environment", on=host)


def test_the_documented_console_has_the_settings_of_the_service(shell: Any) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    (command,) = re.findall(r"^sudo (systemd-run (?:.*\\\n)*.*)$", text, re.M)
    code = "from pixel.settings import load; s = load(); print(s.redis_username, bool(s.redis_password))"
    assert shell(f"{command.replace('--pty', '--pipe')} -c '{code}'", on="t2") == "pixel True\n"


def test_the_error_for_an_unknown_host_repeats_its_name(play: Any) -> None:
    done = play("playbooks/drain.yml", "-e", "host=t3")
    assert done.returncode != 0
    assert "There is no app host 't3'. Name one of c5, t2: -e host=t2" in done.words


def test_logs_are_filtered_by_unit_status_and_time(play: Any, client: Any) -> None:
    client.ask("/pixel/99999/1")
    time.sleep(1.2)  # The log is flushed once a second.
    done = play("playbooks/logs.yml", unit="nginx", status="404", since="20s")
    assert done.returncode == 0, done.words
    assert re.search(r'Z c5 nginx: {.*"uri":"/pixel/99999/1","status":404', done.stdout)
    assert '"status":200' not in done.stdout
    assert "status '5x' is invalid: 503, 5xx or 4xx." in play("playbooks/logs.yml", status="5x").words


def test_logs_are_followed(play: Any, client: Any) -> None:
    ended = threading.Event()

    def visit() -> None:
        while not ended.wait(1):
            client.ask("/pixel/99998/1")

    visitor = threading.Thread(target=visit)
    visitor.start()
    done = play("playbooks/logs.yml", follow="true", seconds=10)
    ended.set()
    visitor.join()
    assert done.returncode == 0, done.words
    assert re.search(r'(?m)^20\S+Z c5 nginx: {.*"uri":"/pixel/99998/1","status":404', done.stdout)


def test_an_unknown_request_id_is_reported_in_one_line(play: Any) -> None:
    done = play("playbooks/logs.yml", "-e", "id=0123456789abcdef")
    assert done.returncode != 0
    assert "No host has logged request 0123456789abcdef" in done.words
    assert "[]" not in done.words


# Playbooks that need AWS, minutes of load, a backup, or several arguments; other tests run them.
TESTED_ELSEWHERE = {"provision", "teardown", "loadtest", "calibrate", "restore"} | {
    "undo",
    "keys",
    "maintenance",
    "moderate",
}
PLACEHOLDERS = {"<X-Request-ID>": "0123456789abcdef"}


def documented() -> list[tuple[str, str]]:
    """Return the playbooks and `-e` arguments in the manuals and in the playbooks' comments."""
    found = set()
    manuals = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]
    for path in [*manuals, *ROOT.glob("playbooks/*.yml")]:
        own = path.stem if path.suffix == ".yml" else ""
        lines = path.read_text().splitlines()
        for line in [line for line in lines if line.startswith("#")] if own else lines:
            for match in re.finditer(r"-e ([a-z][a-z0-9_]*=[^\s`\]|,]*)", line):
                named = re.findall(r"playbooks/(\w+)[.]yml", line[: match.start()])
                argument = match[1].rstrip(".:")
                for placeholder, value in PLACEHOLDERS.items():
                    argument = argument.replace(placeholder, value)
                found.add(((named or [own])[-1], argument))
    return sorted(
        (playbook, argument)
        for playbook, argument in found
        if playbook not in {*TESTED_ELSEWHERE, ""} and not re.search("[<…]", argument)
    )


def test_documented_arguments_are_found() -> None:
    assert {("firewall", "firewall_enabled=false"), ("drain", "host=t2")} <= set(documented())


def documented_runs() -> list[dict[str, str]]:
    """Return arguments by playbook for few runs: each playbook and each variable is in a run at most once."""
    runs: list[dict[str, str]] = []
    for playbook, argument in documented():
        name = argument.partition("=")[0]
        for run in runs:
            if playbook not in run and name not in {other.partition("=")[0] for other in run.values()}:
                run[playbook] = argument
                break
        else:
            runs.append({playbook: argument})
    return runs


@pytest.mark.parametrize("run", documented_runs(), ids=lambda run: "-".join(run.values()))
def test_documented_arguments_work_as_typed(play: Any, client: Any, run: dict[str, str]) -> None:
    arguments = [part for argument in run.values() for part in ("-e", argument)]
    # With an ID, a filter that leaves no line is an error.
    if run.get("logs", "").startswith(("id=", "since=")):
        arguments += ["-e", f"id={client.ask('/ping')[1]['X-Request-ID']}"]
        time.sleep(1.2)  # The log is flushed once a second.
    done = play(*(f"playbooks/{playbook}.yml" for playbook in run), "--check", *arguments)
    assert done.returncode == 0, done.words
