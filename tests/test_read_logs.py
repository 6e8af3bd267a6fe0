"""The module that reads logs. Scenario default tests playbooks/logs.yml with the logs of hosts."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pixel.endpoint.plugins.action import read_logs as action
from ansible_collections.pixel.endpoint.plugins.modules import read_logs

OPTIONS: dict[str, Any] = {"unit": "", "status": "", "id": "", "lines": 500, "position": {}}


def access_line(second: int, status: int = 200, request: str = "0123456789abcdef") -> str:
    return f'{{"time":"2026-11-27T20:00:{second:02}+00:00","id":"{request}","status":{status}}}'


@pytest.mark.parametrize(
    ("since", "age"),
    [("30s", 30), ("10m", 600), ("-2h", 7200), ("1day", 86400), ("-1 days", 86400), ("5 min", 300)],
)
def test_an_age_is_subtracted_from_now(since: str, age: int) -> None:
    assert read_logs.oldest(since, 1e9) == 1e9 - age


def test_a_time_is_read_and_anything_else_refused() -> None:
    assert read_logs.oldest("2026-11-27T20:00:00+00:00", 0) == 1795809600
    for wrong in ("yesterday", "10", "m", "10 months"):
        with pytest.raises(ValueError, match=r"."):
            read_logs.oldest(wrong, 0)


@pytest.mark.parametrize(
    ("option", "line", "wanted"),
    [
        ({"status": "5xx"}, access_line(1, 503), True),
        ({"status": "5xx"}, access_line(1, 499), False),
        ({"status": "404"}, access_line(1, 404), True),
        ({"status": "503"}, '{"message": "POST /pixel was answered 503"}', True),
        ({"status": "503"}, "Started pixel.service.", False),
        ({"id": "0123456789abcdef"}, access_line(1), True),
        ({"id": "ffffffffffffffff"}, access_line(1), False),
        ({}, "anything", True),
    ],
)
def test_lines_are_chosen_by_status_and_request(option: dict[str, Any], line: str, wanted: bool) -> None:
    assert read_logs.matcher(OPTIONS | option)(line) is wanted


def test_the_journal_is_asked_for_the_unit_and_after_the_cursor() -> None:
    command = read_logs.journal_command(OPTIONS, 100.4)
    assert {"--unit=pixel", "--unit=pixel@*", "--unit=redis-server", "--since=@100"} <= set(command)
    command = read_logs.journal_command(OPTIONS | {"unit": "nginx", "position": {"cursor": "s=1"}}, 100)
    assert [word for word in command if word.startswith("--unit")] == ["--unit=nginx"]
    assert "--after-cursor=s=1" in command


def test_entries_of_the_journal_are_parsed() -> None:
    def entry(**fields: Any) -> str:
        return json.dumps({"__CURSOR": "s=1", "__REALTIME_TIMESTAMP": "1500000", **fields})

    lines = [
        entry(MESSAGE="plain", _SYSTEMD_UNIT="pixel.service"),
        entry(MESSAGE=[104, 255], _SYSTEMD_UNIT="pixel@8001.service"),
        entry(MESSAGE="Started.", _SYSTEMD_UNIT="init.scope", UNIT="pixel.service"),
        entry(MESSAGE=None),
        "-- cursor: s=2",
    ]
    entries, cursor = read_logs.journal_entries(lines, lambda _: True)
    assert [(each["unit"], each["text"]) for each in entries] == [
        ("pixel", "plain"),
        ("pixel@8001", "h\ufffd"),
        ("pixel", "Started."),
        ("", ""),
    ]
    assert {each["time"] for each in entries} == {1.5}
    assert cursor == "s=2"


def test_rotated_access_logs_are_read_in_order_and_followed_across_rotations(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    with gzip.open(tmp_path / "access.log.2.gz", "wt") as file:
        file.write(access_line(1) + "\n")
    os.utime(tmp_path / "access.log.2.gz", (100, 100))
    (tmp_path / "access.log.1").write_text(access_line(2) + "\n")
    os.utime(tmp_path / "access.log.1", (200, 200))
    log.write_text(access_line(3) + "\n")

    lines, position = read_logs.access_lines(log, 50, {})
    assert list(lines) == [access_line(1), access_line(2), access_line(3)]
    lines, _ = read_logs.access_lines(log, 150, {})
    assert list(lines) == [access_line(2), access_line(3)]

    with log.open("a") as file:
        file.write(access_line(4) + "\n")
    log.rename(tmp_path / "access.log.1")
    log.write_text(access_line(5) + "\n")
    lines, position = read_logs.access_lines(log, 0, position)
    assert list(lines) == [access_line(4), access_line(5)]
    lines, position = read_logs.access_lines(log, 0, position)
    assert list(lines) == []
    log.write_text("")
    log.write_text("x\n")
    assert list(read_logs.access_lines(log, 0, position)[0]) == ["x"]
    assert list(read_logs.access_lines(tmp_path / "none", 0, {})[0]) == []


def test_old_lines_of_a_file_are_left_out() -> None:
    start = read_logs.oldest("2026-11-27T20:00:30+00:00", 0)
    lines = [access_line(10), access_line(30), access_line(40, 503), "not JSON"]
    found = read_logs.access_entries(lines, start, lambda _: True)
    assert [each["text"] for each in found] == [access_line(30), access_line(40, 503)]


def test_a_run_that_follows_late_reads_what_was_logged_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A follower's `since` is a second; on a busy host its runs lie further apart."""
    commands: list[list[str]] = []

    def journalctl(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="")

    log = tmp_path / "access.log"
    monkeypatch.setattr(read_logs, "ACCESS_LOG", log)
    monkeypatch.setattr(subprocess, "run", journalctl)
    begin = read_logs.oldest("2026-11-27T20:00:00+00:00", 0)
    log.write_text("")
    first = read_logs.read(OPTIONS, begin)
    log.write_text(access_line(1) + "\n")
    second = read_logs.read(OPTIONS | {"position": first["position"]}, begin + 30)
    assert [each["text"] for each in second["entries"]] == [access_line(1)]
    assert f"--since=@{begin:.0f}" in commands[1]  # the journal had nothing yet: there is no cursor


def test_a_line_begins_with_its_time_host_and_unit() -> None:
    entry = {"time": 1795809600.25, "unit": "pixel", "text": "ready"}
    assert action.line("t2", entry) == "2026-11-27T20:00:00.250Z t2 pixel: ready"
