"""The drill without a fleet: options, events, and the programs that it starts."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.drill import __main__ as drill
from bench.drill import hosts
from bench.drill.capacity import Normal, Shortage
from bench.drill.commands import COMMANDS
from bench.drill.events import Scene
from bench.drill.faults import EVENTS, QUICK
from bench.drill.hosts import Fleet, FleetError
from bench.drill.sources import LATE_FAULTS, NEVER_READY, REFUSAL, bad_after, never_ready
from bench.load.figures import Spread

FLEET = Fleet("nobody", "http://127.0.0.1:9", {"c5": "192.0.2.10", "t2": "192.0.2.11"}, {})


def test_every_event_of_the_agreement_is_there_as_often_as_agreed() -> None:
    often = {"deploy", "worker killed", "redis killed", "t2 frozen"}
    often |= {"t2 cut off from redis", "t2 cut off from balancer"}
    assert len(EVENTS) == 22
    assert {event.name for event in EVENTS if event.runs >= 10} == often
    assert all(event.runs >= 3 for event in EVENTS)
    assert set(QUICK) <= {event.name for event in EVENTS}


def test_only_redis_and_the_balancer_excuse_a_failure() -> None:
    excusing = {event.name: event.excused for event in EVENTS if event.excused}
    assert set(excusing) == {"redis restart", "redis stopped", "redis killed", "c5 power cut"}
    assert excusing["redis killed"] == excusing["redis restart"] == {"503"}
    assert excusing["redis stopped"] == {"503"}


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "load", lambda: FLEET)


@pytest.mark.usefixtures("two_hosts")
def test_quick_is_once_each() -> None:
    options = drill.parse_arguments(["--quick"])
    assert [event.name for event in options.events] == list(QUICK)
    assert options.runs == 1


@pytest.mark.usefixtures("two_hosts")
def test_commands_are_run_once_each_or_as_often_as_asked() -> None:
    options = drill.parse_arguments(["--commands"])
    assert (options.events, options.runs) == (list(COMMANDS), 1)
    options = drill.parse_arguments(["--commands", "--events", "errors later", "--runs", "5"])
    assert ([event.name for event in options.events], options.runs) == (["errors later"], 5)
    # Only maintenance, a release with errors and the single Redis's reboot excuse a failure.
    excusing = {event.name for event in COMMANDS if event.excused}
    assert excusing == {"read-only", "maintenance", "errors later", "slow later", "patch with outage"}


@pytest.mark.usefixtures("two_hosts")
def test_events_can_be_named() -> None:
    options = drill.parse_arguments(["--events", "t2 frozen, deploy", "--runs", "2"])
    assert [event.name for event in options.events] == ["t2 frozen", "deploy"]
    assert options.runs == 2


@pytest.mark.usefixtures("two_hosts")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--events", "earthquake"], "unknown event 'earthquake'; the events are deploy"),
        (["--runs", "0"], "at least 1"),
        (["--rate", "0"], "not a positive number"),
    ],
)
def test_bad_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        drill.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_fleet_it_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIXEL_FLEET", "there-is-none")
    assert drill.main(["--quick"]) == 2
    assert "`make up` or `make up FLEET=ha` makes one" in capsys.readouterr().err


def test_the_bad_release_is_the_app_that_is_never_ready(tmp_path: Path) -> None:
    source = never_ready(tmp_path)
    module = (source / "src" / "pixel" / "app.py").read_text()
    assert (source / "pyproject.toml").exists()
    assert module.endswith(NEVER_READY)
    assert "\napp = " in module


@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_a_release_that_becomes_bad_is_the_app_with_one_statement_more(fault: str, tmp_path: Path) -> None:
    module = (bad_after(tmp_path, fault, 20) / "src" / "pixel" / "commit.py").read_text()
    compile(module, "commit.py", "exec")
    assert "\n_BAD = perf_counter() + 20\n" in module
    assert (
        module.count("if perf_counter() > _BAD:") + module.count("if changes and perf_counter() > _BAD:") == 1
    )


def test_it_works_but_for_the_answer_that_a_deploy_waits_for() -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await send({"path": scope["path"]})

    module: dict[str, Any] = {"app": app}  # it must need no other name of the app's
    exec(NEVER_READY, module)  # our own source

    def answers(path: str) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        asyncio.run(module["app"]({"path": path}, None, send))
        return said

    assert answers("/pixel") == [{"path": "/pixel"}]
    start, body = answers("/readyz")
    assert start["status"] == 503
    assert body["body"] == REFUSAL.encode()


# Faults and their end

Command = tuple[str, ...]


class Recorded(Fleet):
    """A fleet whose hosts do nothing; `commands` contains the commands sent to them."""

    commands: list[Command]

    async def _run(self, *command: str, patience: float, text: str = "") -> tuple[int, str]:
        self.commands.append((*command, text))
        if "pixel-lb status" in text:
            backends = {host: {"state": "up", "weight": 1} for host in self.addresses}
            return 0, json.dumps({"backends": backends})
        return 0, ""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    async def no_time(_: float) -> None:
        pass

    monkeypatch.setattr("bench.drill.faults.asyncio.sleep", no_time)
    fleet = Recorded("nobody", FLEET.url, FLEET.addresses, {"c5": 1, "t2": 2})
    object.__setattr__(fleet, "commands", [])
    return fleet


UNDO = {
    "--signal=STOP": "--signal=CONT",
    "kill -STOP": "--signal=CONT",
    "nft -f": "nft delete table inet pixel_drill",
    "systemd-run": "systemctl stop pixel-drill-delay",
    "cpus t2 0.02": "cpus t2 all",
    "ip neigh replace": "ip neigh flush",
}


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("t2 frozen", "--signal=STOP"),
        ("t2 frozen as writers end", "--signal=STOP"),
        ("t2 worker stopped", "kill -STOP"),
        ("t2 workers stopped", "kill -STOP"),
        ("t2 throttled", "cpus t2 0.02"),
        ("t2 cut off", "ip neigh replace"),
        ("t2 cut off from redis", "nft -f"),
        ("t2 cut off from balancer", "nft -f"),
        ("t2 delayed", "systemd-run"),
        ("redis stopped", "--signal=STOP"),
    ],
)
def test_a_fault_is_ended_by_its_event_and_by_healing(name: str, does: str, recorded: Recorded) -> None:
    (event,) = (event for event in EVENTS if event.name == name)
    asyncio.run(event.act(Scene(recorded), 0))
    done = [" ".join(command) for command in recorded.commands]
    began = next(n for n, command in enumerate(done) if does in command)
    assert any(UNDO[does] in command for command in done[began:])
    recorded.commands.clear()
    asyncio.run(recorded.heal())  # as after an interruption
    assert any(UNDO[does] in " ".join(command) for command in recorded.commands)


def test_writers_end_while_t2_is_frozen(recorded: Recorded) -> None:
    scene = Scene(recorded)
    commands: list[int] = []
    scene.end_writers = lambda: commands.append(len(recorded.commands))
    (event,) = (event for event in EVENTS if event.name == "t2 frozen as writers end")
    asyncio.run(event.act(scene, 0))
    assert commands == [1]
    assert "STOP" in recorded.commands[0][-1]
    assert "CONT" in recorded.commands[1][-1]


# Programs


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Programs end by Ctrl-C, also when the tests are a shell's background job."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def python(program: str, patience: float = 20) -> Any:
    return FLEET._run(sys.executable, "-c", program, patience=patience)


def test_a_program_gets_its_input_and_its_words_come_back() -> None:
    status, said = asyncio.run(FLEET._run("sh", "-eu", text="echo one; echo two >&2; exit 3", patience=20))
    assert (status, said) == (3, "one\ntwo\n")


@pytest.mark.usefixtures("ctrl_c")
def test_a_program_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(FleetError, match=r"more than 0\.5 s"):
        asyncio.run(python("import time; time.sleep(60)", patience=0.5))
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("ctrl_c")
def test_a_program_ends_as_by_ctrl_c_when_the_drill_does(tmp_path: Path) -> None:
    note = tmp_path / "note"
    program = (
        f"import time, pathlib; note = pathlib.Path({str(note)!r})\n"
        "try:\n    note.write_text('began'); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    note.write_text('in order')\n"
    )

    async def session() -> None:
        running = asyncio.create_task(python(program))
        while not note.exists() or note.read_text() != "began":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(session())
    assert note.read_text() == "in order"


def test_a_host_that_fails_a_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> tuple[int, str]:
        return 1, "No such unit"

    monkeypatch.setattr(Fleet, "_run", fail)
    with pytest.raises(FleetError, match="t2: `true` ended with 1: No such unit"):
        asyncio.run(FLEET.ssh("t2", "true"))


def test_the_end_of_what_was_said() -> None:
    assert hosts.tail("\n".join("abc"), 2) == "b\nc"


def test_normal_has_a_floor_under_its_limit() -> None:
    assert Normal(500, {}, Spread(1, 1, 1, 1, 1)).slowest == 0.1


def test_a_fault_counts_from_when_it_struck_and_planned_work_from_when_it_was_felt() -> None:
    short = Shortage(begin=130.0, end=135.0, lack="")
    assert drill.recovery_of(short, since=100.0, planned=False) == 35
    assert drill.recovery_of(short, since=100.0, planned=True) == 5
    assert drill.recovery_of(None, since=100.0, planned=False) == 0
