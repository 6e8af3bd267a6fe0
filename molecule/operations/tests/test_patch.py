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
