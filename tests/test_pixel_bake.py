"""pixel_bake: the parser, the rules, and how they are applied over time."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
import yaml
from ansible_collections.pixel.endpoint.plugins.modules import pixel_bake
from ansible_collections.pixel.endpoint.plugins.modules.pixel_bake import (
    ARGUMENTS,
    DOCUMENTATION,
    INTERVAL,
    LEAST_ANSWERS,
    P99_ALONE,
    Read,
    excess,
    parse,
    read_all,
    watch,
)

BOUNDS = ("0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "+Inf")


def exposition(
    seconds: dict[str, int], failed: int = 0, started: float = 1000.0, route: str = "/pixel"
) -> str:
    """Metrics of an instance: answers by the bucket of their seconds, and failed ones beside them."""
    lines = ["# HELP pixel_request_seconds Time.", f"pixel_start_time_seconds {started:e}"]
    total = 0
    labels = f'method="POST",route="{route}",status="200"'
    for bound in BOUNDS:
        total += seconds.get(bound, 0)
        lines.append(f'pixel_request_seconds_bucket{{le="{bound}",{labels}}} {float(total)}')
    lines += [
        f"pixel_request_seconds_count{{{labels}}} {float(total)}",
        f"pixel_request_seconds_sum{{{labels}}} 12.5",
        f'pixel_request_seconds_count{{method="GET",route="/canvas.png",status="503"}} {float(failed)}',
        'pixel_request_seconds_count{method="GET",route="/readyz",status="503"} 900.0',
        'pixel_request_seconds_bucket{le="+Inf",method="GET",route="/fleet/all",status="502"} 900.0',
        'pixel_request_seconds_count{method="GET",route="/fleet/all",status="502"} 900.0',
    ]
    return "\n".join(lines) + "\n"


def test_answers_errors_and_the_p99_are_read() -> None:
    read = parse(exposition({"0.002": 980, "0.1": 20}, failed=10))
    assert (read.totals.answers, read.totals.failed, read.started) == (1010, 10, 1000.0)
    assert read.totals.p99 == 0.1
    assert parse(exposition({"0.002": 995, "0.1": 5})).totals.p99 == 0.002
    assert str(parse(exposition({"+Inf": 100})).totals) == "100 answers, 0.0% errors, p99 over 10 s"
    # Streams, pictures and batches last as long as they are large.
    assert parse(exposition({"+Inf": 100}, route="/events")).totals.p99 == 0
    assert parse(exposition({"+Inf": 100}, route="/pixels")).totals.p99 == 0
    assert parse(exposition({"0.5": 100}, route="/pixel/{x}/{y}")).totals.p99 == 0.5
    assert parse("") == Read(parse("").totals, 0.0)


@pytest.mark.parametrize(
    ("own", "others", "reason"),
    [
        (({"0.01": 1000}, 0), ({"0.01": 1000}, 0), ""),
        (({"0.01": 1000}, 20), ({"0.01": 1000}, 0), ""),
        (
            ({"0.01": 1000}, 30),
            ({"0.01": 1000}, 0),
            "2.9% of 1030 answers are errors, 0.0% on the other hosts",
        ),
        # Redis is away: all hosts fail.
        (({"0.01": 1000}, 500), ({"0.01": 100}, 50), ""),
        (({"0.1": 1000}, 0), ({"0.01": 1000}, 0), ""),
        (
            ({"0.2": 1000}, 0),
            ({"0.01": 1000}, 0),
            "the p99 of requests for pixels is 0.2 s, 0.01 s on the other hosts",
        ),
        (({"1.0": 1000}, 0), ({"0.5": 1000}, 0), ""),
        (
            ({"2.0": 1000}, 0),
            ({"0.5": 1000}, 0),
            "the p99 of requests for pixels is 2 s, 0.5 s on the other hosts",
        ),
        # Too few answers of the others to compare with.
        (({"1.0": 1000}, 0), ({"0.01": LEAST_ANSWERS - 1}, 0), ""),
        (({"2.0": 1000}, 0), ({}, 0), "the p99 of requests for pixels is 2 s"),
        (({"0.01": 1000}, 30), ({}, 0), "2.9% of 1030 answers are errors"),
    ],
)
def test_what_counts_as_worse(
    own: tuple[dict[str, int], int], others: tuple[dict[str, int], int], reason: str
) -> None:
    assert excess(*(parse(exposition(seconds, failed)).totals for seconds, failed in (own, others))) == reason
    assert P99_ALONE == 1


class Hosts:
    """Two hosts, whose counters grow with each read by what `own` and `other` return for its number."""

    def __init__(
        self, own: Callable[[int], tuple[dict[str, int], int] | str], other: tuple[dict[str, int], int]
    ) -> None:
        self._own, self._other = own, other
        self._totals: dict[str, tuple[dict[str, int], int]] = {"own": ({}, 0), "other": ({}, 0)}
        self._reads = {"own": count(), "other": count()}
        self.started = {"own": lambda number: 1000.0, "other": lambda number: 1000.0}
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def read(self, urls: Sequence[str]) -> dict[str, Read | str]:
        return {url: self._read(url) for url in urls}

    def _read(self, url: str) -> Read | str:
        number = next(self._reads[url])
        change = self._own(number) if url == "own" else self._other
        if isinstance(change, str):
            return change
        seconds, failed = self._totals[url]
        total = {bound: seconds.get(bound, 0) + change[0].get(bound, 0) for bound in BOUNDS}
        self._totals[url] = (total, failed + change[1])
        return parse(exposition(*self._totals[url], started=self.started[url](number)))

    def watch(self, seconds: float = 60) -> tuple[str, str]:
        return watch(["own"], ["other"], seconds, self.read, self.sleep)


GOOD: tuple[dict[str, int], int] = ({"0.01": 500}, 0)
SLOW: tuple[dict[str, int], int] = ({"0.01": 450, "0.5": 50}, 0)
FAILING: tuple[dict[str, int], int] = ({"0.01": 450}, 50)


def test_a_good_release_stays() -> None:
    hosts = Hosts(lambda number: GOOD, GOOD)
    reason, summary = hosts.watch()
    assert (reason, hosts.slept) == ("", 60)
    assert (
        summary
        == "6000 answers, 0.0% errors, p99 0.01 s; the other hosts: 6000 answers, 0.0% errors, p99 0.01 s"
    )


@pytest.mark.parametrize(("bad", "word"), [(SLOW, "p99"), (FAILING, "errors")])
def test_a_release_that_becomes_worse_after_20_s_is_found_within_15(
    bad: tuple[dict[str, int], int], word: str
) -> None:
    hosts = Hosts(lambda number: bad if number > 20 / INTERVAL else GOOD, GOOD)
    reason, _ = hosts.watch()
    assert word in reason
    assert hosts.slept == 35


def test_a_release_that_becomes_worse_at_the_end_is_watched_for_longer() -> None:
    hosts = Hosts(lambda number: FAILING if number > 11 else GOOD, GOOD)
    assert hosts.watch()[0] == "10.0% of 500 answers are errors, 0.0% on the other hosts"
    assert hosts.slept == 70
    once = Hosts(lambda number: FAILING if number == 12 else GOOD, GOOD)
    assert once.watch()[0] == ""
    assert once.slept == 65


def test_a_release_that_is_bad_at_intervals_is_found_over_the_whole_time() -> None:
    hosts = Hosts(lambda number: SLOW if number % 2 else GOOD, GOOD)
    assert hosts.watch()[0] == "the p99 of requests for pixels is 0.5 s, 0.01 s on the other hosts"
    assert hosts.slept == 60


def test_a_short_stall_is_no_fault() -> None:
    assert (
        Hosts(lambda number: ({"0.01": 495, "0.5": 5}, 0) if number in (3, 4) else GOOD, GOOD).watch()[0]
        == ""
    )


def test_with_little_traffic_intervals_are_joined_and_with_less_nothing_is_concluded() -> None:
    some = Hosts(lambda number: ({"0.01": 18}, 2), ({"0.01": 20}, 0))
    assert "errors" in some.watch()[0]
    assert some.slept == 45
    few = Hosts(lambda number: ({"0.01": 1}, 2), ({"0.01": 2}, 0))
    assert few.watch() == (
        "",
        "36 answers, 66.7% errors, p99 0.01 s; under 50 are too few to compare;"
        " the other hosts: 24 answers, 0.0% errors, p99 0.01 s",
    )


def test_a_host_that_stops_answering_or_restarts_is_worse() -> None:
    silent = Hosts(lambda number: "Connection refused" if number > 4 else GOOD, GOOD)
    assert silent.watch()[0] == "it doesn't answer (own/metrics: Connection refused)"
    assert silent.slept == 30
    once = Hosts(lambda number: "timed out" if number == 4 else GOOD, GOOD)
    assert once.watch()[0] == ""
    restarted = Hosts(lambda number: GOOD, GOOD)
    restarted.started["own"] = lambda number: 1000.0 + 20 * (number > 4)
    assert restarted.watch()[0] == "it has restarted by itself"


def test_another_host_that_restarts_is_left_out_until_its_next_read() -> None:
    hosts = Hosts(lambda number: GOOD, GOOD)
    hosts.started["other"] = lambda number: 1000.0 + 20 * (number > 4)
    reason, summary = hosts.watch()
    assert reason == ""
    assert summary.endswith("the other hosts: 5500 answers, 0.0% errors, p99 0.01 s")


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(exposition({"0.01": 7}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_metrics_are_read_over_http_without_a_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    reads = read_all([url, "http://127.0.0.1:1"])
    good, bad = reads[url], reads["http://127.0.0.1:1"]
    assert isinstance(good, Read)
    assert good.totals.answers == 7
    assert isinstance(bad, str)
    assert "refused" in bad


def test_the_module_reports_its_verdict(url: str) -> None:
    arguments = f'{{"ANSIBLE_MODULE_ARGS": {{"urls": ["{url}"], "seconds": 1}}}}'
    command = [sys.executable, pixel_bake.__file__, arguments]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert '"worse": false' in done.stdout
    assert "under 50 are too few to compare" in done.stdout


def test_the_documentation_describes_the_arguments() -> None:
    options = yaml.safe_load(DOCUMENTATION)["options"]
    assert set(options) == set(ARGUMENTS)
