"""Latencies from Nginx's access log."""

from __future__ import annotations

from pathlib import Path

import pytest
from pixel_lb.access_log import LogTail


def line(uri: str, upstream: str, seconds: str) -> bytes:
    # In the format of nginx.conf.j2.
    text = (
        f'{{"time":"2026-11-21T08:00:00+00:00","client":"10.0.0.9","uri":"{uri}","status":200,"bytes":99,'
        f'"seconds":0.001,"upstream":"{upstream}","upstream_status":"200","upstream_seconds":"{seconds}",'
        f'"upstream_connect":"0.000","agent":"x"}}\n'
    )
    return text.encode()


def test_seconds_of_pixel_requests_are_summed_by_backend(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_bytes(line("/pixel", "10.0.0.1:8000", "9.999"))
    tail = LogTail(log)
    assert tail.read() == {}  # Earlier lines are skipped.
    with log.open("ab") as file:
        file.write(line("/pixel", "10.0.0.1:8000", "0.004") + line("/pixel/1/2", "10.0.0.1:8000", "0.002"))
        file.write(line("/cluster/t2/pixel", "unix:/run/pixel.sock", "30.5"))
        file.write(line("/pixel", "10.0.0.1:8000, unix:/run/pixel.sock", "0.500, 0.001"))
        file.write(line("/pixel", "10.0.0.1:8000 : 10.0.0.3:8000", "0.500 : 0.002"))
        for uri in ("/events", "/canvas.png", "/pixels", "/ping"):
            file.write(line(uri, "10.0.0.1:8000", "7.000"))
        file.write(line("/pixel", "-", "-"))
    seen = tail.read()
    assert seen["10.0.0.1:8000"] == pytest.approx((4, 1.006))
    assert seen["10.0.0.3:8000"] == pytest.approx((1, 0.002))
    assert seen["unix:/run/pixel.sock"] == pytest.approx((2, 1.001))  # Each request counts at most 1 s.
    assert tail.read() == {}


def test_the_log_may_be_rotated_or_too_long_to_read(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.touch()
    tail = LogTail(log)
    tail.read()
    log.rename(tmp_path / "access.log.1")
    assert tail.read() == {}
    one = line("/pixel", "10.0.0.1:8000", "0.002")
    log.write_bytes(one * 20_000)
    count, seconds = tail.read()["10.0.0.1:8000"]
    assert count == pytest.approx(20_000, rel=0.01)
    assert seconds / count == pytest.approx(0.002)
