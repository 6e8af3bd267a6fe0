"""Keys: the command, and what it takes effect on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PASSWORD, RedisServer

from pixel.keys import hash_token, parse
from pixel.names import KEYS

SRC = Path(__file__).parent.parent / "src"


def command(server: RedisServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pixel.keys", *arguments],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SRC),
            "PIXEL_REDIS_URL": server.url,
            "PIXEL_REDIS_USERNAME": "pixel",
            "PIXEL_REDIS_PASSWORD": PASSWORD,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def token_of(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"pixel_[A-Za-z0-9_-]{43}\n", done.stdout)
    return done.stdout.strip()


def test_a_token_is_printed_once_and_stored_as_a_hash(redis_server: RedisServer) -> None:
    token = token_of(command(redis_server, "create", "alice", "--scopes", "batch,paint"))
    with redis_server.admin() as admin:
        stored = admin.hget(KEYS, "alice")
    assert f'"hash":"{hash_token(token.encode())}","scopes":["paint","batch"]'.encode() in stored
    assert token.encode() not in stored
    listed = command(redis_server, "list").stdout
    assert re.search(r"^alice +valid +paint,batch +none +[-0-9]+ [0-9:]+Z +never$", listed, re.MULTILINE)
    assert token not in listed


def test_the_life_of_a_key(redis_server: RedisServer) -> None:
    options = ("--scopes", "paint", "--per-minute", "60", "--burst", "5", "--expires", "30d")
    first = token_of(command(redis_server, "create", "bot", *options))
    again = command(redis_server, "create", "bot", *options)
    assert (again.returncode, again.stdout) == (1, "")
    assert "there is a key bot already; rotate it" in again.stderr
    second = token_of(command(redis_server, "rotate", "bot"))
    assert first != second
    row = command(redis_server, "list").stdout.splitlines()[1]
    assert re.match(r"bot +valid +paint +60/min, 5 at once +", row)
    assert command(redis_server, "revoke", "bot").returncode == 0
    assert re.search(r"^bot +revoked ", command(redis_server, "list").stdout, re.MULTILINE)
    refused = command(redis_server, "rotate", "bot")
    assert (refused.returncode, refused.stderr) == (1, "pixel.keys: key bot is revoked; create another one\n")
    assert command(redis_server, "revoke", "bot").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("revoke alice", "there is no key alice; the keys are none"),
        ("rotate alice", "there is no key alice"),
        ("create alice", "--scopes"),
        ("create alice --scopes paint,rule", "unknown scope 'rule'; the scopes are paint, batch, moderate"),
        ("create a:b --scopes paint", "1 to 32 letters, digits"),
        ("create alice --scopes paint --expires soon", "as in 90m, 12h or 30d"),
        ("create alice --scopes paint --expires 0d", "as in 90m, 12h or 30d"),
        ("create alice --scopes paint --burst 5", "--burst needs --per-minute"),
        ("create alice --scopes paint --per-minute 0", "an integer from 1 to 10000000"),
        ("", "COMMAND"),
    ],
)
def test_a_command_that_cannot_be_executed_says_why(
    redis_server: RedisServer, arguments: str, message: str
) -> None:
    done = command(redis_server, *arguments.split())
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    with redis_server.admin() as admin:
        assert admin.keys() == []


def test_without_redis_the_command_fails_with_one_line(fragile_redis: RedisServer) -> None:
    fragile_redis.kill()
    done = command(fragile_redis, "list")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("pixel.keys: ")


def test_the_burst_is_by_default_that_of_a_minute() -> None:
    budget = parse(["create", "a", "--scopes", "paint", "--per-minute", "30"]).budget
    assert (budget.per_minute, budget.burst) == (30, 30)
