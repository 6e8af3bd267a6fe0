"""The state of a fleet in `.fleet/<name>/` (SSH key and configuration, fleet.json), and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from bootstrap import Problem, run
from engine import Docker
from layout import HOSTS, Fleet, state_directory

LOGIN = "ops"
SOCKETS = "~/.ansible/cp"
"""Where open SSH connections have their sockets; Ansible has its own there."""


@contextlib.contextmanager
def exclusive(fleet: Fleet) -> Iterator[None]:
    """Lock a fleet for one command. The lock file is outside the state directory, which `down` removes."""
    path = fleet.state.with_suffix(".lock")
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(
                f"another command is running on fleet {fleet.name!r}; wait until it ends."
            ) from None
        yield


def remembered(
    name: str, environ: Mapping[str, str], inventory: str | None = None
) -> tuple[str, list[str], dict[str, str]]:
    """Return what a fleet was created with.

    Args:
        name: The fleet's name.
        environ: The environment.
        inventory: `local` or `ha` for a fleet with the hosts of this inventory; by default it keeps its own.

    Returns:
        Its inventory and its hosts, and the environment with its port and subnet added.
    """
    path = state_directory(name) / "fleet.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    created = {
        "PIXEL_FLEET_PORT": facts.get("port", (facts.get("url") or "").rpartition(":")[2]),
        "PIXEL_FLEET_SUBNET": facts.get("subnet", ""),
    }
    given = {variable: value for variable, value in environ.items() if value}
    former = facts.get("inventory", "local")
    inventory = inventory or former
    specs = facts.get("specs") if inventory == former else None
    return inventory, specs or HOSTS[inventory], created | given


def ensure_key(fleet: Fleet) -> str:
    """Return the fleet's public key; replace a missing or damaged key pair."""
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


def write(docker: Docker, fleet: Fleet) -> None:
    """Write known_hosts, ssh_config and fleet.json, which SSH, the inventory and the tests read."""
    config, known = [], []
    for host in fleet.hosts:
        public = docker("exec", fleet.container(host), "cat", "/etc/ssh/ssh_host_ed25519_key.pub")
        known.append(f"[127.0.0.1]:{host.ssh_port} {' '.join(public.stdout.split()[:2])}")
        config += [
            f"Host {host.name} {fleet.container(host)}",
            "  HostName 127.0.0.1",
            f"  Port {host.ssh_port}",
            f"  User {LOGIN}",
            # Quoted, because the repository's path may contain spaces.
            f'  IdentityFile "{fleet.state / "id_ed25519"}"',
            "  IdentitiesOnly yes",
            f'  UserKnownHostsFile "{fleet.state / "known_hosts"}"',
            "  StrictHostKeyChecking yes",
            "  LogLevel ERROR",
            # A new connection takes ten times as long as a command through an open one.
            "  ControlMaster auto",
            f"  ControlPath {SOCKETS}/fleet-%C",
            "  ControlPersist 30",
        ]
    Path(SOCKETS).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = {
        "name": fleet.name,
        "inventory": fleet.inventory,
        "url": fleet.url,
        "port": next((str(host.http_port) for host in fleet.hosts if host.http_port), ""),
        "address": fleet.address,
        "subnet": str(fleet.subnet),
        # Source address of connections from this machine: Docker assigns itself the network's first address.
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
    """Replace a file atomically."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
