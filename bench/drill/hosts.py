"""Operations on the local fleet: commands over SSH, playbooks, power, network faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.disk import Flush

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BALANCER = "c5"  # runs Nginx, Redis and instances of the app
OTHER = "t2"  # runs only the app
PATIENCE = 30.0
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

    @classmethod
    def load(cls) -> Fleet:
        """Loads the description of the fleet that `make up` has created."""
        name = os.environ.get("PIXEL_FLEET") or "pixel"
        try:
            facts = json.loads((ROOT / ".fleet" / name / "fleet.json").read_text())
            hosts = {host: facts["hosts"][host] for host in (BALANCER, OTHER)}
        except (OSError, KeyError):
            raise FleetError(
                f"there is no fleet {name!r} with hosts {BALANCER} and {OTHER}:"
                " `make up` makes one, PIXEL_FLEET selects another"
            ) from None
        return cls(
            name,
            facts["url"],
            {host: fact["address"] for host, fact in hosts.items()},
            {host: fact["ssh_port"] for host, fact in hosts.items()},
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
        self, playbook: str, variables: Mapping[str, Any] | None = None, patience: float = 300
    ) -> tuple[int, str]:
        """Runs a playbook; returns its exit status and its output."""
        program = str(ROOT / ".venv" / "bin" / "ansible-playbook")
        extra = ["--extra-vars", json.dumps(variables)] if variables else []
        return await self._run(program, f"playbooks/{playbook}", *extra, patience=patience)

    async def must_play(self, playbook: str, **variables: Any) -> None:
        """Runs a playbook; raises FleetError if it fails."""
        status, output = await self.play(playbook, variables)
        if status != 0:
            raise FleetError(f"{playbook} failed:\n{tail(output, 25)}")

    async def power(self, host: str, state: str) -> None:
        """Cuts a host's power (`off`), or starts it (`on`) and waits until it has booted."""
        program = str(ROOT / "fleet" / "fleet.py")
        status, output = await self._run(sys.executable, program, "power", host, state, patience=120)
        if status != 0:
            raise FleetError(f"power {host} {state}: {tail(output)}")

    async def throttle(self, host: str, processors: float | None) -> None:
        """Limits a host to this number of CPUs; None removes the limit."""
        program = str(ROOT / "fleet" / "fleet.py")
        number = "all" if processors is None else str(processors)
        status, output = await self._run(sys.executable, program, "cpus", host, number, patience=30)
        if status != 0:
            raise FleetError(f"cpus {host} {number}: {tail(output)}")

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
        password = (ROOT / ".fleet" / self.name / "credentials" / "redis_admin").read_text().strip()
        said = await self.ssh(
            BALANCER,
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

    # The network between the two hosts. Connections of the drill to them are not affected.

    async def cut(self) -> None:
        """Stops all packets between the hosts, by a wrong link-layer address of each on the other."""
        for host, peer in ((OTHER, BALANCER), (BALANCER, OTHER)):
            address = self.addresses[peer]
            await self.ssh(host, f"ip neigh replace {address} lladdr {NOWHERE} dev eth0 nud permanent")

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

    async def join(self) -> None:
        """Restores the link-layer address of each host on the other."""
        for host, peer in ((BALANCER, OTHER), (OTHER, BALANCER)):
            await self.ssh(host, f"ip neigh flush to {self.addresses[peer]} dev eth0 nud permanent")

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
        for host in (BALANCER, OTHER):
            try:
                await self.ssh(host, "true")
            except FleetError:
                await self.power(host, "on")
            await self.ssh(
                host,
                """
                for unit in pixel.service redis-server.service; do
                    systemctl kill --signal=CONT $unit || true
                done
                """,
            )
        await self.restore_network()
        drained = [
            host for host, said in (await self.balancer_status()).items() if said["state"] == "drained"
        ]
        for host in drained:
            await self.ssh(BALANCER, f"pixel-lb undrain {host}")


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
