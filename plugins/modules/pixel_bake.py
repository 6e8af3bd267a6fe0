#!/usr/bin/python
"""Ansible module: watch a release that has just been switched to, and compare it with the other hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pixel_bake
short_description: Compare the errors and the latency of this host's app with those of other hosts
description:
  - Reads C(/metrics) of the instances every five seconds for O(seconds), and compares what has happened in
    between on O(urls) and on O(others).
  - The app is worse if it doesn't answer twice in a row, restarts by itself, or has an excess of errors or
    of latency in three successive comparisons, or over the whole time. It then returns at once. If the last
    comparison is bad, O(seconds) is extended by up to 15 seconds.
  - An excess of errors is a share of answers with status 5xx that is over two percentage points above that of
    O(others). Answers to health checks and about the fleet don't count.
  - An excess of latency is a p99 of requests for single pixels that is over three times that of O(others),
    and over 0.1 s above it.
  - A comparison needs 50 answers of O(urls); with fewer, it includes the next five seconds. If O(others) have
    fewer than 50, their share of errors counts as 0, and the limit for the p99 is 1 s.
  - It changes nothing.
options:
  urls:
    description: Base URLs of this host's instances.
    type: list
    elements: str
    required: true
  others:
    description: Base URLs of the instances of other hosts.
    type: list
    elements: str
    default: []
  seconds:
    description: How long to compare.
    type: int
    required: true
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
- name: Compare the new release with the former one on the other hosts
  pixel.endpoint.pixel_bake:
    urls: [http://10.0.0.11:8000]
    others: [http://10.0.0.12:8000]
    seconds: 60
  register: __bake
"""

RETURN = r"""
worse:
  description: Whether the app is worse than on the other hosts.
  type: bool
  returned: always
reason:
  description: Why it is worse; empty if it is not.
  type: str
  returned: always
summary:
  description: Requests, share of errors and p99 of this host and of the others.
  type: str
  returned: always
"""

import http.client
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

ARGUMENTS = {
    "urls": {"type": "list", "elements": "str", "required": True},
    "others": {"type": "list", "elements": "str", "default": []},
    "seconds": {"type": "int", "required": True},
}

INTERVAL = 5.0
"""Seconds between two reads."""

LEAST_ANSWERS = 50
"""With fewer answers, one slow or failed request would decide."""

SUCCESSIVE = 3
"""Comparisons in a row that must be bad: a stall of the disk or of the network ends sooner."""

ERROR_MARGIN = 0.02
P99_FACTOR, P99_MARGIN = 3.0, 0.1
"""Hosts are unequal, and the histogram's buckets are up to 2.5 apart."""
P99_ALONE = 1.0
"""Seconds; the limit if there are no other hosts to compare with."""

MISSED = 2
"""Reads in a row without an answer."""
RESTART_TOLERANCE = 2.0
"""Seconds by which the reported start may vary."""

_SERIES = re.compile(r"^pixel_request_seconds_(count|bucket)\{(.*)\} (\S+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_STARTED = re.compile(r"^pixel_start_time_seconds (\S+)$", re.M)
# Requests that say nothing about the release: they report the state of Redis or of other instances.
_NOT_COUNTED = re.compile(r"/(readyz|healthz|metrics)$|/fleet/")
_SINGLE_PIXEL = re.compile(r"/pixel(/|$)")


@dataclass
class Totals:
    """Answers of an instance, or of several: since it started, or between two reads."""

    answers: int = 0
    failed: int = 0
    buckets: Counter[float] = field(default_factory=Counter)
    """Answers about single pixels by the upper bound of their seconds, cumulative."""

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.answers + other.answers, self.failed + other.failed, self.buckets + other.buckets)

    def __sub__(self, other: Totals) -> Totals:
        return Totals(self.answers - other.answers, self.failed - other.failed, self.buckets - other.buckets)

    @property
    def errors(self) -> float:
        """The share of failed answers."""
        return self.failed / self.answers if self.answers else 0.0

    @property
    def p99(self) -> float:
        """The upper bound of the bucket that contains the 99th percentile, in seconds."""
        wanted = 0.99 * self.buckets[inf]
        return min((bound for bound, count in self.buckets.items() if count >= wanted), default=0.0)

    def __str__(self) -> str:
        return f"{self.answers} answers, {self.errors:.1%} errors, p99 {_seconds(self.p99)}"


class Read(NamedTuple):
    """The metrics of an instance: its totals, and when it started."""

    totals: Totals
    started: float


def parse(text: str) -> Read:
    """Read the totals from the text format of Prometheus."""
    totals = Totals()
    for kind, labels, value in _SERIES.findall(text):
        label = dict(_LABEL.findall(labels))
        if _NOT_COUNTED.match(label["route"]):
            continue
        if kind == "count":
            totals.answers += int(float(value))
            totals.failed += int(float(value)) if label["status"].startswith("5") else 0
        elif _SINGLE_PIXEL.match(label["route"]):
            totals.buckets[float(label["le"])] += int(float(value))
    started = _STARTED.search(text)
    return Read(totals, float(started[1]) if started else 0.0)


def excess(own: Totals, others: Totals) -> str:
    """Why a host is worse than the others in the same time; empty if it is not."""
    comparable = others.answers >= LEAST_ANSWERS
    usual = others.errors if comparable else 0.0
    if own.errors > usual + ERROR_MARGIN:
        beside = f", {usual:.1%} on the other hosts" if comparable else ""
        return f"{own.errors:.1%} of {own.answers} answers are errors{beside}"
    limit = max(P99_FACTOR * others.p99, others.p99 + P99_MARGIN) if comparable else P99_ALONE
    if own.p99 > limit:
        beside = f", {_seconds(others.p99)} on the other hosts" if comparable else ""
        return f"the p99 of requests for pixels is {_seconds(own.p99)}{beside}"
    return ""


def _seconds(value: float) -> str:
    return "over 10 s" if value == inf else f"{value:g} s"


class Judge:
    """Compares successive reads of this host and of the others."""

    def __init__(self) -> None:
        self.own, self.others = Totals(), Totals()
        """What has happened since the first read."""
        self._window: tuple[Totals, Totals] = (Totals(), Totals())
        self._last: dict[str, Read] = {}
        self._bad = 0
        self._missed = 0

    def observe(self, own: dict[str, Read | str], others: dict[str, Read | str]) -> str:
        """Compare with the last reads. Returns why the host is worse; empty if it is not yet known to be.

        Args:
            own: by URL, what was read from this host's instances, or why nothing was.
            others: the same for instances of other hosts; those that don't answer are left out.
        """
        missing = [f"{url}/metrics: {read}" for url, read in own.items() if isinstance(read, str)]
        self._missed = self._missed + 1 if missing else 0
        if self._missed >= MISSED:
            return f"it doesn't answer ({missing[0]})"
        for url, read in own.items():
            if url in self._last and isinstance(read, Read) and self._restarted(url, read):
                return "it has restarted by itself"
        changes = (self._since(own), self._since(others))
        self._last |= {url: read for url, read in (own | others).items() if isinstance(read, Read)}
        self.own += changes[0]
        self.others += changes[1]
        window = (self._window[0] + changes[0], self._window[1] + changes[1])
        if window[0].answers < LEAST_ANSWERS:
            self._window = window
            return ""
        self._window = (Totals(), Totals())
        reason = excess(*window)
        self._bad = self._bad + 1 if reason else 0
        return reason if self._bad >= SUCCESSIVE else ""

    @property
    def doubts(self) -> bool:
        """Whether the last comparison was bad."""
        return self._bad > 0

    def conclude(self) -> str:
        """Judge the whole time. Returns why the host is worse; empty if it is not, or had too few answers."""
        return excess(self.own, self.others) if self.own.answers >= LEAST_ANSWERS else ""

    def summary(self) -> str:
        """Return the totals of this host and of the others."""
        few = "" if self.own.answers >= LEAST_ANSWERS else f"; under {LEAST_ANSWERS} are too few to compare"
        beside = f"; the other hosts: {self.others}" if self.others.answers else ""
        return f"{self.own}{few}{beside}"

    def _since(self, reads: dict[str, Read | str]) -> Totals:
        """What has happened on these instances since their last reads."""
        changes = Totals()
        for url, read in reads.items():
            if isinstance(read, Read) and url in self._last and not self._restarted(url, read):
                changes += read.totals - self._last[url].totals
        return changes

    def _restarted(self, url: str, read: Read) -> bool:
        return abs(read.started - self._last[url].started) > RESTART_TOLERANCE


def watch(
    own: Sequence[str],
    others: Sequence[str],
    seconds: float,
    read: Callable[[Sequence[str]], dict[str, Read | str]],
    sleep: Callable[[float], None],
) -> tuple[str, str]:
    """Compare for some seconds. Returns why the host is worse (empty if it is not), and the summary.

    Args:
        read: reads the metrics of instances by their URLs; for one that doesn't answer, the reason.
    """
    judge = Judge()
    judge.observe(read(own), read(others))
    left = seconds
    # If the last comparison is bad, the time is extended to see whether the next ones are, too.
    while left > 0 or (judge.doubts and left > -SUCCESSIVE * INTERVAL):
        sleep(min(INTERVAL, left) if left > 0 else INTERVAL)
        left -= INTERVAL
        if reason := judge.observe(read(own), read(others)):
            return reason, judge.summary()
    return judge.conclude(), judge.summary()


def read_all(urls: Sequence[str]) -> dict[str, Read | str]:
    """Read the metrics of instances, all at the same time."""
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        return dict(zip(urls, pool.map(_read, urls), strict=True))


def _read(url: str) -> Read | str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/metrics", timeout=3) as answer:
            return parse(answer.read().decode())
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    option = module.params
    reason, summary = "", ""
    if not module.check_mode:
        reason, summary = watch(option["urls"], option["others"], option["seconds"], read_all, time.sleep)
    module.exit_json(changed=False, worse=bool(reason), reason=reason, summary=summary)


if __name__ == "__main__":
    main()
