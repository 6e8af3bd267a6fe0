"""The comparison's Nginx has the directives and the log format of role nginx_lb."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from jinja2 import Template

ROOT = Path(__file__).resolve().parents[1]
ROLE = ROOT / "roles" / "nginx_lb"
PEERS = ROOT / "bench" / "compare" / "peers"


def directives(template: str) -> set[str]:
    """Returns the directives of a part of the role's configuration, with its default values."""
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    # By default, without clusters and stickiness, there is one upstream.
    values = defaults | {"_nginx_lb_upstream": "pixel", "_nginx_lb_clock": "127.0.0.1:"}
    lines = [line.strip() for line in Template(template).render(values).splitlines()]
    return {line for line in lines if line and not line.startswith(("#", "include"))}


def part(name: str, pattern: str) -> str:
    """Returns what a pattern finds in one of the role's templates."""
    found = re.search(pattern, (ROLE / "templates" / name).read_text(), re.DOTALL)
    assert found, f"{name} has no {pattern}"
    return found[0]


def test_the_benchs_nginx_proxies_writes_like_the_roles() -> None:
    wanted = directives((ROLE / "templates" / "proxy_common.conf.j2").read_text())
    macro = part("server.conf.j2", r"{% macro attempt\(.*?{%-? endmacro %}")
    wanted |= directives(macro + "{{ attempt(1, only_pixel=true) }}")
    wanted |= directives("keepalive {{ nginx_lb_keepalive }};")
    assert len(wanted) > 15
    assert wanted <= directives((PEERS / "site_proxy.conf").read_text())


def test_the_benchs_nginx_logs_like_the_roles() -> None:
    maps_and_format = part("nginx.conf.j2", r"    # A line is valid JSON.*?log_format pixel .*?;\n")
    rendered = Template(maps_and_format, trim_blocks=True, keep_trailing_newline=True).render()
    assert rendered in (PEERS / "nginx.conf").read_text()
