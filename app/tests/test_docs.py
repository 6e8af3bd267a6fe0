"""``docs/api.md`` against the service: its commands are run, and its answers compared.

``python tests/test_docs.py`` updates the answers on the page.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
from conftest import RedisServer, Service

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
SHOWN_URL = "http://127.0.0.1:8080"
RELEASE = "1.0.0-3fa9c1d2"

# Values that differ from run to run, and their placeholders in the comparison.
VARYING = (
    (r"\b[0-9]{13}-[0-9]+\b", "<event>"),
    (r"^date: .*$", "date: <date>"),
    (r'"(uptime_s|redis_ms|writes|workers)":[0-9.]+', r'"\1":<number>'),
    (r'"load":\[[^]]*\]', '"load":<load>'),
)


def answered(page: str, url: str, directory: Path) -> str:
    """The page with the answers that its commands get from a service with an empty canvas."""

    def run_block(block: re.Match[str]) -> str:
        lines: list[str] = []
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)\n", block[1], re.MULTILINE):
            done = subprocess.run(
                ["bash", "-c", command.replace(SHOWN_URL, url)],
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=20,
            )
            assert not done.stderr, done.stderr
            output = done.stdout.replace("\r", "").replace(url, SHOWN_URL).rstrip("\n")
            lines += [f"$ {command}", *([output] if output else [])]
        return "```console\n" + "\n".join(lines) + "\n```"

    return re.sub(r"```console\n(.*?)```", run_block, page, flags=re.DOTALL)


def compared(page: str) -> str:
    """The page with placeholders for the values that differ from run to run."""
    for pattern, word in VARYING:
        page = re.sub(pattern, word, page, flags=re.MULTILINE)
    return page


def test_the_page_shows_what_the_service_answers(
    redis_server: RedisServer, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(redis_server.url, PIXEL_RELEASE=RELEASE)
    assert httpx.get(f"{service.url}/healthz", timeout=20).status_code == 200
    page = PAGE.read_text()
    assert compared(answered(page, service.url, tmp_path)) == compared(page)


def write() -> None:
    server = RedisServer()
    service = Service(server.url, PIXEL_RELEASE=RELEASE)
    try:
        httpx.get(f"{service.url}/healthz", timeout=20)
        with tempfile.TemporaryDirectory() as directory:
            PAGE.write_text(answered(PAGE.read_text(), service.url, Path(directory)))
    finally:
        service.remove()
        server.remove()


if __name__ == "__main__":
    write()
