"""Following a log yields every line once, in order and with bounded memory, whatever the guest
writes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.machine import follow
from coppice.machine.follow import follow_file

TEXT = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\n\n", b"\r", b"\0", b"\xff"]), max_size=30).map(b"".join)


async def at_once() -> bool:
    """The machine has ended."""
    return True


async def lines_of(path: Path, tail: int | None, *, follow: bool = False) -> list[bytes]:
    """Return all yielded lines."""
    with path.open("rb") as log:
        return [line async for line in follow_file(log, tail=tail, follow=follow, ended=at_once)]


def expected(data: bytes, tail: int | None) -> list[bytes]:
    """Return the lines that `tail -n` would print."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=TEXT, tail=st.none() | st.integers(0, 6), chunk=st.integers(1, 8), followed=st.booleans())
def test_tail_equals_the_tail_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, tail: int | None, chunk: int, followed: bool
) -> None:
    """For any file and number of lines, read in pieces of any size, the result is that of `tail
    -n`.
    """
    path = tmp_path / "log"
    path.write_bytes(data)
    monkeypatch.setattr(follow, "_CHUNK", chunk)
    assert asyncio.run(lines_of(path, tail, follow=followed)) == expected(data, tail)


async def test_new_lines_are_yielded_until_the_end(tmp_path: Path) -> None:
    """Only complete lines are yielded; after the machine's end the rest is read, including a last
    line without a newline.
    """
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    running = True

    async def ended() -> bool:
        return not running

    with path.open("rb") as read:
        stream = follow_file(read, tail=None, follow=True, ended=ended)
        assert await anext(stream) == b"one"
        with path.open("ab") as log:
            log.write(b"o\nthree\n")
        assert await anext(stream) == b"two"
        assert await anext(stream) == b"three"
        with path.open("ab") as log:
            log.write(b"last words")
        running = False
        assert [line async for line in stream] == [b"last words"]


async def test_an_endless_line_is_yielded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that never ends its line cannot fill the host's memory."""
    monkeypatch.setattr(follow, "_CHUNK", 1000)
    monkeypatch.setattr(follow, "_LINE_MAX", 4000)
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100_000)
    pieces = await lines_of(path, None)
    assert b"".join(pieces) == b"x" * 100_000
    assert max(map(len, pieces)) < 6000
