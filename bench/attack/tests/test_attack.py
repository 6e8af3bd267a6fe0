"""The attacks on a stand-in service with faults that the tests select."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.attack import __main__ as program
from bench.attack.__main__ import Bench, Result, main, must_be_ours, parse_arguments
from bench.attack.attacks import ATTACKS, QUICK, Attack, Attacker, fan_out, frame, pictures
from bench.attack.workers import Memory, OneInstance
from bench.load.disk import Flush
from bench.load.http1 import Target
from bench.load.options import ImpossibleError
from bench.load.tests.standin import HEIGHT, WIDTH, Deed, StandIn


class Patient:
    """A service without workers, or with the memory figures of a test."""

    def __init__(self, *memories: Memory) -> None:
        self._memories = list(memories) or [{"1": 50_000_000}]

    async def memory(self) -> Memory:
        return self._memories.pop(0) if len(self._memories) > 1 else self._memories[0]

    async def slow_flushes(self) -> Sequence[Flush]:
        return ()


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SETTLE", 0.1)
    monkeypatch.setattr(program, "RATE", 40.0)
    monkeypatch.setattr(program, "CANVAS", (WIDTH, HEIGHT))


def made(service: StandIn, patient: Patient, reaches: str = "404") -> Result:
    options = parse_arguments(["--seconds", "1", "--after", "0.1"])
    attack = next(attack for attack in ATTACKS if attack.name == "fan-out")
    known = Attack(attack.name, attack.send, frozenset({reaches}))
    with service.serving():
        return asyncio.run(Bench(service.url, patient, options).make(known))


def test_an_attack_that_nobody_notices() -> None:
    result = made(StandIn(), Patient())
    assert result.faults(least=10) == []
    assert (result.during.sent, result.failed.total(), result.killed) == (40, 0, 0)
    assert result.answers["404"] > 30
    assert result.memory == (50_000_000,) * 3


def test_a_failure_of_the_second_client_is_a_fault() -> None:
    # The first half of the requests precedes the attack.
    service = StandIn(lambda number: Deed.BROKEN if number >= 70 else Deed.STORE)
    assert made(service, Patient()).faults(least=10) == ["failed: {'status 503': 10}"]


def test_a_latency_beyond_twice_the_usual_is_a_fault() -> None:
    service = StandIn()

    def slower(number: int) -> Deed:
        service.delay = 0.6 if number >= 40 else 0.0
        return Deed.STORE

    service.deed = slower
    result = made(service, Patient())
    [fault] = result.faults(least=0.3)
    measured, _, limit = fault.removeprefix("p99 ").partition(" ms; ")
    assert int(measured) >= 600
    assert limit == "the limit is 300 ms"
    # It is none if ordinary requests cause half as much.
    result.beside = int(measured) / 1.9
    assert result.faults(least=0.3) == []


def test_a_worker_that_is_gone_is_a_fault() -> None:
    patient = Patient({"1": 50, "2": 60}, {"1": 90, "2": 60}, {"1": 70, "3": 40})
    result = made(StandIn(), patient)
    assert result.faults(least=10) == ["1 workers are gone"]
    assert result.memory == (60, 90, 70)


def test_an_attack_that_meets_something_else_is_a_fault() -> None:
    [fault] = made(StandIn(), Patient(), reaches="200").faults(least=10)
    assert fault.startswith("the attack was answered {'404':")


def test_an_attacker_keeps_to_its_allowance() -> None:
    """It keeps to its rate, its number of connections and its end."""
    service = StandIn()

    async def attack(connections: int) -> tuple[int, float]:
        attacker = Attacker(Target.parse(service.url), rate=50, connections=connections)
        busy = asyncio.Semaphore(connections)

        async def send(_: int) -> str:
            assert not busy.locked()
            async with busy:
                await asyncio.sleep(0.1)
            return "sent"

        started = asyncio.get_running_loop().time()
        await attacker.work(lambda attacker: attacker.at_rate(send), 1)
        return attacker.answers["sent"], asyncio.get_running_loop().time() - started

    with service.serving():
        sent, seconds = asyncio.run(attack(20))
        assert 35 <= sent <= 50
        assert 1 <= seconds < 1.5
        sent, _ = asyncio.run(attack(1))
        assert sent <= 10


@pytest.mark.parametrize("url", ["http://192.0.2.7:8080", "https://example.com", "http://localhost.example"])
def test_nobody_else_is_attacked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "--master", str(os.getpid()), "--quick"]) == 2
    assert "is neither a loopback address nor the local fleet's" in capsys.readouterr().err


def test_the_fleets_own_addresses_are() -> None:
    must_be_ours("https://10.89.0.7", ("10.89.0.7",))
    must_be_ours("http://127.0.0.1:8080", ())
    must_be_ours("http://[::1]:8080", ())
    with pytest.raises(ImpossibleError):
        must_be_ours("https://10.89.0.8", ("10.89.0.7",))


def test_an_attack_that_is_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--url", "http://127.0.0.1:9", "--master", str(os.getpid())]
    assert main([*own, "--attacks", "resets"]) == 2
    assert "resets needs TLS" in capsys.readouterr().err
    assert main([*own, "--attacks", "clusters"]) == 2
    assert "clusters needs a balancer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--attacks", "none"])


def test_all_that_is_made_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = StandIn()
    report = tmp_path / "attack.json"
    monkeypatch.setattr(program, "ATTACKS", (Attack("fan-out", fan_out, frozenset({"404"})),))
    monkeypatch.setattr(program, "OneInstance", lambda _: Patient())
    with service.serving():
        own = ["--url", service.url, "--master", "1", "--attacks", "fan-out", "--json", str(report)]
        status = main([*own, "--seconds", "0.5", "--after", "0.1", "--least", "10"])
    printed = capsys.readouterr().out
    assert (status, "| fan-out | 20 | 0 |" in printed) == (0, True)
    [result] = json.loads(report.read_text())["results"]
    assert (result["sent"], result["killed"], result["memory_mb"]) == (20, 0, [50, 50, 50])


def test_the_workers_of_an_instance_are_its_masters_children() -> None:
    async def look() -> Memory:
        command = (sys.executable, "-c", "print(flush=True); import time; time.sleep(60)")
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert child.stdout is not None
        await child.stdout.readline()  # A program that has just been started has no memory yet.
        try:
            memory = await OneInstance(os.getpid()).memory()
            assert str(child.pid) in memory
            return {str(child.pid): memory[str(child.pid)]}
        finally:
            child.kill()
            await child.wait()

    [size] = asyncio.run(look()).values()
    assert 100_000 < size < 100_000_000


def test_a_frame_of_http_2() -> None:
    assert frame(3, 0, 5, (8).to_bytes(4)) == bytes.fromhex("000004 03 00 00000005 00000008")


def test_every_attack_has_a_name_and_a_purpose() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert set(QUICK) < set(names)
    assert pictures.__doc__
    assert all(attack.send.__doc__ for attack in ATTACKS)
