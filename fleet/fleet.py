#!/usr/bin/env python3
"""The local fleet: hosts with systemd in containers, reached over SSH like any server.

`make up` and every Molecule scenario create their hosts with this program. It needs only the standard
library and the `docker` command, so it runs before anything is installed.

    fleet.py up [local|ha]           install Docker, build the image, create the hosts of this inventory (the
                                     default is that of the existing fleet, or local), deploy, test one pixel
    fleet.py create HOST[:SUITE]...  install Docker, build the image, create these hosts; --inventory ha: as
                                     three balancers that share an address
    fleet.py images SUITE...         install Docker, build the images of these Debian suites
    fleet.py power HOST... on|off|cut|freeze|reboot
                                     `off` kills all processes, `cut` also lets no packet tell that to others,
                                     `freeze` stops them; `on` starts or continues
    fleet.py replace HOST            replace a host with an empty one
    fleet.py cpus HOST NUMBER|all    limit the processors a host may use; 0.05 is a twentieth of one
    fleet.py destroy                 remove hosts, network and state; the image stays for the next fleet
    fleet.py down                    the same, and remove the images that no other fleet uses

Environment:
    PIXEL_FLEET         name of the fleet; default `pixel`
    PIXEL_FLEET_PORT    loopback port of the balancer
    PIXEL_FLEET_SUBNET  network of the hosts, a /24
    PIXEL_FLEET_DATA    directory of this machine, such as /dev/shm, for the hosts' Redis data; it is removed
                        with the host. Default: the data is in the container
    PIXEL_HOST_IMAGE    an image to use instead of building one

A fleet keeps its port and subnet until it is removed. Changing them replaces its hosts and their data.
State is in `.fleet/<name>/`: SSH key, `ssh_config`, and `fleet.json`, which the inventories read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NoReturn

import containers
import state
from bootstrap import ROOT, VENV, Problem, find, say
from engine import Docker
from image import ensure_image, remove_images
from layout import HOSTS, Fleet, plan


def deploy(fleet: Fleet) -> None:
    """Run site.yml as a user would, with its output visible."""
    # Ansible ignores an ansible.cfg in a world-writable directory unless ANSIBLE_CONFIG names it.
    environment = os.environ | {"PIXEL_FLEET": fleet.name, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    playbook = VENV / "bin" / "ansible-playbook"
    command = [str(playbook), f"--inventory=inventory/{fleet.inventory}", "site.yml"]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise Problem("site.yml failed; fix the error above and run `make up` again.")


def first_pixel(fleet: Fleet) -> str:
    """Write a pixel through the balancer and read it from a host other than the one that wrote it."""
    assert fleet.url
    pixel = {"x": 10, "y": 20, "channel": "R", "value": 255}
    body = json.dumps(pixel).encode()
    request = urllib.request.Request(
        f"{fleet.url}/pixel", data=body, headers={"Content-Type": "application/json"}
    )
    writer, answer = _fetch(request)
    if json.loads(answer) != {"status": "ok", "received": pixel}:
        raise Problem(f"POST /pixel answered {answer}")
    # Through /cluster/<host>, because open event streams influence the balancer's choice.
    other = next(host.name for host in fleet.hosts if not f"{writer}-".startswith(f"{host.name}-"))
    reader, answer = _fetch(urllib.request.Request(f"{fleet.url}/cluster/{other}/pixel/10/20"))
    if json.loads(answer)["R"] != 255:
        raise Problem(f"written by {writer}, but {reader} reads {answer}")
    return f"POST /pixel written by {writer}, read from {reader}: {answer}"


def _fetch(request: urllib.request.Request) -> tuple[str, str]:
    """Return the instance that answered, and its answer."""
    try:
        # Ignore the proxies of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            return response.headers["X-Pixel-Instance"], response.read().decode()
    except urllib.error.HTTPError as error:
        raise Problem(f"{request.full_url} answered {error.code}: {error.read().decode()}") from error
    except OSError as error:
        raise Problem(f"{request.full_url}: {error}") from error


def up(docker: Docker, fleet: Fleet) -> None:
    """Create and deploy the fleet, test one pixel, and print what to try next."""
    names = ", ".join(host.name for host in fleet.hosts)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("Docker engine", docker.ensure),
        (f"host image and hosts {names}", lambda: containers.create(docker, fleet)),
        ("ansible-playbook site.yml", lambda: deploy(fleet)),
        ("first pixel", lambda: first_pixel(fleet)),
    ]
    for number, (title, step) in enumerate(steps, start=1):
        say(f"[{number}/{len(steps)}] {title}")
        result = step()
        if result:
            say(f"      {result}")
    prefix = "" if fleet.name == "pixel" else f"PIXEL_FLEET={fleet.name} "
    option = "" if fleet.inventory == "local" else f"-i inventory/{fleet.inventory} "
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
  {prefix}.venv/bin/ansible-playbook {option}site.yml     deploy again
  {prefix}make down                               remove the fleet
""")


def main() -> None:
    parser = argparse.ArgumentParser(description="The local fleet of test hosts.")
    commands = parser.add_subparsers(dest="command", required=True)
    raising = commands.add_parser("up", help="create the hosts, deploy, and test one pixel")
    raising.add_argument("inventory", nargs="?", choices=HOSTS, help="default: the fleet's own, or local")
    creating = commands.add_parser("create", help="create these hosts")
    creating.add_argument("hosts", nargs="+", metavar="HOST[:SUITE]")
    creating.add_argument("--inventory", choices=HOSTS, help="default: the fleet's own, or local")
    building = commands.add_parser("images", help="build the images of these Debian suites")
    building.add_argument("suites", nargs="+", metavar="SUITE")
    switching = commands.add_parser("power", help="power hosts off or on, freeze or reboot them")
    switching.add_argument("named", nargs="+", metavar="HOST")
    switching.add_argument("action", choices=("on", "off", "cut", "freeze", "reboot"))
    replacing = commands.add_parser("replace", help="replace a host with an empty one")
    replacing.add_argument("host")
    limiting = commands.add_parser("cpus", help="limit the processors a host may use")
    limiting.add_argument("host")
    limiting.add_argument("number", type=_processors, metavar="NUMBER|all")
    commands.add_parser("destroy", help="remove hosts, network and state")
    commands.add_parser("down", help="destroy, and remove unused host images")
    args = parser.parse_args()
    try:
        _execute(args)
    except (Problem, OSError, subprocess.TimeoutExpired) as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        fail("interrupted; run the command again to continue, or `make down` to remove the fleet.")


def _execute(args: argparse.Namespace) -> None:
    docker = Docker()
    if args.command == "images":
        docker.ensure()
        for suite in args.suites:
            say(ensure_image(docker, suite))
        return
    name = os.environ.get("PIXEL_FLEET") or "pixel"
    inventory, hosts, environ = state.remembered(name, os.environ, getattr(args, "inventory", None))
    fleet = plan(name, getattr(args, "hosts", None) or hosts, environ, inventory)
    with state.exclusive(fleet):
        if args.command == "up":
            up(docker, fleet)
            return
        if args.command in ("destroy", "down") and not find("docker") and not find("dockerd"):
            shutil.rmtree(fleet.state, ignore_errors=True)
            say("Docker is not installed, so there is no fleet to remove")
            return
        docker.ensure()
        match args.command:
            case "create":
                containers.create(docker, fleet)
            case "power":
                containers.power(docker, fleet, [fleet.host(name) for name in args.named], args.action)
            case "replace":
                containers.replace(docker, fleet, fleet.host(args.host))
            case "cpus":
                containers.limit_cpus(docker, fleet, fleet.host(args.host), args.number)
            case "destroy" | "down":
                containers.destroy(docker, fleet)
        if args.command == "down":
            remove_images(docker)
            say(f"fleet {name} is removed; .venv and the Docker engine stay")


def _processors(text: str) -> float | None:
    """Parse a number of processors; None means all of this machine."""
    if text == "all":
        return None
    number = float(text)
    if not 0.01 <= number <= (os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"{text} is neither a number from 0.01 to {os.cpu_count()} nor all")
    return number


def fail(text: str) -> NoReturn:
    print(f"fleet: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
