"""Operations on the local fleet: commands over SSH, playbooks, power, network faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.disk import Flush

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Of two hosts, c5 runs Nginx, Redis and the app, and t2 only the app. Of three (`inventory/ha`), each
# runs all of them, and c5 has the data master whenever it is available.
BALANCER, OTHER, THIRD = "c5", "t2", "m5"
HOSTS = {"local": (BALANCER, OTHER), "ha": (BALANCER, OTHER, THIRD)}
PATIENCE = 30.0
PLAY_PATIENCE = 900.0
WHOLE_SECONDS = 90.0  # until the cluster is complete and the data master is on its preferred host
# Requests to the fleet never use a proxy from the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
NOWHERE = "02:00:00:00:00:01"  # a link-layer address that no host has
TABLE = "pixel_drill"  # of nftables
DELAY = "pixel-drill-delay"  # a unit


class FleetError(Exception):
    """A command on the fleet failed; the message contains the last lines of its output."""


@dataclass(frozen=True)
class Fleet:
    name: str
    url: str
    addresses: Mapping[str, str]
    ssh_ports: Mapping[str, int]
    inventory: str = "local"

    @property
    def is_cluster(self) -> bool:
        """Whether the fleet has three hosts, any one of which may die."""
        return self.inventory == "ha"

    @classmethod
    def load(cls) -> Fleet:
        """Loads the description of the fleet that `make up` has created."""
        name = os.environ.get("PIXEL_FLEET") or "pixel"
        try:
            facts = json.loads((ROOT / ".fleet" / name / "fleet.json").read_text())
            inventory = facts.get("inventory", "local")
            hosts = {host: facts["hosts"][host] for host in HOSTS[inventory]}
        except (OSError, KeyError):
            raise FleetError(
                f"there is no fleet {name!r} with hosts {BALANCER} and {OTHER}, or these and {THIRD}:"
                " `make up` or `make up FLEET=ha` makes one, PIXEL_FLEET selects another"
            ) from None
        return cls(
            name,
            facts["url"],
            {host: fact["address"] for host, fact in hosts.items()},
            {host: fact["ssh_port"] for host, fact in hosts.items()},
            inventory,
        )

    # Commands

    async def ssh(self, host: str, script: str, patience: float = PATIENCE) -> str:
        """Runs a shell script as root on a host; it stops at the first command that fails."""
        config = ROOT / ".fleet" / self.name / "ssh_config"
        options = ["-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
        status, output = await self._run(
            *("ssh", *options, host, "sudo sh -eu"), text=script, patience=patience
        )
        if status != 0:
            raise FleetError(f"{host}: `{script.strip()}` ended with {status}: {tail(output)}")
        return output

    async def play(
        self, playbook: str, variables: Mapping[str, Any] | None = None, limit: str = ""
    ) -> tuple[int, str]:
        """Runs a playbook, on some hosts if there is a limit; returns its exit status and its output."""
        program = str(ROOT / ".venv" / "bin" / "ansible-playbook")
        options = ["--inventory", f"inventory/{self.inventory}"]
        options += ["--limit", limit] if limit else []
        options += ["--extra-vars", json.dumps(variables)] if variables else []
        return await self._run(program, *options, f"playbooks/{playbook}", patience=PLAY_PATIENCE)

    async def must_play(self, playbook: str, limit: str = "", **variables: Any) -> None:
        """Runs a playbook; raises FleetError if it fails."""
        status, output = await self.play(playbook, variables, limit)
        if status != 0:
            raise FleetError(f"{playbook} failed:\n{tail(output, 25)}")

    async def power(self, state: str, *hosts: str) -> None:
        """Changes the power of hosts; waits until those that are started have booted.

        Args:
            state: `off` (their processes end), `cut` (they also send nothing any more), `freeze`, or
                `on`, which starts or continues them.
            hosts: all change at the same time.
        """
        await self._change("power", *hosts, state, patience=120)

    async def replace(self, host: str) -> None:
        """Puts an empty machine in a host's place."""
        await self._change("replace", host, patience=120)

    async def throttle(self, host: str, processors: float | None) -> None:
        """Limits a host to this number of CPUs; None removes the limit."""
        await self._change("cpus", host, "all" if processors is None else str(processors), patience=30)

    async def _change(self, *command: str, patience: float) -> None:
        """Runs a command of `fleet/fleet.py`."""
        program = str(ROOT / "fleet" / "fleet.py")
        status, output = await self._run(sys.executable, program, *command, patience=patience)
        if status != 0:
            raise FleetError(f"{' '.join(command)}: {tail(output)}")

    async def _run(self, *command: str, patience: float, text: str = "") -> tuple[int, str]:
        """Runs a program; returns its exit status and its output.

        The program runs in its own session, so that Ctrl-C reaches only the drill. If this call is
        cancelled or times out, the program receives SIGINT, as from an operator.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PIXEL_FLEET": self.name, "ANSIBLE_NOCOLOR": "1"},
            start_new_session=True,
        )
        talking = asyncio.create_task(process.communicate(text.encode()))
        try:
            output, _ = await asyncio.wait_for(asyncio.shield(talking), patience)
        except TimeoutError:
            raise FleetError(f"`{' '.join(command[:2])}` took more than {patience} s") from None
        finally:
            if process.returncode is None:
                await end(process, talking)
        return process.returncode or 0, output.decode(errors="replace")

    async def slow_flushes(self) -> list[Flush]:
        """Flushes since the start of Redis that took 0.1 s or more: the longest of each second."""
        hosts = self.addresses if self.is_cluster else [BALANCER]
        return [flush for host in hosts for flush in await self._slow_flushes(host)]

    async def _slow_flushes(self, host: str) -> list[Flush]:
        password = (ROOT / ".fleet" / self.name / "credentials" / "redis_admin").read_text().strip()
        said = await self.ssh(
            host,
            f"""
            export REDISCLI_AUTH={password}
            for event in aof-fsync-always aof-write; do
                redis-cli -e --user admin LATENCY HISTORY $event
            done
            """,
        )
        now = time.monotonic() - time.time()
        numbers = [int(number) for number in said.split()]
        return [
            Flush(now + second + 1, milliseconds / 1000)
            for second, milliseconds in zip(numbers[::2], numbers[1::2], strict=True)
        ]

    # Requests to the service

    async def ask(self, path: str) -> Any:
        """Returns a JSON answer of the service, through the balancer."""

        def get() -> Any:
            with DIRECT.open(f"{self.url}{path}", timeout=5) as answer:
                return json.load(answer)

        return await asyncio.to_thread(get)

    async def releases(self) -> dict[str, str]:
        """Returns the release of each host that answers through the balancer."""
        said: dict[str, str] = {}
        for _ in range(40):
            try:
                answer = await self.ask("/ping")
                said[answer["instance"]] = answer["release"]
            except OSError:
                await asyncio.sleep(0.2)
            if set(said) >= set(self.addresses):
                break
        return said

    async def balancer_status(self) -> dict[str, Any]:
        """Returns the section of each host in `pixel-lb status`."""
        status = json.loads(await self.ssh(BALANCER, "pixel-lb status"))
        return {host: status["backends"][host] for host in self.addresses}

    # The cluster and the balancers' address, of three hosts

    async def cluster_status(self, host: str) -> list[dict[str, Any]]:
        """Returns the Redis processes with their roles, as one host sees them."""
        rows: list[dict[str, Any]] = json.loads(await self.ssh(host, "redis-cluster status"))
        names = {address: name for name, address in self.addresses.items()}
        return [row | {"host": names[row["address"].partition(":")[0]]} for row in rows]

    async def until_whole(self, *away: str) -> None:
        """Waits until all Redis processes but those of hosts that are away have their usual roles."""
        host = next(host for host in self.addresses if host not in away)

        async def lack() -> str:
            return lack_of_cluster(await self.cluster_status(host), away)

        await until(lack, WHOLE_SECONDS)

    async def holders(self) -> list[str]:
        """Returns the balancers that hold the address."""
        hosts = list(self.addresses)
        texts = await asyncio.gather(*(self.ssh(host, "pixel-lb status") for host in hosts))
        return [host for host, text in zip(hosts, texts, strict=True) if json.loads(text)["address"]["held"]]

    async def move_address(self, host: str) -> None:
        """Moves the balancers' address to a host."""

        async def lack() -> str:
            holders = await self.holders()
            return "" if holders == [host] else f"{', '.join(holders) or 'nobody'} holds the address"

        if await lack():
            others = [other for other in self.addresses if other != host]
            await self._on(others, "systemctl stop keepalived")
            await until(lack, PATIENCE)
            await self._on(others, "systemctl start keepalived")

    async def _on(self, hosts: Collection[str], script: str) -> None:
        """Runs a script on several hosts at the same time."""
        await asyncio.gather(*(self.ssh(host, script) for host in hosts))

    # The network between the hosts. Connections of the drill to them are not affected.

    async def cut(self, host: str) -> None:
        """Stops all packets between a host and the others, by wrong link-layer addresses.

        Its keepalived is stopped: the drill's clients are on both sides of the cut, and those of the
        other hosts would follow its announcements of the balancers' address.
        """
        scripts = {peer: self._cut_from(host) for peer in self.addresses if peer != host}
        scripts[host] = self._cut_from(*scripts)
        if self.is_cluster:
            scripts[host] += "\nsystemctl kill --signal=STOP keepalived.service"
        await asyncio.gather(*(self.ssh(name, script) for name, script in scripts.items()))

    def _cut_from(self, *peers: str) -> str:
        return "\n".join(
            f"ip neigh replace {self.addresses[peer]} lladdr {NOWHERE} dev eth0 nud permanent"
            for peer in peers
        )

    async def drop(self, rules: str) -> None:
        """Drops packets on the other host.

        Args:
            rules: nftables rules for packets that leave (`output`) or enter (`input`) the other host.
        """
        chains = "\n".join(
            f"chain {hook} {{ type filter hook {hook} priority -10; {rules} }}"
            for hook in ("input", "output")
        )
        await self.ssh(OTHER, f"nft -f - <<'END'\ntable inet {TABLE} {{\n{chains}\n}}\nEND\n")

    async def delay(self, seconds: float) -> None:
        """Delays all packets from the other host to the balancer's host; see `delayline.py`."""
        address = (await self.ssh(BALANCER, "cat /sys/class/net/eth0/address")).strip()
        program = (HERE / "delayline.py").read_text()
        await self.ssh(
            OTHER,
            f"cat >/run/{DELAY}.py <<'END'\n{program}\nEND\n"
            f"systemd-run --quiet --collect --unit={DELAY} --nice=-10"
            f" python3 /run/{DELAY}.py eth0 {seconds} {NOWHERE} {address}\n"
            "sleep 0.5\n"
            f"ip neigh replace {self.addresses[BALANCER]} lladdr {NOWHERE} dev eth0 nud permanent",
        )

    async def join(self, *hosts: str) -> None:
        """Reverts `cut` on some hosts, or on all."""
        lines = [f"ip neigh flush to {address} dev eth0 nud permanent" for address in self.addresses.values()]
        if self.is_cluster:
            lines.append("systemctl kill --signal=CONT keepalived.service || true")
        await self._on(hosts or self.addresses, "\n".join(lines))

    async def restore_network(self) -> None:
        """Reverts `cut`, `drop` and `delay`; packets that are still held back are lost."""
        await self.join()
        await self.ssh(
            OTHER,
            f"""
            ! nft list table inet {TABLE} >/dev/null 2>&1 || nft delete table inet {TABLE}
            ! systemctl --quiet is-active {DELAY} || systemctl stop {DELAY}
            """,
        )

    # Recovery

    async def heal(self) -> None:
        """Reverts all faults that a drill may have left; a healthy fleet is not changed."""
        await self.throttle(OTHER, None)
        for host in self.addresses:
            try:
                await self.ssh(host, "true")
            except FleetError:
                await self.power("on", host)
            await self.ssh(
                host,
                """
                for unit in pixel.service redis-server.service; do
                    systemctl kill --signal=CONT $unit || true
                done
                """,
            )
        await self.restore_network()
        if self.is_cluster:
            await self._on(self.addresses, "systemctl start keepalived.service redis-cluster.service")
            await self.until_whole()
        drained = [
            host for host, said in (await self.balancer_status()).items() if said["state"] == "drained"
        ]
        for host in drained:
            await self.ssh(BALANCER, f"pixel-lb undrain {host}")


def lack_of_cluster(rows: Sequence[Mapping[str, Any]], away: Collection[str] = ()) -> str:
    """Returns what the cluster lacks, but for hosts that are away; empty if it lacks nothing.

    Args:
        rows: the output of `redis-cluster status`, with the host of each process.
        away: hosts whose processes are ignored. If the preferred one is away, another has the data.
    """
    here = [row for row in rows if row["host"] not in away]
    for row in here:
        if row.get("state") != "ok":
            return f"Redis at {row['address']}: {row.get('error') or row.get('state')}"
    owners = [row["host"] for row in here if row["owns_data"]]
    if len(owners) != 1 or (owners != [BALANCER] and BALANCER not in away):
        return f"the data master is on {' and '.join(owners) or 'no host'}"
    unready = [row["host"] for row in here if not row.get("is_ready", True)]
    return f"the replica on {' and '.join(unready)} is not ready" if unready else ""


async def until(lack: Callable[[], Awaitable[str]], seconds: float) -> None:
    """Waits until nothing is lacking; raises FleetError with what is, after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            missing = await lack()
        except FleetError as error:
            missing = str(error)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise FleetError(f"after {seconds:.0f} s: {missing}")
        await asyncio.sleep(0.5)


async def end(process: asyncio.subprocess.Process, talking: asyncio.Task[Any]) -> None:
    """Stops a program's process group: SIGINT first, then SIGKILL."""
    for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
        if process.returncode is not None:
            break
        os.killpg(process.pid, number)
        await asyncio.wait([talking], timeout=patience)
    talking.cancel()


def tail(output: str, lines: int = 12) -> str:
    """Returns the last lines of a program's output."""
    said = output.strip().splitlines()
    return "\n".join(said[-lines:])
