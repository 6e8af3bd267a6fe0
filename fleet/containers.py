"""The hosts of a fleet: their containers and their network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection

import state
from bootstrap import Problem, as_root, run, say
from engine import Docker, require_disk_space, wait_until
from image import ensure_image
from layout import Fleet, Host

REDIS_DATA = "/var/lib/redis"


def create(docker: Docker, fleet: Fleet) -> None:
    """Start the hosts. Hosts that exist as planned stay as they are; others are started or replaced."""
    fleet.state.mkdir(parents=True, exist_ok=True)
    images = {suite: ensure_image(docker, suite) for suite in {host.suite for host in fleet.hosts}}
    planned = {fleet.container(host) for host in fleet.hosts}
    for name in _names(docker, fleet):
        if name not in planned:
            _replace(docker, name, "it is no longer a host of the fleet")
    ensure_network(docker, fleet)
    for host in fleet.hosts:
        ensure_container(docker, fleet, host, images[host.suite])
    _let_in(docker, fleet, fleet.hosts)


def replace(docker: Docker, fleet: Fleet, host: Host) -> None:
    """Replace a host with an empty one."""
    image = ensure_image(docker, host.suite)
    _replace(docker, fleet.container(host), "an empty host takes its place")
    ensure_container(docker, fleet, host, image)
    _let_in(docker, fleet, [host])


def _let_in(docker: Docker, fleet: Fleet, hosts: Collection[Host]) -> None:
    """Authorize the fleet's SSH key on new hosts, and wait until they can be reached."""
    key = state.ensure_key(fleet)
    for host in hosts:
        _wait_for_boot(docker, fleet, host)
        _authorize(docker, fleet, host, key)
    state.write(docker, fleet)
    for host in hosts:
        _wait_for_ssh(fleet, host)


def power(docker: Docker, fleet: Fleet, hosts: Collection[Host], action: str) -> None:
    """Change the power of hosts.

    Args:
        docker: The engine.
        fleet: The fleet.
        hosts: Its hosts that change at the same time.
        action: `off` kills all processes, and the kernel closes their connections. `cut` does so after the
            network, as by a power cut: no packet tells the peers. `freeze` stops the processes. `on` starts
            or continues hosts, `reboot` restarts them; both wait for the boot.
    """
    names = [fleet.container(host) for host in hosts]
    match action:
        case "cut":
            for name in names:
                docker("exec", name, "ip", "link", "set", "eth0", "down")
            docker("kill", *names)
        case "off":
            docker("kill", *names)
        case "freeze":
            docker("pause", *names)
        case "on":
            for name in _names(docker, fleet, "status=paused"):
                if name in names:
                    docker("unpause", name)
            docker("start", *names)
        case "reboot":
            docker("restart", *names)
    if action in ("on", "reboot"):
        for host in hosts:
            _wait_for_boot(docker, fleet, host)
            _wait_for_ssh(fleet, host)


def limit_cpus(docker: Docker, fleet: Fleet, host: Host, number: float | None) -> None:
    """Limit how many processors a host may use; None removes the limit."""
    docker("update", "--cpus", str(number or os.cpu_count()), fleet.container(host))


def destroy(docker: Docker, fleet: Fleet) -> None:
    """Remove the fleet's containers, network and state, and nothing of other fleets."""
    for name in _names(docker, fleet):
        _remove(docker, name)
    networks = docker("network", "ls", "--filter", f"label={fleet.label}", "--format", "{{.Name}}")
    for name in networks.stdout.split():
        docker("network", "rm", name)
    shutil.rmtree(fleet.state, ignore_errors=True)


def _names(docker: Docker, fleet: Fleet, *filters: str) -> list[str]:
    """Return the names of the fleet's containers, or of those that pass filters of `docker ps`."""
    options = [word for each in (f"label={fleet.label}", *filters) for word in ("--filter", each)]
    return docker("ps", "--all", *options, "--format", "{{.Names}}").stdout.split()


def _replace(docker: Docker, name: str, reason: str) -> None:
    say(f"removing {name} and the data on it: {reason}")
    _remove(docker, name)


def _remove(docker: Docker, name: str) -> None:
    mounts = json.loads(docker("inspect", name, "--format", "{{json .Mounts}}").stdout or "[]")
    docker("rm", "--force", "--volumes", name)
    for mount in mounts:
        if mount["Destination"] == REDIS_DATA:
            run(*as_root("rm", "--recursive", "--force", mount["Source"]))


def _foreign(what: str) -> Problem:
    return Problem(f"{what} exists and is not part of this fleet; use another name: PIXEL_FLEET=other")


def ensure_network(docker: Docker, fleet: Fleet) -> None:
    """Create the fleet's network; replace one with another subnet."""
    fields = '{{index .Labels "pixel.fleet"}} {{range .IPAM.Config}}{{.Subnet}}{{end}}'
    found = docker("network", "inspect", fleet.name, "--format", fields, check=False)
    if found.returncode == 0:
        owner, _, subnet = found.stdout.strip("\n").partition(" ")
        if owner != fleet.name:
            raise _foreign(f"network {fleet.name}")
        if subnet == str(fleet.subnet):
            return
        for name in _names(docker, fleet):
            _replace(docker, name, f"the subnet changes from {subnet} to {fleet.subnet}")
        docker("network", "rm", fleet.name)
    arguments = ("--label", fleet.label, "--subnet", str(fleet.subnet), fleet.name)
    created = docker("network", "create", *arguments, check=False)
    if created.returncode != 0:
        raise Problem(
            f"network {fleet.subnet} can't be created: {created.stderr.strip()}\n"
            "Choose a free subnet: PIXEL_FLEET_SUBNET=172.29.200.0/24"
        )


def ensure_container(docker: Docker, fleet: Fleet, host: Host, image: str) -> None:
    """Make sure that a host's container runs: start it, or replace it if its image or options changed."""
    name = fleet.container(host)
    arguments = [*_options(fleet, host), image, *_COMMAND]
    spec = hashlib.sha256("\n".join([*arguments, str(fleet.subnet)]).encode()).hexdigest()[:16]
    fields = (
        '{{index .Config.Labels "pixel.fleet"}} {{index .Config.Labels "pixel.spec"}}'
        " {{.State.Status}} {{.Config.Image}}"
        "{{range .HostConfig.PortBindings}}{{range .}} {{.HostPort}}{{end}}{{end}}"
    )
    found = docker("container", "inspect", name, "--format", fields, check=False)
    reason, held = "", []
    if found.returncode == 0:
        owner, old_spec, status, old_image, *held = found.stdout.strip("\n").split(" ")
        if owner != fleet.name:
            raise _foreign(f"container {name}")
        if old_spec == spec and status == "running":
            return
        if old_spec == spec and status == "exited":
            require_ports(host)
            docker("start", name)
            return
        if status not in ("running", "paused"):
            held = []  # A stopped container holds no port.
        if old_spec == spec:
            reason = f"it is {status}"
        elif old_image != image:
            reason = f"its image changes from {old_image} to {image}"
        else:
            reason = "its port, address or another option changes"
    # Check these before the container and its data are removed.
    require_disk_space(docker)
    require_ports(host, held)
    if reason:
        _replace(docker, name, f"{reason}; a new one is created")
    labels = ("--label", fleet.label, "--label", f"pixel.spec={spec}")
    docker("run", "--detach", "--name", name, *labels, *arguments)


# Shared mount propagation makes the mounts of systemd (a unit's credentials) visible to the unit.
_COMMAND = ("sh", "-c", "mount --make-rshared / && exec /sbin/init")


def _options(fleet: Fleet, host: Host) -> list[str]:
    return [
        *("--hostname", host.name, "--network", fleet.name, "--ip", host.address),
        *("--cpu-shares", str(host.cpu_shares)),
        *("--publish", f"127.0.0.1:{host.ssh_port}:22"),
        *(("--publish", f"127.0.0.1:{host.http_port}:80") if host.http_port else ()),
        # Needed by systemd and its sandboxes, on cgroup v1 and v2, without --privileged.
        # SYS_PTRACE is for ProtectProc= together with PrivateUsers=.
        *("--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE"),
        *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
        *("--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
        *(("--volume", f"{fleet.data}/{fleet.container(host)}:{REDIS_DATA}") if fleet.data else ()),
        # So that a reboot from within starts it again; `docker kill` and `stop` do not.
        *("--restart", "unless-stopped"),
        *("--tmpfs", "/run", "--tmpfs", "/run/lock"),
    ]


def require_ports(host: Host, held: Collection[str] = ()) -> None:
    """Raise `Problem` if a port is in use, except those of the host's own container."""
    for port, other in (
        (host.http_port, f"PIXEL_FLEET_PORT=8081 (this replaces {host.name} and its data)"),
        (host.ssh_port, "PIXEL_FLEET=other"),
    ):
        if port is None or str(port) in held:
            continue
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Problem(
                    f"port {port} on 127.0.0.1, which {host.name} needs, is taken ({error.strerror}):"
                    f" stop the program that listens there (`ss -ltnp sport = :{port}` shows it),"
                    f" or choose another port with {other}"
                ) from error


def _wait_for_boot(docker: Docker, fleet: Fleet, host: Host) -> None:
    name = fleet.container(host)
    status = ""

    def booted() -> bool:
        nonlocal status
        done = docker("exec", name, "systemctl", "is-system-running", check=False)
        status = done.stdout.strip() or done.stderr.strip()
        return status in ("running", "degraded")

    if not wait_until(booted, seconds=60):
        logs = docker("logs", "--tail", "15", name, check=False)
        raise Problem(f"{host.name} did not boot (systemd: {status!r}):\n{logs.stdout}{logs.stderr}")


def _wait_for_ssh(fleet: Fleet, host: Host) -> None:
    ssh = ("ssh", "-F", str(fleet.state / "ssh_config"))
    # A host that lost its power has not closed its former connection.
    run(*ssh, "-O", "exit", host.name, check=False)
    command = (*ssh, "-o", "BatchMode=yes", host.name, "true")
    if not wait_until(lambda: run(*command, check=False, timeout=30).returncode == 0, seconds=20):
        done = run(*command, check=False, timeout=30)
        raise Problem(f"no SSH to {host.name}: {done.stderr.strip()}\nTry: {' '.join(command)}")


def _authorize(docker: Docker, fleet: Fleet, host: Host, key: str) -> None:
    """Authorize the fleet's SSH key on a host."""
    home = f"/home/{state.LOGIN}/.ssh"
    script = (
        f"install -d -m 0700 -o {state.LOGIN} -g {state.LOGIN} {home}"
        f" && install -m 0600 -o {state.LOGIN} -g {state.LOGIN} /dev/stdin {home}/authorized_keys"
    )
    docker("exec", "--interactive", fleet.container(host), "sh", "-c", script, stdin=key + "\n")
