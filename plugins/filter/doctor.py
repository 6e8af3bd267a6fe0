"""Filters of `playbooks/doctor.yml`: what is checked on a host, and what is wrong.

hostvars | doctor_checks(groups, host)        options of module host_checkup
hostvars | doctor_findings(groups, hosts)     one line a finding: what is wrong, and what to do
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.pixel.endpoint.plugins.filter.pixel_fleet import (
    LISTEN_PORT,
    REDIS_PORT,
    TLS_PORT,
    exporter_port,
    pixel_instances,
    redis_ports,
)

Variables = Mapping[str, Any]
Groups = Mapping[str, Sequence[str]]

# Thresholds: role monitoring's variables with its defaults.
DISK_FREE_RATIO = ("monitoring_disk_free_ratio", 0.1)
STEAL_RATIO = ("monitoring_steal_ratio", 0.1)
CERTIFICATE_DAYS = ("monitoring_certificate_days", 14)
BACKUP_HOURS = ("monitoring_backup_hours", 26)
# Thresholds without a variable: seconds between clocks, shares of the memory and of the open files.
CLOCK_SECONDS = 0.5
MEMORY_RATIO = 0.05
OPEN_FILES_RATIO = 0.8

CERTIFICATES = ["/etc/nginx/tls/fullchain.pem"]
PACKAGES = {
    "redis": ["redis-server"],
    "pixel_app": ["python3"],
    "nginx_lb": ["nginx"],
    "monitoring": [],
}
# Units that may be off on purpose: reported only if they are enabled and don't run.
OPTIONAL = {
    "certbot.timer",
    "keepalived.service",
    "logrotate.timer",
    "pixel-firewall.service",
    "pixel-lb.service",
    "pixel-watch.timer",
}
EXPORTERS = {"node": "prometheus-node-exporter", "redis": "prometheus-redis-exporter"} | {
    "nginx": "prometheus-nginx-exporter",
    "prometheus": "prometheus",
    "alertmanager": "prometheus-alertmanager",
    "blackbox": "prometheus-blackbox-exporter",
}
# systemd itself listens on the sockets of the app, in no service.
SYSTEMD = "init.scope"


def member(groups: Groups, group: str) -> Sequence[str]:
    return groups.get(group) or []


def listen_address(variables: Variables) -> str:
    return f"{variables.get('private_address', '')}:{variables.get('nginx_lb_listen_port', LISTEN_PORT)}"


def expected_ports(variables: Variables, groups: Groups) -> dict[int, str]:
    """Return the services that listen on a host, by port."""
    host = variables["inventory_hostname"]
    # The data's process, and the voter on all hosts of a cluster but the first.
    processes = ("redis-server.service", "redis-server@voter.service")
    ports = dict(zip(redis_ports({**variables, "groups": groups}), processes, strict=False))
    if host in member(groups, "pixel_app"):
        ports |= {each["port"]: f"{each['unit']}.service" for each in pixel_instances(variables)}
    if host in member(groups, "nginx_lb"):
        ports[int(variables.get("nginx_lb_listen_port", LISTEN_PORT))] = "nginx.service"
        if variables.get("nginx_lb_tls", "off") not in ("off", False):
            ports[int(variables.get("nginx_lb_tls_port", TLS_PORT))] = "nginx.service"
    return ports | {exporter_port(name): f"{EXPORTERS[name]}.service" for name in exporters(host, groups)}


def exporters(host: str, groups: Groups) -> list[str]:
    """Return which of Prometheus, Alertmanager and the exporters a host has."""
    servers = member(groups, "monitoring")
    if not servers:
        return []
    return [
        "node",
        *(["redis"] if host in member(groups, "redis") else []),
        *(["nginx"] if host in member(groups, "nginx_lb") else []),
        *(["prometheus", "alertmanager", "blackbox"] if host in servers else []),
    ]


def targets(hostvars: Mapping[str, Variables], groups: Groups, host: str) -> dict[str, str]:
    """Return the addresses that a host must reach, with what is there."""
    redis = {
        f"{hostvars[each].get('private_address', '')}:{hostvars[each].get('redis_port', REDIS_PORT)}": (
            f"Redis on {each}"
        )
        for each in member(groups, "redis")
    }
    instances = {
        instance["address"]: f"the app on {each}"
        for each in member(groups, "pixel_app")
        for instance in pixel_instances(hostvars[each])
    }
    balancers = {listen_address(hostvars[each]): f"Nginx on {each}" for each in member(groups, "nginx_lb")}
    everyone = {each for names in groups.values() for each in names if each in hostvars}
    scraped = {
        f"{hostvars[each].get('private_address', '')}:{exporter_port(name)}": f"{EXPORTERS[name]} on {each}"
        for each in sorted(everyone)
        for name in exporters(each, groups)
    }
    found: dict[str, str] = {}
    if host in member(groups, "pixel_app"):
        found |= redis | instances | balancers
    if host in member(groups, "nginx_lb"):
        found |= instances
    if host in member(groups, "monitoring"):
        found |= instances | scraped
    return found


def doctor_checks(hostvars: Mapping[str, Variables], groups: Groups, host: str) -> dict[str, Any]:
    """Compute the options of module `host_checkup` for a host.

    Args:
        hostvars: Variables of all hosts.
        groups: The inventory's groups.
        host: The host.
    """
    groups = {name: names for name, names in groups.items() if name in PACKAGES}
    variables = hostvars[host]
    own = [name for name in PACKAGES if host in member(groups, name)]
    ports = expected_ports(variables, groups)
    sockets = [
        f"{each['unit']}.socket" for each in pixel_instances(variables) if host in member(groups, "pixel_app")
    ]
    cluster = ["redis-cluster.service"] if "redis" in own and len(groups["redis"]) > 1 else []
    return {
        "units": sorted({*ports.values(), *sockets, *cluster, *OPTIONAL}),
        "ports": sorted(ports),
        "connect": sorted(targets(hostvars, groups, host)),
        "clocks": [listen_address(hostvars[each]) for each in member(groups, "nginx_lb")],
        "packages": sorted({package for name in own for package in PACKAGES[name]}),
        "certificates": CERTIFICATES if "nginx_lb" in own else [],
    }


def limit(variables: Variables, threshold: tuple[str, float]) -> float:
    return float(variables.get(*threshold))


def percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:g} %"


def span(seconds: float) -> str:
    """Format a duration in the largest unit that fits."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.1f} seconds"


def of_resources(variables: Variables, report: Variables) -> Iterator[str]:
    least = limit(variables, DISK_FREE_RATIO)
    for point, free in sorted(report["filesystems"].items()):
        for what, share in free.items():
            if share is not None and share < least:
                yield (
                    f"{percent(share)} of the {what} of {point} are free. Remove files or enlarge it"
                    " (`du -x -d1`, `journalctl --vacuum-size=200M`): a full disk stops every write."
                )
    if report["memory"] < MEMORY_RATIO:
        yield f"{percent(report['memory'])} of the memory are available: see `ps aux --sort=-rss`."
    if report["steal"] > limit(variables, STEAL_RATIO):
        yield (
            f"the hypervisor takes {percent(report['steal'])} of the CPU time. A burstable instance may be"
            " out of credits: check them, or choose a larger instance."
        )
    for unit, files in sorted(report["open_files"].items()):
        if files["used"] > OPEN_FILES_RATIO * files["limit"]:
            yield (
                f"a process of {unit} has {files['used']} of at most {files['limit']} files open. Raise its"
                f" limit (LimitNOFILE of {unit}) or look for a leak: `systemctl restart {unit}` resets it."
            )
    if report["reboot_required"]:
        yield "an upgrade takes effect only after a reboot: drain the host and reboot it."


def of_services(ports: Mapping[int, str], report: Variables) -> Iterator[str]:
    for name, unit in sorted(report["units"].items()):
        if unit["active"] in ("active", "activating", "reloading"):
            continue
        if name in OPTIONAL and (unit["loaded"] != "loaded" or unit["enabled"] != "enabled"):
            continue
        if unit["loaded"] == "not-found":
            yield f"{name} is not installed: run site.yml."
        else:
            yield (
                f"{name} is {unit['active']} ({unit['result'] or 'no result'}): see `journalctl -u {name}`,"
                " and run site.yml, which starts it."
            )
    for port, wanted in sorted(ports.items()):
        for process in report["listeners"].get(str(port), []):
            if process["unit"] not in (wanted, SYSTEMD):
                yield (
                    f"port {port} is used by {process['name']} (process {process['pid']}), not by {wanted}:"
                    " stop that program, then run site.yml."
                )


def of_network(names: Mapping[str, str], report: Variables) -> Iterator[str]:
    for address, error in sorted(report["connection_errors"].items()):
        yield (
            f"can't reach {names.get(address, 'another host')} at {address} ({error}): check that it runs"
            " there, and the firewalls and security groups between the two hosts."
        )
    for address, clock in sorted(report["clocks"].items()):
        if abs(clock.get("offset", 0)) > CLOCK_SECONDS + clock.get("uncertainty", 0):
            direction = "ahead of" if clock["offset"] > 0 else "behind"
            yield (
                f"the clock is {span(abs(clock['offset']))} {direction} that of"
                f" {names.get(address, address)}: check the time service of both hosts (`timedatectl`)."
            )
    if report["synchronized"] is False:
        yield "the clock is not synchronized: `systemctl enable --now systemd-timesyncd`, or install chrony."


def of_upkeep(variables: Variables, report: Variables) -> Iterator[str]:
    for path, end in sorted(report["certificates"].items()):
        left = end - report["time"]
        if left < limit(variables, CERTIFICATE_DAYS) * 86400:
            what = f"expires in {span(left)}" if left > 0 else f"expired {span(-left)} ago"
            yield (
                f"the certificate {path} {what}: see `systemctl status certbot`, or run"
                " playbooks/nginx_lb.yml with a new one."
            )
    for host in report["drained"]:
        yield f"{host} is drained and gets no requests: playbooks/undrain.yml -e host={host}"


def of_deployment(variables: Variables) -> Iterator[str]:
    """Compare the deployment with the inventory's: the result of a dry run of `pixel_release`."""
    stage = variables.get("__pixel_app_stage", {})
    if stage.get("failed"):
        yield f"the deployment can't be compared with the inventory's: {stage.get('msg', 'no reason given')}"
    elif "warning" in stage:
        names = [each.get("before_header", "") for each in stage.get("diff") or []]
        changed = f" (differs: {', '.join(names)})" if names else ""
        yield (
            f"release {stage['current'] or 'none'} with its settings is not what the inventory and app/"
            f" describe{changed}: playbooks/pixel_app.yml deploys that, --check --diff shows the difference."
        )


def of_versions(reports: Mapping[str, Variables], current: Mapping[str, str]) -> Iterator[str]:
    """Compare versions between hosts."""
    packages = sorted({name for report in reports.values() for name in report["packages"]})
    versions = {
        name: {
            host: report["packages"][name] for host, report in reports.items() if name in report["packages"]
        }
        for name in packages
    }
    for name, found in versions.items():
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{version} on {host}" for host, version in sorted(found.items()))
            yield f"fleet: hosts have different versions of {name} ({listed}): upgrade the older ones."
    if len(set(current.values())) > 1:
        listed = ", ".join(f"{release or 'none'} on {host}" for host, release in sorted(current.items()))
        yield f"fleet: hosts serve different releases ({listed}): playbooks/pixel_app.yml deploys one to all."


def of_balancers(reports: Mapping[str, Variables]) -> Iterator[str]:
    """Compare the balancers: one may have been off when weights were changed with --limit."""
    hosts = [host for host, report in reports.items() if report["backends"]]
    if len({reports[host]["backends"] for host in hosts}) > 1:
        yield (
            f"fleet: {', '.join(hosts)} do not balance by the same backends and weights:"
            " playbooks/nginx_lb.yml gives all of them those of the inventory."
        )


def served_at(entry: Mapping[str, str]) -> float:
    """Return when a release of the history began to serve, in seconds since 1970."""
    return datetime.datetime.fromisoformat(entry["time"]).timestamp()


def of_backup(
    hostvars: Mapping[str, Variables], reports: Mapping[str, Variables], redis: Iterable[str]
) -> Iterator[str]:
    """Judge the age of the newest backup, or how long the fleet has served without one."""
    known = [host for host in redis if host in reports]
    if not known:
        return
    now = max(report["time"] for report in reports.values())
    hours = limit(hostvars[known[0]], BACKUP_HOURS)
    times = [reports[host]["backup"] for host in known if reports[host]["backup"]]
    if times:
        if now - max(times) > hours * 3600:
            yield f"fleet: the newest backup is {span(now - max(times))} old: playbooks/backup.yml"
        return
    history = [
        entry for each in hostvars.values() for entry in each.get("__pixel_app_stage", {}).get("history", [])
    ]
    # A new fleet has a day to make its first backup.
    if history and now - min(map(served_at, history)) > hours * 3600:
        yield "fleet: no backup was ever made: playbooks/backup.yml"


def doctor_findings(hostvars: Mapping[str, Variables], groups: Groups, hosts: Sequence[str]) -> list[str]:
    """Judge the facts of all hosts.

    Args:
        hostvars: Variables of all hosts, with the registered results `__doctor` of module `host_checkup` and
            `__pixel_app_stage` of a dry run of `pixel_release`.
        groups: The inventory's groups.
        hosts: The hosts that were checked.

    Returns:
        Findings, each with the host and what to do.
    """
    groups = {name: names for name, names in groups.items() if name in PACKAGES}
    reports: dict[str, Variables] = {}
    found: list[str] = []
    for host in hosts:
        result = hostvars[host].get("__doctor") or {}
        if "filesystems" in result:
            reports[host] = result
        else:
            reason = " ".join(str(result.get("msg", "no answer")).split())
            found.append(f"{host}: can't be checked: {reason}")
    for host, report in reports.items():
        variables = hostvars[host]
        names = targets(hostvars, groups, host)
        lines: Iterable[Iterator[str]] = (
            of_resources(variables, report),
            of_services(expected_ports(variables, groups), report),
            of_network(names, report),
            of_upkeep(variables, report),
            of_deployment(variables),
        )
        found += [f"{host}: {line}" for part in lines for line in part]
    staged = {host: hostvars[host].get("__pixel_app_stage", {}) for host in reports}
    current = {host: stage["current"] for host, stage in staged.items() if "current" in stage}
    found += [
        *of_versions(reports, current),
        *of_balancers(reports),
        *of_backup(hostvars, reports, member(groups, "redis")),
    ]
    return found


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"doctor_checks": doctor_checks, "doctor_findings": doctor_findings}
