"""A deploy where no other host answers meanwhile."""

from __future__ import annotations

from typing import Any

testinfra_hosts = ["c5"]


def test_a_deploy_to_a_single_host_refuses_no_request(
    play: Any, client: Any, releases: Any, requests: Any
) -> None:
    """As in a fleet of one: requests during the restart wait in the listening sockets."""
    assert play("playbooks/nginx_lb.yml", nginx_lb_pixel_timeout=10).returncode == 0
    assert play("playbooks/drain.yml", host="t2").returncode == 0
    try:
        with requests():
            deployed = play("playbooks/pixel_app.yml", "--limit", "c5", pixel_app_release="alone")
        assert deployed.returncode == 0, deployed.stdout
        assert client.read_from("c5", "/ping")["release"] == "alone"
    finally:
        assert play("playbooks/undrain.yml", host="t2").returncode == 0
    assert play("site.yml", "--tags", "pixel_app,nginx_lb").returncode == 0
    assert len(set(releases().values())) == 1
