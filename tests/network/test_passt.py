"""passt: machines of a user who is not root, with published ports, IPv6 and names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.errors import HostCannot, MissingTool, UsageError
from coppice.model import Publish
from coppice.model.network import Nic, NicBackend
from coppice.network.passt import PasstNetwork
from coppice.vmm import helpers
from machines import GUEST_MEMORY, IMAGE, link_caches
from remains import machines_ended
from worlds import HOST4, HOST6, WORLD4, WORLD6, World

USER = 54321
DEADLINE_S = 400
# Read access alone is root's: the checkout may be in a directory that others cannot enter.
RIGHTS = "-all,+dac_read_search"
AS_USER = (
    *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"),
    *("--inh-caps", RIGHTS, "--ambient-caps", RIGHTS, "--bounding-set", RIGHTS, "--"),
)
SCRIPT = Path(__file__).parents[1] / "passt_user.py"
LINGERS = """
import os, socket, sys
if os.fork(): os._exit(0)
held = os.open(sys.argv[1], os.O_WRONLY)
socket.socket(fileno=int(sys.argv[2])).recv(1)
"""


@pytest.fixture
def home_of_user(common_home: Path) -> Iterator[Path]:
    """A data directory of another user."""
    with tempfile.TemporaryDirectory(prefix="coppice-passt-", dir=common_home.parent) as made:
        link_caches(common_home, Path(made) / "linked")
        shutil.copytree(Path(made) / "linked", Path(made) / "home")
        for path in (Path(made), *(Path(made) / "home").rglob("*"), Path(made) / "home"):
            os.chown(path, USER, USER)
        with machines_ended(Path(made) / "home"):
            yield Path(made) / "home"


@pytest.mark.quiet  # other tests' connections could take its picked ports while its machine is at rest
@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.usefixtures("name_server")
def test_a_user_who_is_not_root_has_machines_on_the_network(
    world: World, home_of_user: Path, resolv_conf: Path
) -> None:
    """Out by both families and by name; in by published ports, of each fork its own; and nothing is
    left of passt when a machine has ended in any way. The loopback of the host is closed.
    """
    for address in (WORLD4, WORLD6):
        world.world.serve(address, 8000)
    port = world.host.serve("127.0.0.1", 0)
    words = [str(home_of_user), IMAGE, str(GUEST_MEMORY), HOST6, WORLD4, WORLD6, str(port)]
    with_resolver = f'mount --bind {resolv_conf} /etc/resolv.conf && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", with_resolver, "sh", *AS_USER, sys.executable, str(SCRIPT), *words]
    ran = world.host.run(
        lambda: subprocess.run(
            command,
            env={**os.environ, "HOME": str(home_of_user), "TMPDIR": str(home_of_user.parent)},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen.pop("loopback") in {"ConnectionRefusedError", "TimeoutError", "OSError"}
    assert seen == {
        "out": [HOST4, HOST6],
        "name": WORLD4,
        "mtu": "65520",
        "passts": 2,
        "heard": [["web-1"] * 3, ["web-2"] * 3],
        "restored": ["web-1"] * 3,
        "forked out": HOST6,
    }


def test_a_helper_that_does_not_start_is_an_error() -> None:
    """Its last words are in it, and nothing stays open."""
    nic = Nic(backend=NicBackend.STREAM, mac="02:00:00:00:00:01", helper=("sh", "-c", "echo no uplink >&2; exit 1"))
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(HostCannot, match="no uplink"), helpers.started([nic]):
        pass
    missing = Nic(backend=NicBackend.STREAM, mac="02:00:00:00:00:01", helper=("no-such-program",))
    with pytest.raises(MissingTool, match="no-such-program"), helpers.started([missing]):
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_helper_ends_with_its_vmm(tmp_path: Path) -> None:
    """The block has the VMM's end only until the VMM has inherited it."""
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    nic = Nic(backend=NicBackend.STREAM, mac="02:00:00:00:00:01", helper=(sys.executable, "-c", LINGERS, str(fifo)))
    with helpers.started([nic]) as ends:
        vmm = socket.socket(fileno=os.dup(ends[nic]))
    with vmm:
        vmm.settimeout(0.5)
        with pytest.raises(TimeoutError):  # the helper still has its end
            vmm.recv(1)
    os.set_blocking(held, True)
    assert os.read(held, 1) == b""
    os.close(held)


def test_a_port_leads_to_one_place() -> None:
    """passt maps the number of a port, whatever its address is."""
    ports = [Publish(host_port=8080, guest_port=80), Publish(host_port=8080, guest_port=81, host_address="127.0.0.2")]
    with pytest.raises(UsageError, match="8080"):
        PasstNetwork().check(ports)
    PasstNetwork().check([ports[0], Publish(host_port=8080, guest_port=80, host_address="127.0.0.2")])
