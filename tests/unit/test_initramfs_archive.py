"""The initramfs has the right members, and equal inputs give equal files."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.boot import initramfs
from coppice.errors import UsageError
from coppice.model.kernel import Kernel
from kernel_files import RELEASE, module, module_tree


class Member(NamedTuple):
    """One member, as a reader of the format parses it."""

    name: str
    mode: int
    data: bytes
    device: tuple[int, int]
    owner: tuple[int, int]
    mtime: int


def read_newc(archive: bytes) -> list[Member]:
    """An independent reader of the newc format."""
    members: list[Member] = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        field = [int(archive[position + 6 + 8 * index : position + 14 + 8 * index], 16) for index in range(13)]
        name_at = position + 110
        data_at = name_at + field[11] + -(name_at + field[11]) % 4
        name = archive[name_at : name_at + field[11]]
        assert name.endswith(b"\0")
        if name == b"TRAILER!!!\0":
            assert len(archive) == data_at
            return members
        data = archive[data_at : data_at + field[6]]
        members.append(
            Member(name[:-1].decode(), field[1], data, (field[9], field[10]), (field[2], field[3]), field[5])
        )
        position = data_at + field[6] + -(data_at + field[6]) % 4


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    modules = module_tree(tmp_path / "modules")
    return Kernel(key="custom-x-00000000", version=RELEASE, vmlinuz=tmp_path / "vmlinuz", modules=modules)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "coppice-agent"
    path.write_bytes(b"\x7fELF agent")
    return path


@given(st.lists(st.tuples(st.from_regex(r"[a-z/]{1,30}", fullmatch=True), st.binary(max_size=50)), max_size=8))
def test_any_members_are_read_back(members: list[tuple[str, bytes]]) -> None:
    """Padding and sizes are right for names and data of any length."""
    archive = initramfs.Archive()
    for name, data in members:
        archive.add(name, stat.S_IFREG | 0o644, data)
    assert [(member.name, member.data) for member in read_newc(archive.finish())] == members


def test_the_initramfs_has_all_that_a_guest_needs(kernel: Kernel, agent: Path, tmp_path: Path) -> None:
    """The agent is /init, there is a console for it, and every module in the load order is
    complete.
    """
    path = initramfs.build(kernel, agent, tmp_path / "initramfs")
    members = {member.name: member for member in read_newc(path.read_bytes())}
    assert members["init"].mode == stat.S_IFREG | 0o755
    assert members["init"].data == agent.read_bytes()
    assert members["dev/console"].mode == stat.S_IFCHR | 0o600
    assert members["dev/console"].device == (5, 1)
    for name in ("dev", "proc", "sys", "modules", "newroot"):
        assert members[name].mode == stat.S_IFDIR | 0o755
    order = members["modules/order"].data.decode().splitlines()
    assert {f"modules/{file}" for file in order} == {name for name in members if name.endswith(".ko")}
    assert members["modules/virtio-rng.ko"].data == module("virtio-rng", "virtio")
    assert order.index("virtio_ring.ko") < order.index("virtio.ko") < order.index("virtio_mmio.ko")
    assert "ext4.ko" not in order
    assert "unwanted.ko" not in order
    assert {(member.owner, member.mtime) for member in members.values()} == {((0, 0), 0)}


def test_equal_inputs_give_the_same_file(kernel: Kernel, agent: Path, tmp_path: Path) -> None:
    """A second build finds the first file and does not touch it, because VMs have it open."""
    first = initramfs.build(kernel, agent, tmp_path / "initramfs")
    before = first.stat()
    assert initramfs.build(kernel, agent, tmp_path / "initramfs") == first
    assert first.stat().st_ino == before.st_ino
    assert stat.S_IMODE(before.st_mode) == 0o444
    assert list((tmp_path / "initramfs").iterdir()) == [first]


def test_another_agent_gives_another_file(kernel: Kernel, agent: Path, tmp_path: Path) -> None:
    """After an upgrade no guest boots with the old agent, and no running guest loses its file."""
    first = initramfs.build(kernel, agent, tmp_path / "initramfs")
    agent.write_bytes(b"\x7fELF newer agent")
    second = initramfs.build(kernel, agent, tmp_path / "initramfs")
    assert second != first
    assert first.exists()


def test_a_kernel_that_cannot_run_a_guest_is_refused(kernel: Kernel, agent: Path, tmp_path: Path) -> None:
    """A kernel that lacks a required module is an error that names the module, and leaves no file."""
    assert kernel.modules is not None
    (kernel.modules / "kernel/drivers/char/virtio_console.ko").unlink()
    with pytest.raises(UsageError, match="virtio_console"):
        initramfs.build(kernel, agent, tmp_path / "initramfs")
    assert not (tmp_path / "initramfs").exists()
