"""Nothing of an archive that is truncated, changed or lies is left behind, and a cancelled import leaves nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from coppice.archive.format import BLOCK, header
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, DigestMismatch, ImageError
from coppice.requests import ImportTemplateRequest
from fakes.hosting import assert_tidy, cancelled_at, make_threads_late
from template_archives import rewritten, template

_MOST_WAITS = 400
LIES: dict[str, dict[str, Any]] = {
    "volumes": {
        "template": {
            "machine.volumes": [
                {"volume_id": "x", "volume_name": "x", "size_bytes": 1, "mount_path": "/x", "readonly": True}
            ]
        }
    },
    "clones": {
        "template": {
            "machine.volumes": [
                {"volume_id": "x", "volume_name": "x", "size_bytes": 1, "mount_path": "/x", "private": True}
            ]
        }
    },
    "unnamed disk": {"template": {"disk_layers": {"overlay": [1]}}, "format": 1},
    "name": {"template": {"name": "../oak"}},
    "cpus": {"template": {"machine.cpus": 0}},
    "memory": {"template": {"machine.memory_bytes": 1 << 30}},
    "digest": {"template": {"image": "sha256:../../etc"}},
    "other image": {"template": {"image": "sha256:" + "a" * 64}},
    "kernel": {"kernel_sha256": "0" * 64},
    "disk": {"template": {"disk_layers": {"overlay": [1, 1]}}},
    "absolute": {"path": "/etc/passwd"},
    "above": {"path": "../memory"},
    "huge": {"size_bytes": 1 << 60},
    "negative": {"data_bytes": -1},
    "less data": {"data_bytes": 0},
    "state": {"template": {"state": "Running"}},
}


@pytest.fixture
async def archive(fake_host: AsyncHost, tmp_path: Path) -> Path:
    """Return the path of an archive of the template `oak`."""
    await template(fake_host)
    await (await fake_host.get("oak")).export(tmp_path / "oak")
    return tmp_path / "oak"


async def test_a_manifest_that_lies_is_refused(elsewhere: AsyncHost, archive: Path) -> None:
    """Whatever an archive says of itself, the import fails as of invalid input, and leaves nothing."""
    for lie, changes in LIES.items():
        with pytest.raises(ImageError) as refused:
            await elsewhere.import_template(rewritten(archive, archive.with_name("lie"), **changes))
        assert refused.value.hint, lie
        await assert_tidy(elsewhere)


async def test_a_truncated_or_longer_archive_is_refused(elsewhere: AsyncHost, archive: Path) -> None:
    """However much of it arrives, also without its end mark, and with something behind it."""
    content, part = archive.read_bytes(), archive.with_name("part")
    for bad in (b"", content[:100], content[:5000], content[:-1024], content[:-1536], content + b"moss"):
        part.write_bytes(bad)
        with pytest.raises(ImageError):
            await elsewhere.import_template(part)
        await assert_tidy(elsewhere)


async def test_a_member_of_another_kind_is_refused(elsewhere: AsyncHost, archive: Path) -> None:
    """Links, unknown names, and a range that comes twice."""
    content = archive.read_bytes()
    end = BLOCK + -(-int(content[124:135], 8) // BLOCK) * BLOCK  # of the manifest
    link = bytearray(header("data/0/0", 0))
    link[156:157], link[157:168] = b"2", b"/etc/passwd"
    link[148:156] = b" " * 8
    link[148:156] = b"%06o\0 " % sum(link)
    first = end + BLOCK + int(content[end + 124 : end + 135], 8)
    for member in (
        bytes(link),
        header("../memory", 512) + bytes(512),
        header("data/ffff/0", 512) + bytes(512),
        content[end:first],
    ):
        changed = archive.with_name("member")
        changed.write_bytes(content[:first] + member + content[first:])
        with pytest.raises(ImageError):
            await elsewhere.import_template(changed)
        await assert_tidy(elsewhere)


async def test_any_changed_byte_is_found(elsewhere: AsyncHost, archive: Path) -> None:
    """Bytes all over the archive: a header, the manifest, content or a digest."""
    content, changed = archive.read_bytes(), archive.with_name("changed")
    chosen = random.Random(7)
    for _ in range(12):
        at = chosen.randrange(len(content) - 2 * BLOCK)
        if content[at] == 0 and content[at - 64 : at + 64] == bytes(128):
            continue  # padding, which has no meaning
        changed.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            await elsewhere.import_template(changed)
        except CoppiceError:
            await assert_tidy(elsewhere)
        else:  # a byte of the manifest without a digest of its own, such as the time of the export
            assert at < 64 << 10
            await (await elsewhere.get("oak")).rm()
    middle = len(content) // 2
    changed.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DigestMismatch):
        await elsewhere.import_template(changed)
    await assert_tidy(elsewhere)


async def test_a_cancelled_import_leaves_nothing(
    elsewhere: AsyncHost, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cancelled at each of its waits in turn, until it completes. Threads end late."""
    make_threads_late(monkeypatch)
    for nth in range(1, _MOST_WAITS):
        request = ImportTemplateRequest(path=str(archive))
        if not await cancelled_at(elsewhere.call(request), nth):
            break
        await assert_tidy(elsewhere)
    else:
        pytest.fail("an import waits more often than this test cancels")
    assert nth > 10
    await assert_tidy(elsewhere, "oak")
