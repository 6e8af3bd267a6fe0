"""The local fleet, as its operator has it: commands over SSH, playbooks, and the power switch."""

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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BALANCER = "c5"  # Nginx, Redis and a part of the app
OTHER = "t2"  # the app alone
PATIENCE = 30.0
NOWHERE = "02:00:00:00:00:01"  # nobody's link-layer address


class FleetError(Exception):
    """The fleet did not do what was asked of it; the message says what it said."""


class Flush(NamedTuple):
    """One that took long: Redis waited for its disk, and every write for Redis."""

    end: float  # on the clock of time.monotonic(), at most a second late
    seconds: float


@dataclass(frozen=True)
class Fleet:
    name: str
    url: str
    addresses: Mapping[str, str]
    ssh_ports: Mapping[str, int]

    @classmethod
    def load(cls) -> Fleet:
        """The fleet that `make up` has made."""
        name = os.environ.get("PIXEL_FLEET") or "pixel"
        try:
            facts = json.loads((ROOT / ".fleet" / name / "fleet.json").read_text())
            hosts = {host: facts["hosts"][host] for host in (BALANCER, OTHER)}
        except (OSError, KeyError):
            raise FleetError(
                f"there is no fleet {name!r} with hosts {BALANCER} and {OTHER}:"
                " `make up` makes one, and PIXEL_FLEET names another"
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
        """Runs a playbook; its exit status and its output."""
        program = str(ROOT / ".venv" / "bin" / "ansible-playbook")
        extra = ["--extra-vars", json.dumps(variables)] if variables else []
        return await self._run(program, f"playbooks/{playbook}", *extra, patience=patience)

    async def must_play(self, playbook: str, **variables: Any) -> None:
        """Runs a playbook, which has to succeed."""
        status, output = await self.play(playbook, variables)
        if status != 0:
            raise FleetError(f"{playbook} failed:\n{tail(output, 25)}")

    async def power(self, host: str, state: str) -> None:
        """Cuts a host's power (`off`), or gives it back (`on`) and waits until it has booted."""
        program = str(ROOT / "molecule" / "shared" / "fleet.py")
        status, output = await self._run(
            sys.executable, program, "power", host, state, patience=120
        )
        if status != 0:
            raise FleetError(f"power {host} {state}: {tail(output)}")

    async def throttle(self, host: str, processors: float | None) -> None:
        """Lets a host use so many processors; None for all that there are."""
        program = str(ROOT / "molecule" / "shared" / "fleet.py")
        number = "all" if processors is None else str(processors)
        status, output = await self._run(sys.executable, program, "cpus", host, number, patience=30)
        if status != 0:
            raise FleetError(f"cpus {host} {number}: {tail(output)}")

    async def _run(self, *command: str, patience: float, text: str = "") -> tuple[int, str]:
        """Runs a program, and gives its exit status and all that it said.

        It has a session of its own: a Ctrl-C at the terminal is for the drill alone, which passes
        it on when it is cancelled, so that Ansible ends as it does under an operator's hands.
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
        """Those that Redis remembers since its start: the longest of a second, from 0.1 s on."""
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

    # What is asked of the service

    async def ask(self, path: str) -> Any:
        """A JSON answer of the service, through the balancer."""

        def get() -> Any:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as answer:  # noqa: S310
                return json.load(answer)

        return await asyncio.to_thread(get)

    async def releases(self) -> dict[str, str]:
        """Which release each host says it runs; a host that gets no requests is not among them."""
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
        """What `pixel-lb status` says of each host."""
        status = json.loads(await self.ssh(BALANCER, "pixel-lb status"))
        return {host: status["backends"][host] for host in self.addresses}

    # The network between the two hosts. Frames to an address that nobody has vanish without a
    # word, as in a cable that is cut; how this program reaches the hosts is not touched.

    async def cut(self) -> None:
        for host, peer in ((OTHER, BALANCER), (BALANCER, OTHER)):
            address = self.addresses[peer]
            await self.ssh(
                host, f"ip neigh replace {address} lladdr {NOWHERE} dev eth0 nud permanent"
            )

    async def join(self) -> None:
        for host, peer in ((BALANCER, OTHER), (OTHER, BALANCER)):
            await self.ssh(host, f"ip neigh flush to {self.addresses[peer]} dev eth0 nud permanent")

    # Order

    async def heal(self) -> None:
        """Takes back all that a drill may have left behind; it does no harm where nothing is."""
        for host in (BALANCER, OTHER):
            try:
                await self.ssh(host, "true")
            except FleetError:
                await self.power(host, "on")
            await self.ssh(host, "systemctl kill --signal=CONT pixel.service || true")
        await self.join()
        drained = [
            host
            for host, said in (await self.balancer_status()).items()
            if said["state"] == "drained"
        ]
        for host in drained:
            await self.ssh(BALANCER, f"pixel-lb undrain {host}")


async def end(process: asyncio.subprocess.Process, talking: asyncio.Task[Any]) -> None:
    """Ends what was started, first as Ctrl-C does."""
    for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
        if process.returncode is not None:
            break
        os.killpg(process.pid, number)
        await asyncio.wait([talking], timeout=patience)
    talking.cancel()


def tail(output: str, lines: int = 12) -> str:
    """The end of what a program said."""
    said = output.strip().splitlines()
    return "\n".join(said[-lines:])
