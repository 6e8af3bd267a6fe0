"""redis_trim_log removes an incomplete transaction at the end of the log, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis_trim_log
from redis_trim_log import CHUNK, EXEC, MULTI

SET = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n1\r\n"
WHOLE = MULTI + SET + EXEC


@pytest.fixture(params=["", " startoffset 0"], ids=["redis 7", "redis 8"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "appendonly.aof.manifest").write_text(
        "file appendonly.aof.2.base.rdb seq 2 type b\n"
        f"file appendonly.aof.7.incr.aof seq 7 type i{request.param}\n"
    )
    return tmp_path


def trimmed(folder: Path, content: bytes) -> bytes:
    log = folder / "appendonly.aof.7.incr.aof"
    log.write_bytes(content)
    assert redis_trim_log.trim(folder) == len(content) - log.stat().st_size
    return log.read_bytes()


@pytest.mark.parametrize("cut", range(1, len(MULTI + SET + EXEC)))
def test_an_incomplete_last_transaction_is_removed(folder: Path, cut: int) -> None:
    left = trimmed(folder, WHOLE + WHOLE[:-cut])
    # Less than a whole MULTI is an incomplete command, which Redis itself removes.
    rest = b"" if len(WHOLE) - cut >= len(MULTI) else WHOLE[:-cut]
    assert left == WHOLE + rest


@pytest.mark.parametrize(
    "content", [b"", SET, WHOLE, WHOLE + SET, WHOLE * 3, SET * 200_000, WHOLE + SET * 200_000]
)
def test_complete_commands_are_kept(folder: Path, content: bytes) -> None:
    assert trimmed(folder, content) == content


def test_damage_before_a_complete_transaction_is_left_unchanged(folder: Path) -> None:
    content = WHOLE + MULTI + b"\0" * 50 + EXEC + SET
    assert trimmed(folder, content) == content


def test_a_transaction_across_chunks_is_found(folder: Path) -> None:
    many = SET * (CHUNK // len(SET) + 1)
    for shift in range(len(MULTI) + 1):
        assert trimmed(folder, WHOLE + MULTI + many[: CHUNK - shift]) == WHOLE


def test_a_missing_log_is_not_an_error(tmp_path: Path) -> None:
    assert redis_trim_log.trim(tmp_path) == 0
    (tmp_path / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")
    assert redis_trim_log.trim(tmp_path) == 0
