"""playbooks/doctor.yml finds planted faults, and nothing on a healthy fleet."""

from __future__ import annotations

from typing import Any

import pytest

testinfra_hosts = ["c5"]

# By host: what is planted, and how it is undone.
PLANTED = {
    "c5": (
        """
        mount -t tmpfs -o size=256k doctor-bytes /mnt && head -c 1M /dev/zero >/mnt/full
        mount -t tmpfs -o nr_inodes=4 doctor-inodes /srv && touch /srv/a /srv/b /srv/c
        mkdir -p /etc/nginx/tls
        openssl req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=doctor \\
            -keyout /dev/null -out /etc/nginx/tls/fullchain.pem
        process=$(systemctl show -P MainPID prometheus)
        prlimit --pid "$process" --nofile --output SOFT --noheadings >/run/doctor.files
        files=$(ls /proc/$process/fd | wc -l)
        prlimit --pid "$process" --nofile=$((files + files / 10)):
        cp -p /var/lib/pixel-metrics/pixel_backup.prom /run/doctor.prom
        echo 'pixel_backup_timestamp_seconds 1700000000' >/var/lib/pixel-metrics/pixel_backup.prom
        touch /run/reboot-required
        pixel-lb drain t2 --wait=0
        """,
        """
        umount /mnt /srv
        rm -f /etc/nginx/tls/fullchain.pem /run/reboot-required /var/lib/pixel-metrics/pixel_backup.prom
        ! [ -e /run/doctor.prom ] || mv /run/doctor.prom /var/lib/pixel-metrics/pixel_backup.prom
        pixel-lb undrain t2
        prlimit --pid "$(systemctl show -P MainPID prometheus)" --nofile="$(tr -d ' ' </run/doctor.files):"
        """,
    ),
    "t2": (
        """
        systemctl stop prometheus-node-exporter
        systemd-run --quiet --unit=doctor-port python3 -m http.server 9100
        cp -p /var/lib/dpkg/status /run/doctor.status
        sed -i '/^Package: python3$/,/^$/s/^Version: .*/Version: 3.99-1/' /var/lib/dpkg/status
        echo '# by hand' >>/etc/pixel/pixel.env
        nft add table inet doctor
        nft 'add chain inet doctor out { type filter hook output priority 0; }'
        nft add rule inet doctor out ip daddr {c5} tcp dport 8000 reject with tcp reset
        """,
        """
        systemctl stop doctor-port
        systemctl start prometheus-node-exporter
        mv /run/doctor.status /var/lib/dpkg/status
        sed -i '/^# by hand$/d' /etc/pixel/pixel.env
        nft delete table inet doctor
        """,
    ),
}
FINDINGS = [
    "c5: 0 % of the bytes of /mnt are free.",
    "c5: 0 % of the inodes of /srv are free.",
    "c5: the certificate /etc/nginx/tls/fullchain.pem expires in 2 days",
    "c5: a process of prometheus.service has ",
    "c5: an upgrade takes effect only after a reboot",
    "c5: t2 is drained and gets no requests: playbooks/undrain.yml -e host=t2",
    "fleet: the newest backup is ",
    "t2: prometheus-node-exporter.service is inactive",
    "t2: port 9100 is used by python3 (process ",
    "t2: can't reach the app on c5 at ",
    "t2: release ",
    "fleet: hosts have different versions of python3 (",
]


@pytest.fixture
def faults(shell: Any, fleet: dict[str, Any]) -> Any:
    try:
        for host, (plant, _) in PLANTED.items():
            shell(plant.replace("{c5}", fleet["hosts"]["c5"]["address"]), on=host)
        yield
    finally:
        for host, (_, undo) in PLANTED.items():
            shell(undo, on=host)


def test_a_healthy_fleet_has_no_finding(play: Any) -> None:
    done = play("playbooks/doctor.yml")
    assert done.changes() == {"c5": 0, "t2": 0}
    assert "No fault was found on c5, t2." in done.words


def test_hosts_that_do_not_answer_are_findings(play: Any) -> None:
    done = play("playbooks/doctor.yml", ansible_port=9, ansible_ssh_retries=0)
    assert done.returncode != 0
    assert "2 finding(s): c5: can't be checked: " in done.words
    assert "t2: can't be checked: " in done.words


def test_planted_faults_are_found_one_line_each(play: Any, faults: None) -> None:
    done = play("playbooks/doctor.yml")
    assert done.returncode != 0
    lines = [line.strip() for line in done.stdout.splitlines()]
    # Ansible prints the message twice.
    found = {line for line in lines if line.startswith(("c5: ", "t2: ", "fleet: "))}
    missing = [text for text in FINDINGS if not any(line.startswith(text) for line in found)]
    assert not missing, done.stdout
    assert len(found) == len(FINDINGS), found
    assert f"{len(FINDINGS)} finding(s):" in done.words
