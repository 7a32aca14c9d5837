"""The migration of a data directory with images in JSON files keeps all of their information."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coppice.errors import NameTaken
from coppice.images.catalog import ImageCatalog
from image_archives import open_catalog

DEBIAN, WEB, OLD, NEW = (digit * 64 for digit in "abcd")


def record(digest: str, name: str, created_at: float, **changed: Any) -> bytes:
    """Return an image's JSON record in the form from before names were in the database."""
    config: dict[str, Any] = {"entrypoint": [], "cmd": [], "env": {}, "workdir": "/", "user": "", "labels": {}}
    fields = {
        "digest": f"sha256:{digest}",
        "name": name,
        "size_bytes": 4096,
        "filesystem": "erofs",
        "config": config | changed.pop("config", {}),
        "source": "a.tar",
        "created_at": created_at,
        "owner": None,
        "public": False,
        "tags": {},
    }
    return json.dumps(fields | changed, separators=(",", ":")).encode()


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """Return a data directory with four images: one with two names of two owners, a public one, and
    one that lost its name to another.
    """
    images = tmp_path / "images"
    (images / "names").mkdir(parents=True)
    (images / ".lock").touch()
    config = {"cmd": ["/bin/sh"], "env": {"A": "1"}}
    named = [
        record(DEBIAN, "debian:12", 1.0, config=config, tags={"k": "v"}),
        record(DEBIAN, "debian:latest", 1.0, config=config, owner="bob"),
        record(WEB, "team/web", 2.0, owner="alice", public=True),
        record(NEW, "moved", 4.0),
    ]
    for number, data in enumerate(named):
        (images / "names" / f"{number:064x}.json").write_bytes(data)
    for digest, data in ((DEBIAN, named[0]), (WEB, named[2]), (OLD, record(OLD, "moved", 3.0)), (NEW, named[3])):
        (images / digest).mkdir()
        (images / digest / "root.img").write_bytes(digest.encode())
        (images / digest / "image.json").write_bytes(data)
    return tmp_path


def test_all_information_of_the_files_is_migrated(old_home: Path) -> None:
    """Images, names, configs, tags, owners and public flags are kept; an image without a name stays
    an image.
    """
    catalog = open_catalog(old_home)
    found = [(i.name, i.digest[7:8], i.owner, i.public, i.tags, i.config.cmd, i.config.env) for i in catalog.list()]
    assert found == [
        ("debian:12", "a", None, False, {"k": "v"}, ("/bin/sh",), {"A": "1"}),
        ("debian:latest", "a", "bob", False, {}, ("/bin/sh",), {"A": "1"}),
        ("team/web", "b", "alice", True, {}, (), {}),
        ("", "c", None, False, {}, (), {}),
        ("moved", "d", None, False, {}, (), {}),
    ]
    assert [catalog.root_file(image).read_bytes()[:1].decode() for image in catalog.list()] == list("aabcd")
    assert open_catalog(old_home).list() == catalog.list()
    with pytest.raises(NameTaken):
        catalog.tag("moved", "team/web", owner="bob")


def test_the_migrated_files_are_swept(old_home: Path) -> None:
    """A sweep removes the files, which are no longer read, and no image."""
    catalog = open_catalog(old_home)
    before = catalog.list()
    assert sorted(removed.path.name for removed in catalog.sweep()) == [".lock", "names"]
    assert catalog.list() == before
    assert all(catalog.root_file(image).is_file() for image in before)


@pytest.mark.parametrize("data", [b"{", b"", b"\xff", b'{"digest": 1}'])
def test_a_damaged_file_does_not_stop_the_migration(old_home: Path, data: bytes) -> None:
    """Readable records are kept; an image with a damaged record is still found by its name."""
    (old_home / "images" / "names" / f"{2:064x}.json").write_bytes(data)
    (old_home / "images" / DEBIAN / "image.json").write_bytes(data)
    catalog = open_catalog(old_home)
    assert [image.name for image in catalog.list()] == ["debian:12", "debian:latest", "", "", "moved"]
    catalog.remove("debian:12")
    catalog.remove("debian:latest")
    assert not (old_home / "images" / DEBIAN).exists()


def test_a_record_without_its_image_is_dropped(old_home: Path) -> None:
    """A missing image could not be run."""
    (old_home / "images" / WEB / "root.img").unlink()
    catalog: ImageCatalog = open_catalog(old_home)
    assert "team/web" not in [image.name for image in catalog.list()]
    assert WEB in [removed.path.name for removed in catalog.sweep()]
