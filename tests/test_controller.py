"""The controller's judgement, on a clock of its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from controller import Backend, Controller, Cpu, Credits, Sample, Settings, Share

WHOLE = Share(1.0, False)
DOWN = Share(1.0, True)
MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class World:
    """Two hosts, looked at every two seconds; what the controller decides is put in force at once."""

    def __init__(self, **settings: float) -> None:
        self.now = 1000.0
        self.settings = replace(Settings(), **settings)  # type: ignore[arg-type]
        self.controller = Controller(self.settings, self.now)
        self.in_force = {"A": WHOLE, "B": WHOLE}
        self.controller.know({"A": "a", "B": "b"}, self.in_force, self.settings)
        self.ready = {"A": True, "B": True}
        self.busy = {"A": 0.3, "B": 0.3}
        self.steal = {"A": 0.0, "B": 0.0}
        self.latency = {"A": 0.002, "B": 0.003}
        self.counters = {"A": Cpu(0, 0, 0), "B": Cpu(0, 0, 0)}
        self.cpu_known = True
        self.drained: list[str] = []
        self.written: list[tuple[float, dict[str, Share]]] = []
        self.said: list[str] = []

    def look(self) -> None:
        self.now += 2
        for name in "AB":
            had = self.counters[name]
            busy, steal = 8 * self.busy[name], 8 * self.steal[name]  # four processors, two seconds
            self.counters[name] = Cpu(had.busy + busy, had.steal + steal, had.total + 8)
            ready = self.ready[name]
            cpu = self.counters[name] if ready and self.cpu_known else None
            self.controller.see(name, Sample(self.now, ready, "" if ready else "is dead", cpu))
            if ready:
                self.controller.see_requests(self.now, name, 100, 100 * self.latency[name])
        shares = self.controller.decide(self.now, self.drained)
        self.said += self.controller.notes
        self.controller.notes.clear()
        if shares is not None:
            self.in_force = shares
            self.written.append((self.now, shares))
            self.controller.wrote(self.now, shares)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 2)):
            self.look()

    def why(self, name: str) -> str:
        return self.controller.explain(self.controller.backends[name], self.now)


# --- health --------------------------------------------------------------------------------------


def test_some_failures_in_a_row_take_a_backend_out_and_fewer_dont() -> None:
    world = World()
    world.ready["B"] = False
    world.run(4)
    world.ready["B"] = True
    world.look()
    world.ready["B"] = False
    world.run(4)
    assert world.written == []
    world.look()
    assert world.in_force == {"A": WHOLE, "B": DOWN}
    assert world.said == ["B is taken out: is dead"]
    assert "out: is dead" in world.why("B")


def test_it_comes_back_in_steps_that_are_an_interval_apart() -> None:
    world = World()
    world.ready["B"] = False
    world.run(30)
    world.ready["B"] = True
    world.written.clear()
    world.run(90)
    times = [at for at, _ in world.written]
    assert [shares["B"].factor for _, shares in world.written] == [0.3333, 0.6667, 1.0]
    assert all(later - earlier >= 15 for earlier, later in itertools.pairwise(times))
    assert world.why("B") == "base weight"


def test_one_good_look_is_not_enough_to_come_back() -> None:
    world = World()
    world.ready["B"] = False
    world.run(30)
    for ready in (True, False) * 10:
        world.ready["B"] = ready
        world.look()
    assert world.in_force["B"].down


def test_going_out_does_not_wait_for_the_interval_and_coming_back_does() -> None:
    world = World(slow_start=0)
    world.ready["B"] = False
    world.run(6)
    out_at = world.written[-1][0]
    assert out_at == 1006
    world.ready["B"] = True
    world.run(30)
    assert world.written[-1] == (out_at + 16, {"A": WHOLE, "B": WHOLE})
    world.ready["A"] = False
    world.run(6)
    assert world.in_force == {"A": DOWN, "B": WHOLE}


def test_who_goes_out_is_out_in_one_step_whatever_its_share_was() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.9}
    while world.in_force["B"] == WHOLE:
        world.look()
    world.ready["B"] = False
    world.run(6)
    assert world.in_force["B"] == DOWN
    world.written.clear()
    world.run(30)
    assert world.written == []


def test_the_last_one_stays_and_it_is_said_loudly() -> None:
    world = World()
    world.ready["B"] = False
    world.run(10)
    world.ready["A"] = False
    world.run(60)
    assert world.in_force == {"A": WHOLE, "B": DOWN}
    assert sum("NO BACKEND IS READY" in note for note in world.said) == 1
    assert world.controller.open
    assert "in because nobody is ready" in world.why("A")
    world.ready["B"] = True
    world.run(60)
    assert world.in_force == {"A": DOWN, "B": WHOLE}
    assert "there is a backend that is ready again" in world.said


def test_what_hits_all_at_once_takes_nobody_out() -> None:
    """Redis is away: no backend is ready, and none is worse than another."""
    world = World()
    world.ready = {"A": False, "B": False}
    world.run(20)
    world.ready = {"A": True, "B": True}
    world.run(20)
    assert world.written == []


def test_a_drained_one_is_no_reason_to_take_another_out() -> None:
    world = World()
    world.drained = ["a"]
    world.ready["B"] = False
    world.run(60)
    assert world.in_force == {"A": WHOLE, "B": WHOLE}
    assert world.controller.open


def test_without_health_checks_nobody_is_out() -> None:
    world = World(health=False)
    world.ready["B"] = False
    world.run(60)
    assert world.written == []


def test_what_was_in_force_survives_a_restart_of_the_controller() -> None:
    world = World(adaptive=True)
    controller = Controller(world.settings, world.now)
    controller.know({"A": "a", "B": "b"}, {"A": Share(0.4, False), "B": DOWN}, world.settings)
    for name in "AB":
        controller.see(name, Sample(world.now, name == "A", cpu=Cpu(1, 0, 10)))
    assert controller.decide(world.now + 2) is None


# --- load ----------------------------------------------------------------------------------------


def test_equal_loads_change_nothing() -> None:
    world = World(adaptive=True)
    world.run(300)
    assert world.written == []


def test_small_differences_are_left_alone() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.30, "B": 0.36}  # 64 of 70 are left: less than a tenth fewer
    world.run(300)
    assert world.written == []


def test_a_busy_host_gets_less_in_steps_that_are_an_interval_apart() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.7}
    world.run(300)
    shares = [shares["B"].factor for _, shares in world.written]
    times = [at for at, _ in world.written]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.3 / 0.9, rel=0.12)
    assert all(later - earlier >= 15 for earlier, later in itertools.pairwise(times))
    assert all(later / earlier >= 0.5 for earlier, later in zip([1.0, *shares], shares, strict=False))
    assert world.in_force["A"] == WHOLE
    assert "CPU 70% busy" in world.why("B")


def test_a_slow_host_gets_less_although_its_cpu_looks_idle() -> None:
    world = World(adaptive=True)
    world.latency["B"] = 0.05
    world.run(16)
    assert world.in_force["B"].factor == 0.5  # as far as one step goes
    assert "corrected by latency" in world.why("B")
    world.latency["B"] = 0.003
    world.run(300)
    assert world.in_force["B"].factor > 0.9


def test_a_few_milliseconds_more_are_nobodys_fault() -> None:
    world = World(adaptive=True)
    world.latency = {"A": 0.001, "B": 0.005}
    world.run(300)
    assert world.written == []


def test_a_weight_never_falls_to_nothing() -> None:
    world = World(adaptive=True)
    world.latency["B"] = 5.0
    world.steal["B"] = 0.7
    world.run(1200)
    assert 0 < world.in_force["B"].factor <= 0.02


def test_without_word_for_long_the_base_weight_comes_back() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.7}
    world.run(120)
    assert world.in_force["B"].factor < 0.5
    world.cpu_known = False
    world.run(60)
    assert world.in_force == {"A": WHOLE, "B": WHOLE}
    assert "no word of its CPU for 30 s" in world.why("B")


def test_a_boot_resets_counters_and_no_judgement() -> None:
    world = World(adaptive=True)
    world.run(60)
    world.counters["B"] = Cpu(0, 0, 0)
    world.run(60)
    assert world.written == []


def test_weights_settle_however_busy_the_hosts_are() -> None:
    """The share moves the load, the load the share: at any load, that must not swing for ever."""
    for load in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97):
        world = World(adaptive=True, slow_start=0)
        power = {"A": 3.0, "B": 1.0}  # and base weights are equal: they are wrong
        late: list[float] = []
        for step in range(600):
            total = sum(share.factor for share in world.in_force.values())
            for name, share in world.in_force.items():
                world.busy[name] = min(1.0, load * 4 * share.factor / total / power[name])
            world.look()
            if step > 400:
                late.append(world.in_force["B"].factor / world.in_force["A"].factor)
        assert max(late) / min(late) < 1.6, (load, min(late), max(late))
        assert max(late) < 0.95


# --- steal: /proc/stat of a throttled host -----------------------------------------------------------


def cpu_of_stat(text: str) -> Cpu:
    ticks = [int(word) / 100 for word in text.splitlines()[0].split()[1:9]]
    return Cpu.of_modes(dict(zip(MODES, ticks, strict=True)))


def series(name: str) -> list[Cpu]:
    content = (Path(__file__).parent / "data" / name).read_text()
    return [cpu_of_stat(part) for part in content.split("\n\n") if part.strip()]


def test_cpu_counters_are_read_as_the_kernel_means_them() -> None:
    cpu = Cpu.of_modes(dict(zip(MODES, (10, 1, 5, 100, 4, 1, 2, 7), strict=True)))
    assert cpu == Cpu(busy=19, steal=7, total=130)


def measured(cpus: list[Cpu]) -> Backend:
    backend = Backend("A", "a")
    for number, cpu in enumerate(cpus):
        backend.cpus.append((2.0 * number, cpu))
    backend.measure(2.0 * len(cpus), 1000)
    return backend


def test_a_host_out_of_credits_gets_less_although_it_is_least_busy() -> None:
    throttled, working = series("stat-throttled"), series("stat-working")
    slow, fast = measured(throttled), measured(working)
    assert slow.busy is not None
    assert slow.steal is not None
    assert fast.busy is not None
    assert slow.busy < fast.busy
    assert slow.steal > 0.5
    world = World(adaptive=True)
    for step in range(min(len(throttled), len(working))):
        world.now += 2
        world.controller.see("A", Sample(world.now, True, cpu=working[step]))
        world.controller.see("B", Sample(world.now, True, cpu=throttled[step]))
        shares = world.controller.decide(world.now)
        if shares is not None:
            world.in_force = shares
            world.controller.wrote(world.now, shares)
    assert world.in_force["B"].factor < 0.6
    assert world.in_force["A"] == WHOLE
    assert "stolen" in world.why("B")


# --- CPU credits: what CloudWatch says of a t2.xlarge -----------------------------------------------


def credits_of(balance: float, at: float) -> Credits:
    return Credits(at, balance, processors=4, baseline=0.225)


def test_without_credits_the_baseline_lasts() -> None:
    assert credits_of(0, 0).lasting == 0.225
    assert credits_of(30, 0).lasting == pytest.approx(0.225 + 0.5)
    assert credits_of(1296, 0).lasting == 1


def test_credits_that_run_out_lower_a_weight_before_the_cpu_is_stolen() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.5, "B": 0.5}
    shares = []
    for line in (Path(__file__).parent / "data" / "credits-running-out").read_text().splitlines():
        # What five minutes took is known at their end.
        world.run(300)
        world.controller.see_credits({"b": credits_of(float(line.split()[1]), world.now)})
        shares.append(world.in_force["B"].factor)
    # So long as they last for a quarter of an hour, it is a host like the other.
    assert shares[:4] == [1, 1, 1, 1]
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[3:7]))
    # At last: a fifth of its baseline, beside half of the other's CPU.
    assert shares[-1] == pytest.approx(0.2 * 0.225 / 0.5, rel=0.12)
    assert world.in_force["A"] == WHOLE
    assert "0 CPU credits left, 22% of its CPU lasts" in world.why("B")
    assert world.controller.report(world.now)[1]["cpu_credits"] == 0


def test_word_of_credits_that_is_too_old_is_no_hint() -> None:
    world = World(adaptive=True)
    world.controller.see_credits({"b": credits_of(0, world.now)})
    world.run(14 * 60)
    assert world.in_force["B"].factor < 0.5
    world.run(10 * 60)
    assert world.in_force["B"].factor > 0.9  # a tenth is left alone
    assert "credits" not in world.why("B")


def test_credits_never_raise_a_weight() -> None:
    told, untold = World(adaptive=True), World(adaptive=True)
    for world in (told, untold):
        world.steal["B"] = 0.7
        world.busy["B"] = 0.2
    told.controller.see_credits({"b": credits_of(1296, told.now + 600)})
    for world in (told, untold):
        world.run(600)
    assert told.written == untold.written
    assert told.in_force["B"].factor < 0.5


def test_credits_say_nothing_where_weights_are_not_adaptive() -> None:
    world = World()
    world.controller.see_credits({"b": credits_of(0, world.now)})
    world.run(300)
    assert world.written == []


def test_credits_are_those_of_a_host_and_so_of_all_its_servers() -> None:
    controller = Controller(Settings(adaptive=True), 0.0)
    controller.know({"b": "b", "b-8001": "b", "a": "a"}, {}, Settings(adaptive=True))
    controller.see_credits({"b": credits_of(0, 0.0)})
    assert [each["cpu_credits"] for each in controller.report(0.0)] == [0, 0, None]
