#!/usr/bin/env python3
"""The local fleet: systemd hosts in containers, reached over SSH like any server.

`make up` and every Molecule scenario create their hosts here, and nowhere else. Only the
standard library and the `docker` command are used, so that this runs before anything is
installed. Everything about one fleet lies in `.fleet/<name>/` of the repository: its key, its
`ssh_config`, and `fleet.json`, from which `inventory/local` reads the addresses.

    fleet.py up                      engine, image, hosts c5 and t2, site.yml, a pixel there and back
    fleet.py create HOST[:SUITE]...  engine, image and these hosts only
    fleet.py power HOST on|off|reboot
    fleet.py cpus HOST NUMBER|all    how many processors a host may use, 0.05 being a twentieth of one
    fleet.py destroy                 hosts, network and state; the image stays for the next fleet
    fleet.py down                    the same, and the images that no other fleet uses

Environment: PIXEL_FLEET (name, default `pixel`), PIXEL_HOST_IMAGE (an image to use instead of
building one), PIXEL_FLEET_PORT (loopback port of the balancer), PIXEL_FLEET_SUBNET (a /24). These
two are remembered until the fleet is removed; another one makes hosts anew, without their data.
PIXEL_FLEET_DATA is a folder of this machine, such as /dev/shm, where each host has one for Redis' data,
which goes with the host; without it the data are in the container.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bootstrap import ROOT, VENV, Problem, as_root, find, install_packages, run, say

RECIPE = Path(__file__).with_name("Containerfile")
DEFAULT_SUITE = "bookworm"
LOGIN = "ops"
# c5.xlarge to t2.xlarge: what the clock speeds are to each other.
CPU_SHARES = {"c5": 1536, "t2": 1024}
BALANCER = "c5"
REDIS_DATA = "/var/lib/redis"
SCARCE_DISK = 3 * 1024**3


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of the fleet. `address` is on the fleet's own network, ports are on loopback."""

    name: str
    suite: str
    address: str
    ssh_port: int
    http_port: int | None
    cpu_shares: int


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The names, ports and addresses that follow from a fleet's name."""

    name: str
    subnet: ipaddress.IPv4Network
    hosts: tuple[Host, ...]
    data: str = ""  # the folder of this machine where Redis' data is kept; none: in the containers

    @property
    def state(self) -> Path:
        return ROOT / ".fleet" / self.name

    @property
    def label(self) -> str:
        return f"pixel.fleet={self.name}"

    @property
    def url(self) -> str | None:
        ports = [host.http_port for host in self.hosts if host.http_port]
        return f"http://127.0.0.1:{ports[0]}" if ports else None

    def container(self, host: Host) -> str:
        return f"{self.name}-{host.name}"


def plan(name: str, host_specs: list[str], environ: Mapping[str, str]) -> Fleet:
    """Derive a fleet from its name; equal names give equal ports, so that a second run finds it."""
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
        raise Problem(
            f"PIXEL_FLEET={name!r} can't name a fleet: use lower-case letters, digits, - and _,"
            " at most 31, beginning with a letter."
        )
    # The default fleet has the ports that the README names; others are spread by their name.
    number = 0 if name == "pixel" else 1 + zlib.crc32(name.encode()) % 199
    http_port = _port(environ.get("PIXEL_FLEET_PORT") or str(8080 + number * 10))
    subnet_text = environ.get("PIXEL_FLEET_SUBNET") or f"172.29.{number}.0/24"
    try:
        subnet = ipaddress.IPv4Network(subnet_text)
        if subnet.prefixlen > 28:
            raise ValueError("it has room for fewer than 14 hosts")
    except ValueError as error:
        raise Problem(
            f"PIXEL_FLEET_SUBNET={subnet_text!r} is no usable network ({error});"
            " write one like 172.29.40.0/24."
        ) from error
    data = environ.get("PIXEL_FLEET_DATA", "")
    if data and not Path(data).is_absolute():
        raise Problem(f"PIXEL_FLEET_DATA={data!r} is no absolute path: write one like /dev/shm.")
    hosts = []
    for index, spec in enumerate(host_specs):
        host, _, suite = spec.partition(":")
        hosts.append(
            Host(
                name=host,
                suite=suite or DEFAULT_SUITE,
                address=str(subnet[10 + index]),
                ssh_port=22000 + number * 10 + index,
                http_port=http_port if host == BALANCER else None,
                cpu_shares=CPU_SHARES.get(host, 1024),
            )
        )
    return Fleet(name=name, subnet=subnet, hosts=tuple(hosts), data=data)


def as_made(name: str, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The hosts that the fleet was made with, and the environment with its port and subnet as defaults."""
    state = ROOT / ".fleet" / name / "fleet.json"
    facts = json.loads(state.read_text()) if state.exists() else {}
    made = {
        "PIXEL_FLEET_PORT": (facts.get("url") or "").rpartition(":")[2],
        "PIXEL_FLEET_SUBNET": facts.get("subnet", ""),
    }
    said = {variable: value for variable, value in environ.items() if value}
    return facts.get("specs", ["c5", "t2"]), made | said


def _port(text: str) -> int:
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise Problem(f"PIXEL_FLEET_PORT={text!r} is no port: write a number from 1024 to 65535.")
    return int(text)


# --- what this machine runs ----------------------------------------------------------------------


class Docker:
    """The engine: found, installed if there is none, started if it doesn't run."""

    def __init__(self) -> None:
        self.command: tuple[str, ...] = ("docker",)

    def __call__(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(*self.command, *args, **options)

    def _answers(self) -> str | None:
        """None if the engine answers this user, otherwise what it said."""
        try:
            done = self("version", "--format", "{{.Server.Version}}", check=False, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if done.returncode == 0 else done.stderr.strip()

    def ensure(self) -> str:
        """Make the engine answer, and say its version and cgroup version."""
        refusal = self._answers()
        if refusal and "permission denied" in refusal:
            self._through_sudo()
            refusal = self._answers()
        if refusal:
            if not find("dockerd") or not find("docker"):
                # Since Debian 13 the client is a package of its own.
                install_packages("docker.io", if_known=("docker-cli",))
            refusal = self._answers()
            if refusal and "permission denied" not in refusal:
                self._start()
                refusal = self._answers()
            if refusal and "permission denied" in refusal:
                self._through_sudo()
                refusal = self._answers()
        if refusal:
            raise Problem(f"the Docker engine doesn't answer: {refusal}")
        return self("info", "--format", "{{.ServerVersion}}, cgroup v{{.CgroupVersion}}").stdout.strip()

    def _through_sudo(self) -> None:
        if os.geteuid() == 0 or not shutil.which("sudo"):
            raise Problem(
                "you may not use Docker: add yourself to its group"
                " (`sudo usermod -aG docker $USER`, then log in again), or run this as root."
            )
        self.command = ("sudo", "docker")

    def _start(self) -> None:
        say("starting the Docker engine")
        if Path("/run/systemd/system").is_dir():
            run(*as_root("systemctl", "enable", "--now", "docker.service"))
            return
        for pid_file in (Path("/var/run/docker.pid"), Path("/var/run/docker/containerd/containerd.pid")):
            _drop_stale(pid_file)
        # No service manager: the engine is started as a process of its own, which outlives us.
        log = ROOT / ".fleet" / "dockerd.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            engine = subprocess.Popen(
                as_root("dockerd"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
            )
        for _ in range(120):
            refusal = self._answers()
            if refusal is None or "permission denied" in refusal:
                return
            if engine.poll() is not None:
                break
            time.sleep(0.5)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise Problem(f"dockerd did not start; the end of {log}:\n{tail}")


def _drop_stale(pid_file: Path) -> None:
    """Remove a pid file whose process is gone or is something else."""
    try:
        pid = pid_file.read_text().strip()
    except OSError:
        return
    try:
        name = Path("/proc", pid, "comm").read_text().strip()
    except OSError:
        name = ""
    if name not in ("dockerd", "containerd"):
        run(*as_root("rm", "-f", str(pid_file)))


# --- the host image ------------------------------------------------------------------------------


def ensure_image(docker: Docker, suite: str) -> str:
    """The tag of a bootable image of this Debian suite, made if it isn't there."""
    own = os.environ.get("PIXEL_HOST_IMAGE")
    if own:
        if docker("image", "inspect", own, check=False).returncode != 0:
            say(f"pulling {own}")
            docker("pull", own)
        return own
    recipe = hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:12]
    tag = f"pixel-host:{suite}-{recipe}"
    images = ROOT / ".fleet" / "images.lock"
    images.parent.mkdir(exist_ok=True)
    with images.open("w") as lock:
        # Two fleets may want it at the same time: the second waits, and finds it there.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if docker("image", "inspect", tag, check=False).returncode == 0:
            return tag
        enough_disk(docker)
        base = _base_image(docker, suite)
        say(f"building {tag}")
        build = ("--build-arg", f"BASE={base}", "--tag", tag, str(RECIPE.parent))
        docker("build", "--file", str(RECIPE), *build)
    return tag


def _base_image(docker: Docker, suite: str) -> str:
    """A minimal Debian: from this machine's own apt sources, or else the public image."""
    public = f"debian:{suite}-slim"
    sources = _apt_sources(suite)
    if not sources:
        return public
    base = f"pixel-base:{suite}"
    if docker("image", "inspect", base, check=False).returncode == 0:
        return base
    try:
        _bootstrap(docker, suite, sources, base)
    except Problem as problem:
        say(f"no mmdebstrap here, so the public image {public} is taken: {problem}")
        return public
    return base


def _bootstrap(docker: Docker, suite: str, sources: list[str], base: str) -> None:
    if not shutil.which("mmdebstrap"):
        install_packages("mmdebstrap")
    say(f"bootstrapping Debian {suite} from this machine's apt sources")
    scratch = ROOT / ".fleet" / "bootstrap"
    # What an interrupted run left; it belongs to root where that one used sudo.
    run(*as_root("rm", "-rf", str(scratch)))
    scratch.mkdir(parents=True)
    archive = scratch / f"{suite}.tar"
    try:
        run(
            *as_root("mmdebstrap", "--variant=minbase", "--include=ca-certificates", suite),
            *(str(archive), "-"),
            stdin="\n".join(sources) + "\n",
        )
        docker("import", str(archive), base)
    finally:
        run(*as_root("rm", "-rf", str(scratch)))


def _apt_sources(suite: str) -> list[str]:
    """This machine's Debian sources, rewritten for the suite; none where it isn't Debian."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    own_suite = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID") != "debian" or not own_suite or not shutil.which("apt-get"):
        return []
    listing = run(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    )
    lines = set()
    for entry in listing.stdout.splitlines():
        if len(fields := entry.split()) != 3:
            continue  # A flat repository has no component; Debian's own ones have.
        uri, release_name, component = fields
        pocket = release_name.removeprefix(own_suite)
        if pocket in ("", "-updates", "-security") and component == "main":
            lines.add(f"deb {uri} {suite}{pocket} main")
    return sorted(lines)


def enough_disk(docker: Docker) -> None:
    """Stop early where an image or a host wouldn't fit."""
    root = docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    for folder in (root, str(ROOT)):
        free = shutil.disk_usage(folder).free
        if free < SCARCE_DISK:
            raise Problem(
                f"only {free / 1024**3:.1f} GiB are free under {folder}, 3 GiB are needed:"
                " free some (`docker system prune` removes what no container uses)."
            )


# --- hosts ---------------------------------------------------------------------------------------


def create(docker: Docker, fleet: Fleet) -> None:
    """Bring the hosts up; what is there and right is left alone, what is half there is healed."""
    fleet.state.mkdir(parents=True, exist_ok=True)
    images = {suite: ensure_image(docker, suite) for suite in {host.suite for host in fleet.hosts}}
    _drop_strangers(docker, fleet)
    _ensure_network(docker, fleet)
    key = _ensure_key(fleet)
    for host in fleet.hosts:
        _ensure_container(docker, fleet, host, images[host.suite])
    for host in fleet.hosts:
        _wait_for_boot(docker, fleet, host)
        _admit(docker, fleet, host, key)
    _write_state(docker, fleet)
    for host in fleet.hosts:
        _wait_for_ssh(fleet, host)


def _containers(docker: Docker, fleet: Fleet) -> list[str]:
    listing = docker("ps", "--all", "--filter", f"label={fleet.label}", "--format", "{{.Names}}")
    return listing.stdout.split()


def _drop_strangers(docker: Docker, fleet: Fleet) -> None:
    """Remove this fleet's containers that the plan doesn't know (an earlier plan's)."""
    wanted = {fleet.container(host) for host in fleet.hosts}
    for name in _containers(docker, fleet):
        if name not in wanted:
            _remove(docker, name, "the fleet is to have no such host")


def _remove(docker: Docker, name: str, why: str) -> None:
    say(f"removing {name} and the data on it: {why}")
    _remove_container(docker, name)


def _remove_container(docker: Docker, name: str) -> None:
    mounts = json.loads(docker("inspect", name, "--format", "{{json .Mounts}}").stdout or "[]")
    docker("rm", "--force", "--volumes", name)
    for mount in mounts:
        if mount["Destination"] == REDIS_DATA:
            run(*as_root("rm", "--recursive", "--force", mount["Source"]))


def _not_ours(what: str) -> Problem:
    return Problem(f"there is a {what} that isn't this fleet's; name the fleet otherwise: PIXEL_FLEET=other")


def _ensure_network(docker: Docker, fleet: Fleet) -> None:
    wanted = '{{index .Labels "pixel.fleet"}} {{range .IPAM.Config}}{{.Subnet}}{{end}}'
    found = docker("network", "inspect", fleet.name, "--format", wanted, check=False)
    if found.returncode == 0:
        owner, _, subnet = found.stdout.strip("\n").partition(" ")
        if owner != fleet.name:
            raise _not_ours(f"network {fleet.name}")
        if subnet == str(fleet.subnet):
            return
        for name in _containers(docker, fleet):
            _remove(docker, name, f"its network is {subnet}, and is to be {fleet.subnet}")
        docker("network", "rm", fleet.name)
    made = docker(
        *("network", "create", "--label", fleet.label, "--subnet", str(fleet.subnet), fleet.name),
        check=False,
    )
    if made.returncode != 0:
        raise Problem(
            f"no network {fleet.subnet} for the fleet: {made.stderr.strip()}\n"
            "Name a free one: PIXEL_FLEET_SUBNET=172.29.200.0/24"
        )


def _ensure_key(fleet: Fleet) -> str:
    """The fleet's public key; a lost or half-written pair is made anew."""
    private = fleet.state / "id_ed25519"
    public = fleet.state / "id_ed25519.pub"
    if private.exists():
        derived = run("ssh-keygen", "-y", "-P", "", "-f", str(private), check=False)
        if derived.returncode == 0:
            public.write_text(derived.stdout)
            return derived.stdout.strip()
    private.unlink(missing_ok=True)
    public.unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"fleet {fleet.name}", "-f", str(private))
    return public.read_text().strip()


def _ensure_container(docker: Docker, fleet: Fleet, host: Host, image: str) -> None:
    name = fleet.container(host)
    publish = ["--publish", f"127.0.0.1:{host.ssh_port}:22"]
    if host.http_port:
        publish += ["--publish", f"127.0.0.1:{host.http_port}:80"]
    arguments = [
        *("--hostname", host.name, "--network", fleet.name, "--ip", host.address),
        *("--cpu-shares", str(host.cpu_shares), *publish),
        # What systemd and its sandboxes need (SYS_PTRACE: ProtectProc= together with PrivateUsers=);
        # the same on cgroup v1 and v2, and no --privileged.
        *("--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE"),
        *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
        *("--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
        *(("--volume", f"{fleet.data}/{name}:{REDIS_DATA}") if fleet.data else ()),
        *("--tmpfs", "/run", "--tmpfs", "/run/lock", image),
        # Mounts that systemd makes for a unit (its credentials) must be seen by the unit.
        *("sh", "-c", "mount --make-rshared / && exec /sbin/init"),
    ]
    spec = hashlib.sha256("\n".join([*arguments, str(fleet.subnet)]).encode()).hexdigest()[:16]
    found = docker(
        "container",
        "inspect",
        name,
        "--format",
        '{{index .Config.Labels "pixel.fleet"}} {{index .Config.Labels "pixel.spec"}}'
        " {{.State.Status}} {{.Config.Image}}"
        "{{range .HostConfig.PortBindings}}{{range .}} {{.HostPort}}{{end}}{{end}}",
        check=False,
    )
    held: list[str] = []
    if found.returncode == 0:
        owner, have, status, old_image, *held = found.stdout.strip("\n").split(" ")
        if owner != fleet.name:
            raise _not_ours(f"container {name}")
        if have == spec and status == "running":
            return
        if have == spec and status == "exited":
            _ports_free(host)
            docker("start", name)
            return
        if status not in ("running", "paused"):
            held = []  # A stopped one holds none.
    # Before what is there is removed: its data shall not go for nothing.
    enough_disk(docker)
    _ports_free(host, held)
    if found.returncode == 0:
        if have == spec:
            why = f"it is {status}"
        elif old_image != image:
            why = f"its image is {old_image}, and is to be {image}"
        else:
            why = "it is to have another port, address or option"
        _remove(docker, name, f"{why}; it is made anew")
    labels = ("--label", fleet.label, "--label", f"pixel.spec={spec}")
    docker("run", "--detach", "--name", name, *labels, *arguments)


def _ports_free(host: Host, held: Collection[str] = ()) -> None:
    """Stop if a port is taken by another than the container that there is, which holds some."""
    for port, other in (
        (host.http_port, f"PIXEL_FLEET_PORT=8081 (which makes {host.name} anew, without its data)"),
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
                    f" stop what listens there (`ss -ltnp sport = :{port}` shows it),"
                    f" or choose another with {other}"
                ) from error


def _wait_for_boot(docker: Docker, fleet: Fleet, host: Host) -> None:
    name = fleet.container(host)
    state = ""
    for _ in range(120):
        done = docker("exec", name, "systemctl", "is-system-running", check=False)
        state = done.stdout.strip() or done.stderr.strip()
        if state in ("running", "degraded"):
            return
        time.sleep(0.5)
    logs = docker("logs", "--tail", "15", name, check=False)
    raise Problem(f"{host.name} did not boot (systemd says {state!r}):\n{logs.stdout}{logs.stderr}")


def _admit(docker: Docker, fleet: Fleet, host: Host, key: str) -> None:
    """Let our key in."""
    script = (
        f"install -d -m 0700 -o {LOGIN} -g {LOGIN} /home/{LOGIN}/.ssh"
        f" && cat >/home/{LOGIN}/.ssh/authorized_keys"
        f" && chown {LOGIN}:{LOGIN} /home/{LOGIN}/.ssh/authorized_keys"
        f" && chmod 0600 /home/{LOGIN}/.ssh/authorized_keys"
    )
    docker("exec", "--interactive", fleet.container(host), "sh", "-c", script, stdin=key + "\n")


def _write_state(docker: Docker, fleet: Fleet) -> None:
    config, known = [], []
    for host in fleet.hosts:
        public = docker("exec", fleet.container(host), "cat", "/etc/ssh/ssh_host_ed25519_key.pub")
        known.append(f"[127.0.0.1]:{host.ssh_port} {' '.join(public.stdout.split()[:2])}")
        config += [
            f"Host {host.name} {fleet.container(host)}",
            "  HostName 127.0.0.1",
            f"  Port {host.ssh_port}",
            f"  User {LOGIN}",
            f"  IdentityFile {fleet.state / 'id_ed25519'}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {fleet.state / 'known_hosts'}",
            "  StrictHostKeyChecking yes",
            "  LogLevel ERROR",
        ]
    facts = {
        "name": fleet.name,
        "url": fleet.url,
        "subnet": str(fleet.subnet),
        # By which this machine comes to the hosts: an engine takes the first address for itself.
        "gateway": str(fleet.subnet[1]),
        "specs": [f"{host.name}:{host.suite}" for host in fleet.hosts],
        "hosts": {
            host.name: {
                "address": host.address,
                "ssh_port": host.ssh_port,
                "container": fleet.container(host),
            }
            for host in fleet.hosts
        },
    }
    _replace(fleet.state / "known_hosts", "\n".join(known) + "\n")
    _replace(fleet.state / "ssh_config", "\n".join(config) + "\n")
    _replace(fleet.state / "fleet.json", json.dumps(facts, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all."""
    half = path.with_suffix(".new")
    half.write_text(text)
    half.replace(path)


def _wait_for_ssh(fleet: Fleet, host: Host) -> None:
    command = ("ssh", "-F", str(fleet.state / "ssh_config"), "-o", "BatchMode=yes", host.name, "true")
    for _ in range(40):
        done = run(*command, check=False, timeout=30)
        if done.returncode == 0:
            return
        time.sleep(0.5)
    raise Problem(f"no SSH to {host.name}: {done.stderr.strip()}\nTry: {' '.join(command)}")


def power(docker: Docker, fleet: Fleet, host: Host, state: str) -> None:
    """Cut a host's power, give it back, or reboot it. `on` and `reboot` wait for the boot."""
    name = fleet.container(host)
    if state == "off":
        docker("kill", name)
        return
    docker("restart" if state == "reboot" else "start", name)
    _wait_for_boot(docker, fleet, host)
    _wait_for_ssh(fleet, host)


def cpus(docker: Docker, fleet: Fleet, host: Host, number: float | None) -> None:
    """Throttle a host to so many processors, or to none fewer than there are."""
    docker("update", "--cpus", str(number or os.cpu_count()), fleet.container(host))


def destroy(docker: Docker, fleet: Fleet) -> None:
    """Remove the fleet's containers, network and state; nothing of another fleet."""
    for name in _containers(docker, fleet):
        _remove_container(docker, name)
    networks = docker("network", "ls", "--filter", f"label={fleet.label}", "--format", "{{.Name}}")
    for name in networks.stdout.split():
        docker("network", "rm", name)
    shutil.rmtree(fleet.state, ignore_errors=True)


def drop_images(docker: Docker) -> None:
    """Remove the host images; Docker keeps those that another fleet's hosts run on."""
    for repository in ("pixel-host", "pixel-base"):
        for tag in docker("images", "--format", "{{.Repository}}:{{.Tag}}", repository).stdout.split():
            docker("rmi", tag, check=False)


# --- the first pixel -----------------------------------------------------------------------------


def deploy(fleet: Fleet) -> None:
    """Run site.yml as a user would; its output is the user's to see."""
    environment = os.environ | {"PIXEL_FLEET": fleet.name}
    playbook = VENV / "bin" / "ansible-playbook"
    done = subprocess.run([playbook, "site.yml"], cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise Problem("site.yml failed; mend what it says above and run `make up` again.")


def first_pixel(fleet: Fleet) -> str:
    """Post a pixel through the balancer and read it from another host than the one that took it."""
    assert fleet.url
    pixel = {"x": 10, "y": 20, "channel": "R", "value": 255}
    body = json.dumps(pixel).encode()
    request = urllib.request.Request(
        f"{fleet.url}/pixel", data=body, headers={"Content-Type": "application/json"}
    )
    writer, answer = _ask(request)
    if json.loads(answer) != {"status": "ok", "received": pixel}:
        raise Problem(f"POST /pixel answered {answer}")
    # By the other's own path: an open event stream has a say in whose turn it is.
    other = next(host.name for host in fleet.hosts if not f"{writer}-".startswith(f"{host.name}-"))
    reader, answer = _ask(urllib.request.Request(f"{fleet.url}/cluster/{other}/pixel/10/20"))
    if json.loads(answer)["R"] != 255:
        raise Problem(f"written through {writer}, but {reader} reads {answer}")
    return f"POST /pixel written by {writer}, read from {reader}: {answer}"


def _ask(request: urllib.request.Request) -> tuple[str, str]:
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.headers["X-Pixel-Instance"], response.read().decode()
    except urllib.error.HTTPError as error:
        raise Problem(f"{request.full_url} answered {error.code}: {error.read().decode()}") from error
    except OSError as error:
        raise Problem(f"{request.full_url}: {error}") from error


# --- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(fleet: Fleet) -> Iterator[None]:
    """One command at a time per fleet. The lock lies beside the state, which `down` removes."""
    path = fleet.state.with_suffix(".lock")
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another command works on fleet {fleet.name!r}; wait for it to end.") from None
        yield


def up(docker: Docker, fleet: Fleet) -> None:
    names = ", ".join(host.name for host in fleet.hosts)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("Docker engine", docker.ensure),
        (f"host image and hosts {names}", lambda: create(docker, fleet)),
        ("ansible-playbook site.yml", lambda: deploy(fleet)),
        ("first pixel", lambda: first_pixel(fleet)),
    ]
    for number, (title, step) in enumerate(steps, start=1):
        say(f"[{number}/{len(steps)}] {title}")
        result = step()
        if result:
            say(f"      {result}")
    prefix = "" if fleet.name == "pixel" else f"PIXEL_FLEET={fleet.name} "
    hosts = "\n".join(
        f"  {host.name}   {host.address}   ssh -F .fleet/{fleet.name}/ssh_config {host.name}"
        for host in fleet.hosts
    )
    print(f"""
The fleet is up.

  API  {fleet.url}/pixel      documentation  {fleet.url}/docs
{hosts}

Try:
  curl -X POST {fleet.url}/pixel -H 'Content-Type: application/json' \\
       -d '{{"x":10,"y":20,"channel":"R","value":255}}'
  curl {fleet.url}/pixel/10/20
  {prefix}.venv/bin/ansible-playbook site.yml     deploy again
  {prefix}make down                               remove the fleet
""")


def main() -> None:
    parser = argparse.ArgumentParser(description="The local fleet of test hosts.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="everything from the engine to the first pixel")
    creating = commands.add_parser("create", help="these hosts only")
    creating.add_argument("hosts", nargs="+", metavar="HOST[:SUITE]")
    switching = commands.add_parser("power", help="cut, give back, or cycle a host's power")
    switching.add_argument("host")
    switching.add_argument("state", choices=("on", "off", "reboot"))
    throttling = commands.add_parser("cpus", help="how many processors a host may use")
    throttling.add_argument("host")
    throttling.add_argument("number", type=_processors, metavar="NUMBER|all")
    commands.add_parser("destroy", help="remove hosts, network and state")
    commands.add_parser("down", help="destroy, and remove unused host images")
    args = parser.parse_args()

    docker = Docker()
    name = os.environ.get("PIXEL_FLEET") or "pixel"
    try:
        hosts, environ = as_made(name, os.environ)
        fleet = plan(name, getattr(args, "hosts", None) or hosts, environ)
        with alone(fleet):
            if args.command in ("destroy", "down") and not find("docker") and not find("dockerd"):
                shutil.rmtree(fleet.state, ignore_errors=True)
                say("there is no Docker here, so there is no fleet to remove")
                return
            if args.command == "up":
                up(docker, fleet)
                return
            docker.ensure()
            if args.command == "create":
                create(docker, fleet)
            elif args.command == "power":
                power(docker, fleet, _named(fleet, args.host), args.state)
            elif args.command == "cpus":
                cpus(docker, fleet, _named(fleet, args.host), args.number)
            else:
                destroy(docker, fleet)
                if args.command == "down":
                    drop_images(docker)
                    say(f"fleet {name} is gone; .venv and the Docker engine stay")
    except (Problem, OSError, subprocess.TimeoutExpired) as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        fail("interrupted; run it again to go on from here, or `make down` to remove what is there.")


def _named(fleet: Fleet, name: str) -> Host:
    hosts = {host.name: host for host in fleet.hosts}
    if name not in hosts:
        raise Problem(f"fleet {fleet.name} has no host {name!r}; it has {', '.join(hosts)}.")
    return hosts[name]


def _processors(text: str) -> float | None:
    """A number of processors that this machine has; None for all of them."""
    if text == "all":
        return None
    number = float(text)
    if not 0.01 <= number <= (os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"{text} is not 0.01 to {os.cpu_count()}, nor all")
    return number


def fail(text: str) -> NoReturn:
    print(f"fleet: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
