"""Ports that are picked for `auto`, against the real kernel."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from pathlib import Path

import pytest

from coppice.errors import HostCannot
from coppice.model import Publish, to_json
from coppice.network import ports
from coppice.network.ports import Picks, pick
from fakes.records import make_instance

ANY = Publish(host_port=0, guest_port=80)
UDP = Publish(host_port=0, guest_port=53, protocol="udp", host_address="0.0.0.0")
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> range:
    """The only ports that are picked first."""
    found = range(31000, 31004)
    monkeypatch.setattr(ports, "_PREFERRED", found)
    monkeypatch.setattr(ports, "_ABLE", found)
    return found


@pytest.fixture
def ephemeral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in place of the kernel's setting."""
    setting = tmp_path / "ip_local_port_range"
    setting.write_text("32768\t60999\n")
    monkeypatch.setattr(ports, "_RANGE", setting)
    return setting


@pytest.mark.parametrize("port", [ANY, UDP])
def test_a_held_port_is_for_one_vmm(few: range, port: Publish) -> None:
    """No other pick gets it, and a VMM does: QEMU sets SO_REUSEADDR for TCP, and not for UDP."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(pick(port, None)) for _ in few]
        numbers = {each.getsockname()[1] for each in held}
        assert numbers == set(few)
        fifth = stack.enter_context(pick(port, None))
        assert fifth.getsockname()[1] not in few
        vmm = stack.enter_context(socket.socket(socket.AF_INET, KINDS[port.protocol]))
        if port.protocol == "tcp":
            vmm.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        vmm.bind(held[0].getsockname())
        if port.protocol == "tcp":
            vmm.listen()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("32768 60999", range(20000, 32768)),
        ("20000 60999", [*range(10000, 20000), *range(61000, 65536)]),
        ("1024 65535", range(1024, 65536)),  # no room: the kernel picks
    ],
)
def test_a_port_is_outside_the_range_of_the_kernel(ephemeral: Path, setting: str, expected: range) -> None:
    """So no program gets it by chance while its machine is at rest."""
    ephemeral.write_text(setting)
    for _ in range(20):
        with pick(ANY, None) as held:
            assert held.getsockname()[1] in expected


def test_a_port_of_a_record_is_not_picked(few: range, tmp_path: Path) -> None:
    """Its machine may be at rest, and then nothing listens on it."""
    database = tmp_path / "coppice.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE instances (record BLOB)")
        for number in few[:3]:
            record = to_json(make_instance(publish=(Publish(host_port=number, guest_port=1),)))
            connection.execute("INSERT INTO instances VALUES (?)", [record])
    for _ in range(5):
        with pick(ANY, database) as held:
            assert held.getsockname()[1] == few[3]


def test_a_failed_pick_holds_nothing(few: range) -> None:
    """The ports that were picked before are free again; so are those of an instance that is released."""
    picks = Picks()
    elsewhere = Publish(host_port=0, guest_port=80, host_address="192.0.2.1")
    with pytest.raises(HostCannot, match=r"192\.0\.2\.1"):
        picks.hold(make_instance(publish=(ANY, elsewhere)))
    oak = make_instance(publish=(ANY, ANY, ANY, Publish(host_port=few[0], guest_port=80)))
    picked = picks.hold(oak)
    assert picks.hold(oak) == picked
    assert {port.host_port for port in picked} == set(few)
    assert picks.release(oak.id) == picked
    assert picks.release(oak.id) is None
    with contextlib.ExitStack() as stack:
        assert {stack.enter_context(pick(ANY, None)).getsockname()[1] for _ in few} == set(few)
