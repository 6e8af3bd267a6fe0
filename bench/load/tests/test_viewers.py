"""The viewers, tested with an event service that has faults."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from bench.load.http1 import Target
from bench.load.viewers import Report, watch

pytestmark = pytest.mark.timing


class Service:
    """Sends each change to all viewers, or has one fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.viewers: list[asyncio.StreamWriter] = []
        self.changes = 0

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /events"):
                    self.open(writer)
                    continue
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length
                self.change(await reader.readexactly(int(length[1])))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def open(self, writer: asyncio.StreamWriter) -> None:
        if self.fault == "refuses" and len(self.viewers) == 2:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.fault = ""
            return
        self.viewers.append(writer)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nid: 0-0\ndata: []\n\n")

    def change(self, body: bytes) -> None:
        said = json.loads(body)
        pixel = [[said["x"], said["y"], said["channel"], said["value"]]] if isinstance(said, dict) else said
        self.changes += 1
        message = b"id: %d-0\ndata: %b\n\n" % (
            self.changes,
            json.dumps(pixel, separators=(",", ":")).encode(),
        )
        for number, viewer in enumerate(self.viewers):
            if self.fault == "forgets" and number == 1:
                continue
            viewer.write(message[:9])  # in pieces
            viewer.write(message[9:])
        if self.fault == "drops" and self.changes == 3:
            self.viewers.pop().close()


def watched(service: Service, viewers: int, **options: Any) -> Report:
    async def run() -> Report:
        server = await asyncio.start_server(service.converse, "127.0.0.1", 0)
        target = Target.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        report = await watch(target, viewers, 50, 0.4, **options)
        server.close()
        await asyncio.sleep(0.05)  # until the service's connections are closed
        return report

    return asyncio.run(run())


def test_all_hear_all_and_how_late() -> None:
    service = Service()
    report = watched(service, 5)
    assert (report.good, report.viewers, report.writes, report.failed_writes) == (True, 5, 20, 0)
    assert report.messages == 100
    assert 0 < report.late.p50 < 200
    assert service.changes == 21


def test_messages_can_be_published() -> None:
    service = Service()
    report = watched(service, 3, publish="/publish", changes=10)
    assert (report.good, report.messages, service.changes) == (True, 6, 3)


@pytest.mark.parametrize(
    ("fault", "refused", "lost"), [("refuses", 1, 0), ("drops", 0, 1), ("forgets", 0, 0)]
)
def test_faults_are_found(fault: str, refused: int, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.viewers.HEARD_SECONDS", 0.5)
    report = watched(Service(fault), 4)
    assert (report.refused, report.lost, report.all_heard, report.good) == (refused, lost, False, False)
