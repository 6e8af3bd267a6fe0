"""playbooks/patch.yml at hosts that can't be patched without harm. Scenario operations patches under load."""

from __future__ import annotations

from typing import Any

testinfra_hosts = ["t2"]

BOOTED = "cut -d' ' -f22 /proc/1/stat"


def test_the_run_stops_at_a_host_that_does_not_serve_and_the_next_run_completes_it(
    client: Any, play: Any, shell: Any
) -> None:
    """The app of t2 is disabled, so t2 doesn't become ready after its reboot."""
    shell("systemctl disable --now pixel.socket pixel.service")
    try:
        done = play("playbooks/patch.yml", patch_reboot="always", patch_ready_seconds=5)
        assert "t2 was not patched completely" in done.words
        assert "It stays drained. Hosts after it were not touched." in done.words
        assert "playbooks/undrain.yml -e host=t2" in done.words
        assert done.returncode != 0
        assert "PLAY [Patch hosts of Redis" not in done.words
        assert "drained by an operator" in play("playbooks/status.yml").words
    finally:
        shell("systemctl enable --now pixel.socket pixel.service")
    assert play("playbooks/patch.yml", "--limit", "t2").changes()["t2"] > 0
    assert "drained by an operator" not in play("playbooks/status.yml").words
    assert {client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(20)} == {"c5", "t2"}


def test_hosts_whose_reboot_is_an_outage_are_patched_only_if_that_is_allowed(
    client: Any, play: Any, shell: Any
) -> None:
    booted = shell(BOOTED, on="c5")
    refused = play("playbooks/patch.yml", "--limit", "c5", patch_reboot="always")
    assert refused.changes() == {"c5": 0}
    assert "interrupt the service, and it was not patched: add -e patch_outage=true" in refused.words
    assert shell(BOOTED, on="c5") == booted
    done = play("playbooks/patch.yml", "--limit", "c5", patch_reboot="always", patch_outage=True)
    assert "c5 is patched, rebooted and serves." in done.words
    assert done.returncode == 0
    assert shell(BOOTED, on="c5") != booted
    assert "No such file or directory" in shell("ls /run/pixel-deploy.lock 2>&1 || true", on="c5")
    assert client.ask("/pixel/1/2")[0] == 200
