"""The search of a console finds a text however its bytes arrive, and reads none twice."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.machine import console
from coppice.model import HealthCheck, Instance, MemFile, Sharing, Supervision
from fakes.records import make_capture, make_instance

TEXT = "aabaä"
MEMORY = MemFile(inode=1, device=1, size_bytes=4096, sharing=Sharing.OWN)
PARTS = st.lists(st.text("abä", max_size=8).map(str.encode), max_size=6)


def instance(printed: str = "", console_from: int = 0, text: str = TEXT) -> Instance:
    """Return the record of a machine with a check by a line."""
    return msgspec.structs.replace(
        make_instance("oak"),
        capture=msgspec.structs.replace(make_capture(MEMORY), printed=printed),
        console_from=console_from,
        supervision=Supervision(health_check=HealthCheck(kind="log", text=text)),
    )


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(old=PARTS, before=PARTS, after=PARTS)
def test_a_text_is_found_across_parts_and_captures(old: list[bytes], before: list[bytes], after: list[bytes]) -> None:
    """What a capture records is enough to find a text that begins before it and ends behind it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "console.log"
        log.write_bytes(b"".join(old))
        source = instance(console_from=len(b"".join(old)))
        search = console.Search(directory, source, TEXT)
        for number, part in enumerate(before):
            with log.open("ab") as stream:
                stream.write(part)
            assert search.found() is (TEXT.encode() in b"".join(before[: number + 1]))
        end = console.size(directory)
        with log.open("ab") as stream:
            stream.write(TEXT.encode())  # after the capture
        printed = asyncio.run(console.printed(directory, source, end))
        log.write_bytes(b"".join(after))
        fork = console.Search(directory, instance(printed), TEXT)
        assert fork.found() is (TEXT.encode() in b"".join(before + after))


def test_bytes_are_read_once(tmp_path: Path) -> None:
    """A check of a guest that prints much costs what is new."""
    log = tmp_path / "console.log"
    log.write_bytes(b"x" * (3 << 20))
    search = console.Search(tmp_path, instance(), "ready")
    assert not search.found()
    assert search._at == 3 << 20
    assert len(search._last) < len("ready")
    with log.open("ab") as stream:
        stream.write(b"re\xff\xferead\0ready")
    assert search.found()
    log.unlink()
    assert search.found()


async def test_a_machine_without_a_console_or_without_such_a_check(tmp_path: Path) -> None:
    """Nothing is printed. Without such a check the answer comes at once, since each standby asks."""
    assert not console.Search(tmp_path, instance(), "ready").found()
    assert await console.printed(tmp_path, instance(text="ready"), 0) == ""
    (tmp_path / "console.log").write_bytes(b"ready")
    assert await console.printed(tmp_path, instance(text="ready"), 5) == "ready"
    with pytest.raises(StopIteration) as returned:
        console.printed(tmp_path, make_instance("elm"), 5).send(None)
    assert returned.value.value == ""


@pytest.mark.parametrize(
    ("shown", "printed"),
    [(b"x aab", "aab"), (b"aabab", ""), (b"aabaab", "aab"), (b"aabaabaa", "aa"), (b"aaba\xc3", "")],
)
async def test_the_beginning_that_may_go_on(tmp_path: Path, shown: bytes, printed: str) -> None:
    """The longest one; half a character is none."""
    (tmp_path / "console.log").write_bytes(shown)
    assert await console.printed(tmp_path, instance(), len(shown)) == printed
