"""The functions of pixel-watch. Scenario default tests that the node exporter serves its file."""

from __future__ import annotations

from pathlib import Path

import pixel_watch


def test_certificate_paths_are_read_from_the_configuration() -> None:
    configuration = """
        ssl_certificate tls/fullchain.pem;
        ssl_certificate_key tls/privkey.pem;
        ssl_certificate "/srv/other.pem";
        ssl_certificate tls/fullchain.pem;
        ssl_certificate $chosen;
    """
    assert pixel_watch.certificate_paths(configuration) == ["/etc/nginx/tls/fullchain.pem", "/srv/other.pem"]


def test_a_backend_that_is_not_up_still_has_a_weight() -> None:
    backends = {
        "c5": {"weight": 3, "state": "up", "share": 1.0, "cpu_credits": None},
        "t2": {"weight": 2, "state": "drained", "share": 0.25, "cpu_credits": 12.5},
        "t2-8001": {"weight": 2, "state": "down", "share": 1.0, "cpu_credits": 0.0},
    }
    address = {"ip": "10.0.0.100", "held": True}
    lines = pixel_watch.balancer({"loaded": True, "address": address, "backends": backends})
    assert lines == [
        "pixel_lb_loaded 1",
        "pixel_lb_address_held 1",
        'pixel_lb_backend_weight{backend="c5"} 3',
        'pixel_lb_backend_up{backend="c5"} 1',
        'pixel_lb_backend_share{backend="c5"} 1.0',
        'pixel_lb_backend_weight{backend="t2"} 2',
        'pixel_lb_backend_up{backend="t2"} 0',
        'pixel_lb_backend_share{backend="t2"} 0.25',
        'pixel_lb_backend_cpu_credits{backend="t2"} 12.5',
        'pixel_lb_backend_weight{backend="t2-8001"} 2',
        'pixel_lb_backend_up{backend="t2-8001"} 0',
        'pixel_lb_backend_share{backend="t2-8001"} 1.0',
        'pixel_lb_backend_cpu_credits{backend="t2-8001"} 0.0',
    ]


def test_a_balancer_without_an_address_that_moves_has_no_metric_of_it() -> None:
    assert pixel_watch.balancer({"loaded": True, "address": None, "backends": {}}) == ["pixel_lb_loaded 1"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link at the output's path or a temporary path must not redirect the write."""
    secret = tmp_path / "secret"
    secret.write_text("kept")
    secret.chmod(0o600)
    output = tmp_path / "pixel_balancer.prom"
    for planted in (output, output.with_suffix(".new"), output.with_suffix(".half")):
        planted.symlink_to(secret)
    pixel_watch.write(output, "pixel_lb_loaded 1\n")
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("kept", 0o600)
    assert not output.is_symlink()
    assert (output.read_text(), output.stat().st_mode & 0o777) == ("pixel_lb_loaded 1\n", 0o644)


def test_the_output_is_not_in_a_directory_of_another_user() -> None:
    """In Debian, /var/lib/prometheus belongs to user prometheus."""
    assert pixel_watch.OUTPUT.parent == Path("/var/lib/pixel-metrics")
