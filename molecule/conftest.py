"""Fixtures of all scenarios: fleet facts, playbook runs, clients, and the hosts' journals after a failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra

from bench.load.follower import Follower

ROOT = Path(__file__).resolve().parents[1]

# Molecule enables colours on a terminal; the tests parse the playbooks' output, so turn them off.
os.environ.pop("ANSIBLE_FORCE_COLOR", None)
os.environ["ANSIBLE_NOCOLOR"] = "1"
# A shell lets its background jobs ignore Ctrl-C, and tests send it to programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def state() -> Path:
    """The state directory of this scenario's fleet."""
    return ROOT / ".fleet" / os.environ["PIXEL_FLEET"]


@pytest.fixture(scope="session")
def fleet(state: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((state / "fleet.json").read_text())
    return facts


@pytest.fixture(scope="session")
def hosts(fleet: dict[str, Any], state: Path) -> dict[str, Any]:
    """All hosts by name, for tests that change all of them."""
    options = {"ssh_config": str(state / "ssh_config"), "sudo": True}
    return {name: testinfra.get_host(f"ssh://{name}", **options) for name in fleet["hosts"]}


@pytest.fixture
def address(host: Any, fleet: dict[str, Any]) -> str:
    """The private address of the host under test."""
    found: str = fleet["hosts"][host.backend.hostname]["address"]
    return found


@pytest.fixture
def shell(host: Any, state: Path) -> Any:
    """Run a script as root. Unlike `host.run`, it leaves no arguments in the process list or journal."""

    def run(script: str, on: str = host.backend.hostname) -> str:
        command = ["ssh", "-F", str(state / "ssh_config"), on, "sudo sh -s"]
        return subprocess.run(command, input=script, text=True, capture_output=True, check=False).stdout

    return run


@pytest.fixture(scope="session")
def password(state: Path) -> Any:
    """Return the password of a Redis user from the inventory's credentials."""
    return lambda user: (state / "credentials" / f"redis_{user}").read_text().split()[0]


@dataclass(frozen=True)
class Played:
    """The exit status and output of a playbook."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """The whole output on one line, so that line breaks do not split a message."""
        return " ".join((self.stdout + self.stderr).split())

    def changes(self) -> dict[str, int]:
        """Assert success; return the number of changed tasks by host."""
        assert self.returncode == 0, self.stdout + self.stderr
        recap = re.findall(r"^(\S+)\s+: .*changed=(\d+)", self.stdout, re.M)
        # The recap also lists localhost, where the first play checks the control node.
        return {host: int(count) for host, count in recap if host != "localhost" or count != "0"}

    def failures(self) -> dict[str, str]:
        """Assert failure; return the message of each host that failed, on one line."""
        assert self.returncode != 0, self.stdout + self.stderr
        found = re.findall(r"^fatal: \[([^]\s]+).*\n((?:[ ].*\n|\n)*)", self.stdout, re.M)
        return {host: " ".join(message.split()) for host, message in found}

    def changed_tasks(self) -> list[str]:
        """Assert success; return the changed tasks as `host: role : task`, in their order."""
        assert self.returncode == 0, self.stdout + self.stderr
        found, task = [], ""
        for line in self.stdout.splitlines():
            if banner := re.match(r"(?:TASK|RUNNING HANDLER) \[(?:pixel\.endpoint\.)?(.*)\] \*+$", line):
                task = banner[1]
            elif change := re.match(r"changed: \[(\S+?)( ->.*)?\]$", line):
                found.append(f"{change[1]}: {task}")
        return found


@pytest.fixture(scope="session")
def inventory() -> str:
    """The inventory of the scenario's playbooks."""
    return ".config/molecule/inventory"


@pytest.fixture(scope="session")
def play(inventory: str) -> Callable[..., Played]:
    """Run a playbook as an operator does; keyword arguments become extra variables."""

    def run(playbook: str, *arguments: str, hosts: str = inventory, **variables: Any) -> Played:
        command = ["ansible-playbook", "--inventory", hosts, playbook, *arguments]
        done = subprocess.run(
            [*command, "--extra-vars", json.dumps(variables)],
            cwd=ROOT,
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            text=True,
            capture_output=True,
            check=False,
        )
        return Played(done.returncode, done.stdout, done.stderr)

    return run


class Client:
    """An HTTP client that returns error statuses instead of raising."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any, str]:
        """Send a GET, or a POST if there is a body; return status, headers and body."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def read_from(self, instance: str, path: str) -> Any:
        """GET a path from one instance through `/cluster/<instance>`, whatever the balancer would choose."""
        status, headers, body = self.ask(f"/cluster/{instance}{path}")
        assert (status, headers["X-Pixel-Instance"]) == (200, instance)
        return json.loads(body)


@pytest.fixture(scope="session")
def client(fleet: dict[str, Any]) -> Client:
    """A client outside the fleet that knows only the balancer's address."""
    return Client(fleet["url"])


@pytest.fixture(scope="session")
def client_of() -> Callable[[str], Client]:
    """A client of the Nginx at an address."""
    return lambda ip: Client(f"http://{ip}")


@pytest.fixture
def requests(fleet: dict[str, Any], tmp_path: Path) -> Any:
    """A context under load: no write may be lost or undone, or fail (except for a slow disk).

    With `strict=False` writes may fail. The context's value contains bench.load's report at the end.
    """

    @contextmanager
    def load(strict: bool = True) -> Iterator[dict[str, Any]]:
        path = tmp_path / "load.json"
        options = ("--rate", "200", "--seconds", "900", "--writers", "16", "--json", str(path))
        sending = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.load", "--url", fleet["url"], "--forgive-disk", *options),
                *(["--strict"] if strict else []),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        report: dict[str, Any] = {}
        try:
            yield report
        finally:
            # On SIGINT, bench.load stops sending, waits for answers, and compares the canvas with its ledger.
            sending.send_signal(signal.SIGINT)
            output, _ = sending.communicate(timeout=60)
        assert sending.returncode == 0, output
        report |= json.loads(path.read_text())

    return load


@pytest.fixture
def viewer(fleet: dict[str, Any]) -> Callable[[], Follower]:
    """Return a factory of viewers that stream through the balancer."""
    return lambda: Follower(fleet["url"])


@pytest.fixture
def watched(client: Client, viewer: Callable[[], Follower]) -> Any:
    """A context in which a viewer follows the stream; at its end the viewer's canvas equals the server's."""

    @contextmanager
    def watch() -> Iterator[Follower]:
        with viewer() as watching:
            yield watching
            fresh = urllib.request.Request(f"{client.url}/canvas.rgb", headers={"Cache-Control": "no-cache"})
            answer = urllib.request.urlopen(fresh, timeout=10)
            canvas, event = answer.read(), answer.headers["X-Pixel-Event"]
            watching.sees(lambda viewer: viewer.event == event, 5)
        assert watching.faults == []
        assert watching.canvas == canvas

    return watch


@pytest.fixture
def releases(client: Any) -> Any:
    """Return the release that each host reports at /ping."""
    return lambda: {host: client.read_from(host, "/ping")["release"] for host in ("c5", "t2")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        host: Any = getattr(item, "funcargs", {}).get("host")
        state = ROOT / ".fleet" / os.environ.get("PIXEL_FLEET", "pixel")
        facts = state / "fleet.json"
        everyone = json.loads(facts.read_text())["hosts"] if facts.exists() else []
        units = "--unit=redis-server --unit=pixel --unit='pixel@*' --unit=nginx"
        script = f"sudo journalctl {units} --lines=40 --no-pager --output=short-iso"
        for name in [host.backend.hostname] if host else everyone:
            ssh = ["ssh", "-F", str(state / "ssh_config"), "-o", "ConnectTimeout=5", name, script]
            done = subprocess.run(ssh, text=True, capture_output=True, check=False)
            report.sections.append((f"journal of {name}", done.stdout + done.stderr))
    return report
