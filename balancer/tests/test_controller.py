"""The controller's decisions, on a simulated clock."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from pixel_lb.controller import Backend, Controller, Cpu, Credits, Sample, Settings
from pixel_lb.weights import FULL, Share

DOWN = Share(1.0, True)
MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


class World:
    """Two simulated hosts, probed every two seconds; decisions are applied immediately."""

    def __init__(self, **settings: float) -> None:
        self.now = 1000.0
        self.settings = replace(Settings(), **settings)  # type: ignore[arg-type]
        self.controller = Controller(self.settings, self.now)
        self.applied = {"A": FULL, "B": FULL}
        self.controller.configure({"A": "a", "B": "b"}, self.applied, self.settings)
        self.ready = {"A": True, "B": True}
        self.busy = {"A": 0.3, "B": 0.3}
        self.steal = {"A": 0.0, "B": 0.0}
        self.latency = {"A": 0.002, "B": 0.003}
        self.counters = {"A": Cpu(0, 0, 0), "B": Cpu(0, 0, 0)}
        self.cpu_known = True
        self.drained: list[str] = []
        self.decisions: list[tuple[float, dict[str, Share]]] = []
        self.notes: list[str] = []

    def probe(self) -> None:
        self.now += 2
        for name in "AB":
            last = self.counters[name]
            busy, steal = 8 * self.busy[name], 8 * self.steal[name]  # four processors, two seconds
            self.counters[name] = Cpu(last.busy + busy, last.steal + steal, last.total + 8)
            ready = self.ready[name]
            cpu = self.counters[name] if ready and self.cpu_known else None
            self.controller.observe(name, Sample(self.now, ready, "" if ready else "is dead", cpu))
            if ready:
                self.controller.observe_requests(self.now, name, 100, 100 * self.latency[name])
        shares = self.controller.decide(self.now, self.drained)
        self.notes += self.controller.notes
        self.controller.notes.clear()
        if shares is not None:
            self.applied = shares
            self.decisions.append((self.now, shares))
            self.controller.mark_applied(self.now, shares)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 2)):
            self.probe()

    def why(self, name: str) -> str:
        return self.controller.explain(self.controller.backends[name], self.now)


# --- health --------------------------------------------------------------------------------------


def test_only_consecutive_failed_probes_mark_a_backend_down() -> None:
    world = World()
    world.ready["B"] = False
    world.run(4)
    world.ready["B"] = True
    world.probe()
    world.ready["B"] = False
    world.run(4)
    assert world.decisions == []
    world.probe()
    assert world.applied == {"A": FULL, "B": DOWN}
    assert world.notes == ["B is marked down: is dead"]
    assert "down: is dead" in world.why("B")


def test_weight_increases_in_steps_after_a_recovery() -> None:
    world = World()
    world.ready["B"] = False
    world.run(30)
    world.ready["B"] = True
    world.decisions.clear()
    world.run(90)
    times = [at for at, _ in world.decisions]
    assert [shares["B"].factor for _, shares in world.decisions] == [0.3333, 0.6667, 1.0]
    assert all(later - earlier >= 15 for earlier, later in itertools.pairwise(times))
    assert world.why("B") == "base weight"


def test_one_successful_probe_is_not_a_recovery() -> None:
    world = World()
    world.ready["B"] = False
    world.run(30)
    for ready in (True, False) * 10:
        world.ready["B"] = ready
        world.probe()
    assert world.applied["B"].down


def test_marking_down_does_not_wait_for_the_interval_but_recovery_does() -> None:
    world = World(slow_start=0)
    world.ready["B"] = False
    world.run(6)
    down_at = world.decisions[-1][0]
    assert down_at == 1006
    world.ready["B"] = True
    world.run(30)
    assert world.decisions[-1] == (down_at + 16, {"A": FULL, "B": FULL})
    world.ready["A"] = False
    world.run(6)
    assert world.applied == {"A": DOWN, "B": FULL}


def test_a_backend_with_a_reduced_share_goes_down_in_one_step() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.9}
    while world.applied["B"] == FULL:
        world.probe()
    world.ready["B"] = False
    world.run(6)
    assert world.applied["B"] == DOWN
    world.decisions.clear()
    world.run(30)
    assert world.decisions == []


def test_the_last_backend_stays_up_and_the_operator_is_alerted() -> None:
    world = World()
    world.ready["B"] = False
    world.run(10)
    world.ready["A"] = False
    world.run(60)
    assert world.applied == {"A": FULL, "B": DOWN}
    assert sum("NO BACKEND IS READY" in note for note in world.notes) == 1
    assert world.controller.none_ready
    assert "still up because no backend is ready" in world.why("A")
    world.ready["B"] = True
    world.run(60)
    assert world.applied == {"A": DOWN, "B": FULL}
    assert "a backend is ready again" in world.notes


def test_a_failure_of_all_backends_marks_none_down() -> None:
    """As during an outage of Redis."""
    world = World()
    world.ready = {"A": False, "B": False}
    world.run(20)
    world.ready = {"A": True, "B": True}
    world.run(20)
    assert world.decisions == []


def test_a_drained_backend_does_not_count_as_ready() -> None:
    world = World()
    world.drained = ["a"]
    world.ready["B"] = False
    world.run(60)
    assert world.applied == {"A": FULL, "B": FULL}
    assert world.controller.none_ready


def test_without_health_checks_no_backend_is_marked_down() -> None:
    world = World(health=False)
    world.ready["B"] = False
    world.run(60)
    assert world.decisions == []


def test_shares_in_force_survive_a_restart_of_the_controller() -> None:
    world = World(adaptive=True)
    controller = Controller(world.settings, world.now)
    controller.configure({"A": "a", "B": "b"}, {"A": Share(0.4, False), "B": DOWN}, world.settings)
    for name in "AB":
        controller.observe(name, Sample(world.now, name == "A", cpu=Cpu(1, 0, 10)))
    assert controller.decide(world.now + 2) is None


# --- load ----------------------------------------------------------------------------------------


def test_equal_loads_change_nothing() -> None:
    world = World(adaptive=True)
    world.run(300)
    assert world.decisions == []


def test_small_differences_change_nothing() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.30, "B": 0.36}  # 64 % free and 70 % free differ by less than a tenth
    world.run(300)
    assert world.decisions == []


def test_the_share_of_a_busy_host_decreases_in_steps() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.7}
    world.run(300)
    shares = [shares["B"].factor for _, shares in world.decisions]
    times = [at for at, _ in world.decisions]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.3 / 0.9, rel=0.12)
    assert all(later - earlier >= 15 for earlier, later in itertools.pairwise(times))
    assert all(later / earlier >= 0.5 for earlier, later in zip([1.0, *shares], shares, strict=False))
    assert world.applied["A"] == FULL
    assert "CPU 70% busy" in world.why("B")


def test_a_slow_host_gets_less_even_if_its_cpu_is_idle() -> None:
    world = World(adaptive=True)
    world.latency["B"] = 0.05
    world.run(16)
    assert world.applied["B"].factor == 0.5  # the limit of one step
    assert "corrected by latency" in world.why("B")
    world.latency["B"] = 0.003
    world.run(300)
    assert world.applied["B"].factor > 0.9


def test_a_few_milliseconds_more_are_tolerated() -> None:
    world = World(adaptive=True)
    world.latency = {"A": 0.001, "B": 0.005}
    world.run(300)
    assert world.decisions == []


def test_a_share_never_becomes_zero() -> None:
    world = World(adaptive=True)
    world.latency["B"] = 5.0
    world.steal["B"] = 0.7
    world.run(1200)
    assert 0 < world.applied["B"].factor <= 0.02


def test_without_cpu_data_the_base_weight_returns() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.1, "B": 0.7}
    world.run(120)
    assert world.applied["B"].factor < 0.5
    world.cpu_known = False
    world.run(60)
    assert world.applied == {"A": FULL, "B": FULL}
    assert "no CPU data for 30 s" in world.why("B")


def test_a_boot_resets_counters_but_changes_nothing() -> None:
    world = World(adaptive=True)
    world.run(60)
    world.counters["B"] = Cpu(0, 0, 0)
    world.run(60)
    assert world.decisions == []


def test_weights_converge_at_any_load() -> None:
    """Shares and load depend on each other; the feedback must not oscillate."""
    for load in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97):
        world = World(adaptive=True, slow_start=0)
        power = {"A": 3.0, "B": 1.0}  # real capacity, unlike the equal base weights
        late: list[float] = []
        for step in range(600):
            total = sum(share.factor for share in world.applied.values())
            for name, share in world.applied.items():
                world.busy[name] = min(1.0, load * 4 * share.factor / total / power[name])
            world.probe()
            if step > 400:
                late.append(world.applied["B"].factor / world.applied["A"].factor)
        assert max(late) / min(late) < 1.6, (load, min(late), max(late))
        assert max(late) < 0.95


# --- CPU steal: /proc/stat of a throttled host --------------------------------------------------


def cpu_of_stat(text: str) -> Cpu:
    ticks = [int(word) / 100 for word in text.splitlines()[0].split()[1:9]]
    return Cpu.of_modes(dict(zip(MODES, ticks, strict=True)))


def series(name: str) -> list[Cpu]:
    content = (Path(__file__).parent / "data" / name).read_text()
    return [cpu_of_stat(part) for part in content.split("\n\n") if part.strip()]


def test_cpu_counters_are_computed_from_modes() -> None:
    cpu = Cpu.of_modes(dict(zip(MODES, (10, 1, 5, 100, 4, 1, 2, 7), strict=True)))
    assert cpu == Cpu(busy=19, steal=7, total=130)


def measured(cpus: list[Cpu]) -> Backend:
    backend = Backend("A", "a")
    for number, cpu in enumerate(cpus):
        backend.cpus.append((2.0 * number, cpu))
    backend.measure(2.0 * len(cpus), 1000)
    return backend


def test_a_throttled_host_gets_less_although_it_is_least_busy() -> None:
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
        world.controller.observe("A", Sample(world.now, True, cpu=working[step]))
        world.controller.observe("B", Sample(world.now, True, cpu=throttled[step]))
        shares = world.controller.decide(world.now)
        if shares is not None:
            world.applied = shares
            world.controller.mark_applied(world.now, shares)
    assert world.applied["B"].factor < 0.6
    assert world.applied["A"] == FULL
    assert "stolen" in world.why("B")


# --- CPU credits of a t2.xlarge -----------------------------------------------


def credits_of(balance: float, at: float) -> Credits:
    return Credits(at, balance, processors=4, baseline=0.225)


def test_without_credits_the_baseline_is_sustainable() -> None:
    assert credits_of(0, 0).sustainable == 0.225
    assert credits_of(30, 0).sustainable == pytest.approx(0.225 + 0.5)
    assert credits_of(1296, 0).sustainable == 1


def test_credits_that_run_out_reduce_a_share_before_cpu_time_is_stolen() -> None:
    world = World(adaptive=True)
    world.busy = {"A": 0.5, "B": 0.5}
    shares = []
    for line in (Path(__file__).parent / "data" / "credits-running-out").read_text().splitlines():
        # The balance of a period is published at its end.
        world.run(300)
        world.controller.set_credits({"b": credits_of(float(line.split()[1]), world.now)})
        shares.append(world.applied["B"].factor)
    # No effect while the credits last for 15 minutes.
    assert shares[:4] == [1, 1, 1, 1]
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[3:7]))
    # In the end: LEAST_LEFT of the baseline, relative to half of the other host's CPU.
    assert shares[-1] == pytest.approx(0.2 * 0.225 / 0.5, rel=0.12)
    assert world.applied["A"] == FULL
    assert "0 CPU credits left, enough for 22% of its CPU" in world.why("B")
    assert world.controller.report(world.now)[1]["cpu_credits"] == 0


def test_old_credit_data_are_ignored() -> None:
    world = World(adaptive=True)
    world.controller.set_credits({"b": credits_of(0, world.now)})
    world.run(14 * 60)
    assert world.applied["B"].factor < 0.5
    world.run(10 * 60)
    assert world.applied["B"].factor > 0.9  # the dead band is a tenth
    assert "credits" not in world.why("B")


def test_credits_never_increase_a_share() -> None:
    informed, uninformed = World(adaptive=True), World(adaptive=True)
    for world in (informed, uninformed):
        world.steal["B"] = 0.7
        world.busy["B"] = 0.2
    informed.controller.set_credits({"b": credits_of(1296, informed.now + 600)})
    for world in (informed, uninformed):
        world.run(600)
    assert informed.decisions == uninformed.decisions
    assert informed.applied["B"].factor < 0.5


def test_credits_have_no_effect_unless_weights_are_adaptive() -> None:
    world = World()
    world.controller.set_credits({"b": credits_of(0, world.now)})
    world.run(300)
    assert world.decisions == []


def test_all_servers_of_a_host_have_its_credits() -> None:
    controller = Controller(Settings(adaptive=True), 0.0)
    controller.configure({"b": "b", "b-8001": "b", "a": "a"}, {}, Settings(adaptive=True))
    controller.set_credits({"b": credits_of(0, 0.0)})
    assert [each["cpu_credits"] for each in controller.report(0.0)] == [0, 0, None]
