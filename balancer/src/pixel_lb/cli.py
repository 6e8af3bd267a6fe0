"""The command line.

    pixel-lb install [--dry-run]
                            check and apply the staged configuration
    pixel-lb drain HOST     send no new requests to a host (never the last one, unless --force), and wait
                            until requests in flight have ended
    pixel-lb undrain HOST   send requests to a host again, and wait until it answers one (no wait with methods
                            that use a key, or for a backup: it may receive no request)
    pixel-lb canary HOST --percent 20 [--seconds 120]
                            limit a host's weight for some time, and wait until that is in force
    pixel-lb canary HOST --percent 100
                            end that
    pixel-lb sync           adopt drains that other balancers know (run by nginx.service before it starts)
    pixel-lb certificate DIRECTORY
                            install this certificate and its key (certbot's deploy hook)
    pixel-lb reload         reload Nginx's files
    pixel-lb watch          run the controller (pixel-lb.service)
    pixel-lb status         print the state of backends, controller and Nginx as JSON
    pixel-lb loaded         record that Nginx has loaded the current files (run by nginx.service)

install, certificate, drain, undrain, canary and sync print `changed` or `unchanged`. Exit status: 0 done, 1
refused and nothing changed, 3 refused because it is the last backend, 4 changed but the wait timed out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_lb.canary import begin, end, wait_until_limited
from pixel_lb.drain import adopt, drain, undrain, wait_until_idle, wait_until_seen
from pixel_lb.errors import Refused
from pixel_lb.files import Paths, exclusive
from pixel_lb.fleet import Fleet
from pixel_lb.install import install, install_certificate
from pixel_lb.nginx import Nginx
from pixel_lb.peers import fetch_all
from pixel_lb.status import describe
from pixel_lb.watch import Watch

FULL_PERCENT = 100


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="pixel-lb", description="The balancer's upstreams and controller.")
    commands = made.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="check and apply the staged configuration")
    installing.add_argument("--dry-run", action="store_true", help="only print whether anything would change")
    draining = commands.add_parser("drain", help="send no new requests to a host")
    draining.add_argument("--force", action="store_true", help="even if it is the last one")
    undraining = commands.add_parser("undrain", help="send requests to a host again")
    for command in (draining, undraining):
        command.add_argument("host")
        command.add_argument("--wait", type=float, default=10, metavar="SECONDS", help="default 10")
    limiting = commands.add_parser("canary", help="limit a host's weight for some time")
    limiting.add_argument("host")
    limiting.add_argument("--percent", type=int, choices=range(1, 101), required=True, metavar="1..100")
    limiting.add_argument("--seconds", type=float, default=120, help="until it ends by itself (default 120)")
    limiting.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="default 60")
    commands.add_parser("sync", help="adopt drains that other balancers know")
    certificate = commands.add_parser("certificate", help="install a certificate and its key")
    certificate.add_argument("directory", type=Path, help="contains fullchain.pem and privkey.pem")
    commands.add_parser("reload", help="reload Nginx's files")
    commands.add_parser("status", help="print the state of backends, controller and Nginx as JSON")
    watching = commands.add_parser("watch", help="run the controller until it is stopped")
    watching.add_argument("--dry-run", action="store_true", help="log decisions, apply nothing")
    commands.add_parser("loaded", help="record that Nginx has loaded the current files")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; by default that of the process.

    Returns:
        The exit status.
    """
    args = parser().parse_args(arguments)
    paths = Paths()
    try:
        if args.command == "watch":
            Watch(paths, dry_run=args.dry_run).run()
        elif args.command == "status":
            print(json.dumps(describe(paths, Nginx(paths)), indent=2))
        else:
            _change(args, paths)
    except Refused as refusal:
        print(f"pixel-lb: {refusal}", file=sys.stderr)
        return refusal.exit_status
    except FileNotFoundError as error:
        print(f"pixel-lb: {error.filename} is missing: run playbooks/nginx_lb.yml", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"pixel-lb: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _change(args: argparse.Namespace, paths: Paths) -> None:
    nginx = Nginx(paths)
    others = fetch_all(Fleet.load(paths.facts).peers) if args.command == "sync" else []
    with exclusive(paths.lock):
        # Remove the mark of an earlier run that was killed.
        paths.closing.unlink(missing_ok=True)
        match args.command:
            case "install":
                _print_changed(install(paths, nginx, dry_run=args.dry_run))
            case "certificate":
                _print_changed(install_certificate(paths, nginx, args.directory))
            case "drain":
                _print_changed(drain(paths, nginx, args.host, force=args.force))
            case "undrain":
                _print_changed(undrain(paths, nginx, args.host))
            case "canary" if args.percent < FULL_PERCENT:
                _print_changed(begin(paths, args.host, args.percent, args.seconds))
            case "canary":
                _print_changed(end(paths))
            case "sync":
                _print_changed(bool(adopt(paths, nginx, others)))
            case "reload":
                nginx.reload()
            case "loaded":
                nginx.mark_loaded()
    # Wait without the lock, so that the controller can mark other backends down.
    match args.command:
        case "drain":
            wait_until_idle(paths, args.host, args.wait)
        case "undrain":
            wait_until_seen(paths, args.host, args.wait)
        case "canary" if args.percent < FULL_PERCENT:
            wait_until_limited(paths, args.host, args.percent, args.wait)


def _print_changed(changed: bool) -> None:
    print("changed" if changed else "unchanged", flush=True)
