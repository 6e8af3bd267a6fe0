"""A dry run shows manual changes and the leftovers of interrupted runs, and the next run repairs them.

One test for all roles: three runs of site.yml. Not covered: python3-venv, which role pixel_app needs, and
installs, only when it builds a release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

testinfra_hosts = ["c5"]

DAMAGE = {
    "c5": """
        # redis
        echo 'maxclients 5' >>/etc/redis/redis.conf
        chmod 0666 /etc/redis/users.acl
        rm /etc/sysctl.d/60-redis.conf
        chown redis /usr/local/sbin/redis-trim-log
        systemctl disable --now redis-server
        # pixel_app
        echo "PIXEL_LOG_LEVEL='debug'" >>/etc/pixel/pixel.env
        sed -i 's/^LimitNOFILE=.*/LimitNOFILE=999/' /etc/systemd/system/pixel.service
        # nginx_lb
        echo '# by hand' >>/etc/nginx/staged/pixel/admin.conf
        echo '# by hand' >>/etc/nginx/pixel/proxy.conf
        systemctl disable --now nginx
        # firewall
        sed -i 's/policy drop/policy accept/' /etc/pixel-firewall/staged.nft
        nft delete table inet pixel
        # logs
        rm /etc/logrotate.d/nginx
        systemctl disable --now logrotate.timer
        # monitoring
        echo '# by hand' >>/etc/default/prometheus-redis-exporter
        rm /etc/systemd/system/prometheus-nginx-exporter.service.d/pixel.conf
        systemctl disable --now prometheus-alertmanager
        # Files newer than their services, as after a run that was interrupted before a restart or a reload.
        touch /usr/local/sbin/pixel-lb /etc/prometheus/pixel.rules.yml
    """,
    "t2": """
        systemctl disable --now pixel.socket pixel.service
        systemctl disable --now pixel-firewall
        echo 'SystemMaxUse=1M' >>/etc/systemd/journald.conf.d/pixel.conf
        DEBIAN_FRONTEND=noninteractive apt-get remove --yes prometheus-node-exporter
    """,
}
SHOWN = [
    "c5: redis : Configure Redis",
    "c5: redis : Apply kernel settings",
    "c5: redis : Enable and start a single Redis, and restart it if its files are newer",
    # A dry run stages nothing that a switch would find.
    "c5: pixel_app : Stage settings, password and units",
    "t2: pixel_app : Stage settings, password and units",
    "t2: pixel_app : Switch to the staged deployment; roll back if its check fails",
    "c5: nginx_lb : Install the agent and stage the configuration",
    "c5: nginx_lb : Check and apply the staged configuration",
    "c5: nginx_lb : Enable and start Nginx and the controller, and restart a controller with newer files",
    "c5: firewall : Stage the rules",
    "c5: firewall : Compare the staged rules with the loaded ones",
    "t2: firewall : Compare the staged rules with the loaded ones",
    "t2: firewall : Load the rules at boot",
    "c5: logs : Configure the journal, rotation and forwarding",
    "t2: logs : Configure the journal, rotation and forwarding",
    "c5: logs : Start the journal, rotation and forwarding, and restart those with newer files",
    "t2: logs : Start the journal, rotation and forwarding, and restart those with newer files",
    "c5: monitoring : Configure Prometheus, Alertmanager and the exporters",
    "c5: monitoring : Enable and start the services, and restart those with newer files",
    # Without the package a dry run of this role ends here.
    "t2: monitoring : Install Prometheus, Alertmanager and the exporters that this host needs",
]
DIFFS = [
    "-maxclients 5",
    "-mode: 0666",
    "+++ after: /etc/sysctl.d/60-redis.conf",
    "+++ after: /usr/local/sbin/redis-trim-log",
    "-PIXEL_LOG_LEVEL='debug'",
    "-LimitNOFILE=999",
    "-# by hand",
    "-SystemMaxUse=1M",
    "+++ after: /etc/logrotate.d/nginx",
    "+++ after: /etc/systemd/system/prometheus-nginx-exporter.service.d/pixel.conf",
    "-nginx.service: disabled, inactive",
    "-pixel-lb.service: enabled, active, older than /usr/local/sbin/pixel-lb",
    "-prometheus.service: enabled, active, older than /etc/prometheus/pixel.rules.yml",
    "-prometheus-alertmanager.service: disabled, inactive",
    "-prometheus-redis-exporter.service: enabled, active, older than /etc/default/prometheus-redis-exporter",
]
# Units that are stopped or older than their files are started again, and no other unit is.
STARTED = {
    "c5": {
        "logrotate.timer",
        "nginx.service",
        "pixel-lb.service",
        "pixel.service",
        "prometheus-alertmanager.service",
        "prometheus-nginx-exporter.service",
        "prometheus-redis-exporter.service",
        "redis-server.service",
    },
    "t2": {
        "pixel-firewall.service",
        "pixel.service",
        "pixel.socket",
        "prometheus-node-exporter.service",
        "systemd-journald.service",
    },
}
UNITS = sorted({*STARTED["c5"], *STARTED["t2"], "prometheus.service"})
FILES = [
    "/etc/default/prometheus-redis-exporter",
    "/etc/logrotate.d/nginx",
    "/etc/nginx/pixel/admin.conf",
    "/etc/nginx/pixel/proxy.conf",
    "/etc/pixel-firewall/staged.nft",
    "/etc/pixel/pixel.env",
    "/etc/redis/redis.conf",
    "/etc/redis/users.acl",
    "/etc/sysctl.d/60-redis.conf",
    "/etc/systemd/journald.conf.d/pixel.conf",
    "/etc/systemd/system/pixel.service",
    "/etc/systemd/system/prometheus-nginx-exporter.service.d/pixel.conf",
    "/usr/local/sbin/redis-trim-log",
]


@pytest.fixture
def state_of(shell: Any) -> Any:
    """Modes, owners and digests of a host's files, states of its units, its firewall rules and packages."""
    script = (
        f"cd /; for file in {' '.join(FILES)}; do stat -c '%n %a %U' $file; sha256sum $file; done\n"
        f"systemctl show --property=Id,UnitFileState,ActiveState,NeedDaemonReload {' '.join(UNITS)}\n"
        "nft --stateless list chain inet pixel input; dpkg-query --show 'prometheus*'"
    )
    return lambda host: shell(script, on=host)


@pytest.fixture
def started(shell: Any) -> Callable[[str], set[str]]:
    """Units of a host that have been started since the fixture was set up."""

    def invocations(host: str) -> dict[str, str]:
        """The ID of each unit's last start; a unit that was stopped may have none."""
        text = shell(f"systemctl show --property=Id,InvocationID {' '.join(UNITS)}", on=host)
        found = [dict(line.split("=", 1) for line in unit.splitlines()) for unit in text.split("\n\n")]
        return {unit["Id"]: unit.get("InvocationID", "") for unit in found}

    before = {host: invocations(host) for host in DAMAGE}
    return lambda host: {
        unit for unit, one in invocations(host).items() if one not in ("", before[host][unit])
    }


def test_drift_of_all_roles_is_shown_and_repaired_once(
    host: Any, play: Any, shell: Any, state_of: Any, started: Any
) -> None:
    before = {name: state_of(name) for name in DAMAGE}
    for name, script in DAMAGE.items():
        shell(script, on=name)
    damaged = {name: state_of(name) for name in DAMAGE}
    shown = play("site.yml", "--check", "--diff")
    assert Counter(shown.changed_tasks()) == Counter(SHOWN)
    for line in DIFFS:
        assert line in shown.stdout, shown.stdout
    # The users' file and the credentials are secret.
    assert "user default" not in shown.stdout
    assert {name: state_of(name) for name in DAMAGE} == damaged
    assert not started("c5") | started("t2")

    prometheus = host.service("prometheus").systemd_properties
    repaired = play("site.yml")
    # A run loads the rules, so their comparison is no change there.
    assert {task.split(": ", 1)[1] for task in set(SHOWN) - set(repaired.changed_tasks())} == {
        "firewall : Compare the staged rules with the loaded ones"
    }
    assert max(Counter(repaired.changed_tasks()).values()) == 1
    assert "c5: redis : Restart Redis" not in repaired.changed_tasks()
    for name in DAMAGE:
        assert state_of(name).splitlines() == before[name].splitlines()
    assert {name: started(name) for name in DAMAGE} == STARTED
    # Prometheus was reloaded, not restarted.
    moments = host.service("prometheus").systemd_properties
    assert moments["InactiveExitTimestamp"] == prometheus["InactiveExitTimestamp"]
    assert moments["StateChangeTimestampMonotonic"] != prometheus["StateChangeTimestampMonotonic"]
    assert play("site.yml").changes() == {"c5": 0, "t2": 0}
