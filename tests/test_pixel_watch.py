"""pixel-watch's own logic; that the node exporter shows what it writes is tested on hosts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pixel_watch
import pytest


def test_certificates_are_found_where_the_configuration_says() -> None:
    configuration = """
        ssl_certificate tls/fullchain.pem;
        ssl_certificate_key tls/privkey.pem;
        ssl_certificate "/srv/other.pem";
        ssl_certificate tls/fullchain.pem;
        ssl_certificate $chosen;
    """
    assert pixel_watch.certificate_paths(configuration) == ["/etc/nginx/tls/fullchain.pem", "/srv/other.pem"]


def test_what_is_out_has_its_weight_and_is_not_up() -> None:
    backends = {"c5": {"weight": 3, "state": "up"}, "t2": {"weight": 2, "state": "drained"}}
    lines = pixel_watch.balancer({"loaded": True, "backends": backends}, {"t2": [0.25, False]}, {"t2": 12.5})
    assert lines == [
        "pixel_lb_loaded 1",
        'pixel_lb_backend_weight{backend="c5"} 3',
        'pixel_lb_backend_up{backend="c5"} 1',
        'pixel_lb_backend_share{backend="c5"} 1.0',
        'pixel_lb_backend_weight{backend="t2"} 2',
        'pixel_lb_backend_up{backend="t2"} 0',
        'pixel_lb_backend_share{backend="t2"} 0.25',
        'pixel_lb_backend_cpu_credits{backend="t2"} 12.5',
    ]


def test_credits_are_those_that_a_living_controller_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    monkeypatch.setattr(pixel_watch, "THOUGHTS", file)
    assert pixel_watch.credits_left() == {}
    backends = [{"name": "c5", "cpu_credits": None}, {"name": "t2", "cpu_credits": 0.0}]
    file.write_text(json.dumps({"backends": backends}))
    assert pixel_watch.credits_left() == {"t2": 0.0}
    os.utime(file, (1, 1))
    assert pixel_watch.credits_left() == {}
