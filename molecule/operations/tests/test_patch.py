"""Patches and reboots, one host at a time, under load."""

from __future__ import annotations

from typing import Any

testinfra_hosts = ["t2"]

REPOSITORY = """
set -e
mkdir -p /srv/updates/build/DEBIAN /srv/updates/build/etc
cd /srv/updates
for version in 1.0 2.0; do
    printf 'Package: pixel-patched\nVersion: %s\nArchitecture: all\n' $version >build/DEBIAN/control
    printf 'Maintainer: Test <test@example.org>\nDescription: for a test\n' >>build/DEBIAN/control
    echo /etc/patched.conf >build/DEBIAN/conffiles
    echo "of $version" >build/etc/patched.conf
    dpkg-deb --build build patched_$version.deb >/dev/null
done
apt-get install --yes ./patched_1.0.deb >/dev/null 2>&1
echo ours >/etc/patched.conf
rm patched_1.0.deb
printf 'Package: pixel-patched\nVersion: 2.0\nArchitecture: all\n' >Packages
printf 'Maintainer: Test <test@example.org>\n' >>Packages
printf 'Filename: ./patched_2.0.deb\nSize: %s\n' $(stat -c %s patched_2.0.deb) >>Packages
printf 'SHA256: %s\nDescription: for a test\n' $(sha256sum patched_2.0.deb | cut -d' ' -f1) >>Packages
echo 'deb [trusted=yes] file:/srv/updates ./' >/etc/apt/sources.list.d/updates.list
touch /run/reboot-required
"""
REMOVE = """
rm -rf /etc/apt/sources.list.d/updates.list /srv/updates /run/reboot-required
apt-get purge --yes pixel-patched
"""
BOOTED = "cut -d' ' -f22 /proc/1/stat"


def test_a_host_is_upgraded_and_rebooted_without_a_failed_write(
    client: Any, host: Any, play: Any, requests: Any, shell: Any
) -> None:
    shell(REPOSITORY)
    booted = shell(BOOTED)
    try:
        with requests():
            done = play("playbooks/patch.yml")
        assert done.returncode == 0, done.words
        assert (
            "t2: 1 packages to upgrade (pixel-patched); a reboot is needed: /run/reboot-required"
            in done.words
        )
        assert "t2 is patched, rebooted and serves." in done.words
        assert shell(BOOTED) != booted
        assert host.package("pixel-patched").version == "2.0"
        assert host.file("/etc/patched.conf").content_string == "ours\n"
        assert not host.file("/var/lib/pixel-patch").exists
        assert {client.ask("/ping")[1]["X-Pixel-Instance"] for _ in range(20)} == {"c5", "t2"}
        assert play("playbooks/patch.yml").changes() == {"c5": 0, "t2": 0}
    finally:
        shell(REMOVE)


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
