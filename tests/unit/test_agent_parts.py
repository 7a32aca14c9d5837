"""The agent's effects on its own machine, with the real code in separate namespaces: the files of
/etc, the network card, the identity.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from agent_process import compile_agent
from coppice.agent.control import Identity, encode_identity
from coppice.agent.protocol import Fields, FrameType

ADDRESS, GATEWAY = "10.0.2.15/24", "10.0.2.2"
FIRST, SECOND = "02:00:00:00:00:01", "02:00:00:00:00:02"


@functools.cache
def parts() -> Path:
    """Compile the agent's parts, with `tests/agent_parts.c` instead of its main program."""
    return compile_agent("parts", Path(__file__).parents[1] / "agent_parts.c")


def guest(tmp_path: Path, script: str, *steps: str) -> str:
    """Run a shell script and then the agent's parts as root of new namespaces, with an empty /etc,
    /run and /var/lib; return their output.
    """
    command = f"""set -e
    cp -a /etc/passwd /etc/group {tmp_path} 2>/dev/null
    mount -t tmpfs tmpfs /etc && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mkdir /run/coppice
    cp {tmp_path}/passwd {tmp_path}/group /etc
    {script}
    exec "$@" """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "--net", "--uts", "sh", "-c", command, "sh", parts(), *steps],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not as it was" not in done.stderr
    return done.stdout


def identity(**fields: object) -> str:
    """Return an IDENTITY step."""
    message = Identity(serial=1, entropy=bytes(32), **fields)  # type: ignore[arg-type]
    return f"identity={encode_identity(message).hex()}"


def answer(line: str) -> tuple[FrameType, Fields]:
    """Return the agent's answer to an IDENTITY step."""
    frame = bytes.fromhex(line)
    return FrameType(frame[0]), Fields(frame[1:])


# ---- files ----


def test_a_large_hosts_file_is_kept_whole(tmp_path: Path) -> None:
    """A block list of 2.6 MB keeps every line and gains the machine's own name; a second name
    replaces the first.
    """
    lines = [f"0.0.0.0 advertiser-{number:06}.example" for number in range(70_000)]
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 older\n" + "\n".join(lines))
    result = tmp_path / "result"
    guest(tmp_path, f"cp {tmp_path}/hosts /etc", "own-files", "hosts=oak", "hosts=elm", f"sh=cp /etc/hosts {result}")
    assert result.read_text().splitlines() == ["127.0.0.1 localhost", *lines, "127.0.1.1 elm"]


@pytest.mark.parametrize("name", ["hosts", "resolv.conf", "hostname"])
def test_a_file_of_the_image_is_never_truncated(tmp_path: Path, name: str) -> None:
    """Each file of /etc that the agent replaces in memory starts with the image's whole file,
    whatever its size.
    """
    (tmp_path / name).write_text("# a comment\n" * 20_000)
    result = tmp_path / "result"
    guest(tmp_path, f"cp {tmp_path}/{name} /etc", "own-files", f"sh=cp /etc/{name} {result}")
    assert result.read_bytes() == (tmp_path / name).read_bytes()


def test_a_dangling_link_becomes_a_file(tmp_path: Path) -> None:
    """/etc/resolv.conf as systemd-resolved leaves it is a dangling link in a machine: a file
    replaces it.
    """
    told = guest(
        tmp_path, "ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf", "own-files",
        "resolv=nameserver 10.0.2.3\n", "sh=cat /etc/resolv.conf",
    )  # fmt: skip
    assert told == "nameserver 10.0.2.3\n"


def test_name_servers_of_the_owner_are_kept(tmp_path: Path) -> None:
    """A fork gets new name servers only if /etc/resolv.conf is still the file that Coppice wrote:
    an owner's choice is never overwritten.
    """
    told = guest(
        tmp_path, "", "own-files", "resolv=nameserver 10.0.2.3\n", "resolv=nameserver 10.0.3.3\n", "sh=cat /etc/resolv.conf",
        "sh=echo nameserver 9.9.9.9 > /etc/resolv.conf", "resolv=nameserver 10.0.4.3\n", "sh=cat /etc/resolv.conf",
    )  # fmt: skip
    assert told == "nameserver 10.0.3.3\nnameserver 9.9.9.9\n"


@pytest.mark.parametrize("size", [0, (1 << 16) + 256, 3 << 20])
def test_a_guest_file_is_placed_whole(tmp_path: Path, size: int) -> None:
    """Files of the initramfs arrive in /run/coppice whole, whatever their size, and leave the initramfs."""
    result, files = tmp_path / "result", tmp_path / "files"
    files.mkdir()
    (files / "library.so").write_bytes(content := (bytes(range(256)) * (size // 256)))
    # The agent also changes these directories, which are this machine's own.
    own = "mount -t tmpfs tmpfs /usr/lib/ssl && mount -t tmpfs tmpfs /dev"
    guest(tmp_path, own, f"guest-files={files}", f"sh=cp /run/coppice/library.so {result}")
    assert result.read_bytes() == content
    assert not list(files.iterdir())


# ---- the network card ----

_CARD = """
ip link add card type veth peer name wire
ip link set lo up && ip link set wire up
# The agent takes the first card: of a pair that is the peer.
card=wire
ip link set card up
"""
_ROUTE = "sh=ip route add 192.168.9.0/24 via 10.0.2.7"
_SHOW = "sh=ip -o link show wire | sed 's|.*link/ether ||; s| .*||'; ip -4 -o addr show wire | wc -l; ip -4 route show dev wire | sed 's/ *$//'"


def _shown(mac: str) -> list[str]:
    return [
        mac,
        "1",
        "default via 10.0.2.2 onlink",
        "10.0.2.0/24 proto kernel scope link src 10.0.2.15",
        "192.168.9.0/24 via 10.0.2.7",
    ]


def _network(mac: str, address: str = ADDRESS) -> str:
    return f"network={mac},{address},{GATEWAY}"


def test_a_card_that_changes_its_mac_only_while_it_is_down_keeps_its_routes(tmp_path: Path) -> None:
    """The card is set down for the change, which deletes its routes: the agent restores the default
    route and the owner's own.
    """
    told = guest(tmp_path, _CARD, _network(FIRST), _ROUTE, "refuse-mac=up", _network(SECOND), _SHOW).splitlines()
    assert told == ["0", "0", *_shown(SECOND)]


def test_a_card_that_refuses_a_mac_is_left_as_it_was(tmp_path: Path) -> None:
    """The change fails, and the card is up with its old address and routes."""
    told = guest(tmp_path, _CARD, _network(FIRST), _ROUTE, "refuse-mac=always", _network(SECOND), _SHOW).splitlines()
    assert told == ["0", "16", *_shown(FIRST)]


def test_a_refused_gateway_leaves_the_address_as_it_was(tmp_path: Path) -> None:
    """The steps before the failed one are undone: MAC, address and routes are the old ones."""
    told = guest(
        tmp_path, _CARD, _network(FIRST), _ROUTE, f"network={SECOND},10.9.0.1/24,224.0.0.1", _SHOW
    ).splitlines()
    assert told[0] == "0"
    assert told[1] != "0"
    assert told[2:] == _shown(FIRST)


def test_no_address_of_the_source_stays(tmp_path: Path) -> None:
    """A new identity replaces all addresses of the card, however many there are."""
    many = "for n in $(seq 1 60); do ip addr add 10.3.0.$n/32 dev wire; done"
    told = guest(tmp_path, _CARD + many, _network(FIRST), _SHOW).splitlines()
    assert told[:3] == ["0", FIRST, "1"]


def test_an_unchanged_network_setting_keeps_the_owners_changes(tmp_path: Path) -> None:
    """Changes made inside the guest stay if the host sends the same setting again; a setting sent
    for the first time is applied.
    """
    mine = "sh=ip link set wire address 02:00:00:00:00:99; ip addr flush dev wire; ip addr add 10.7.0.1/16 dev wire"
    show = "sh=ip -o link show wire | sed 's|.*link/ether ||; s| .*||'; ip -4 -o addr show wire | sed 's/.*inet //; s/ .*//'"
    told = guest(tmp_path, _CARD, _network(FIRST), mine, _network(FIRST), show, _network(SECOND), show).splitlines()
    assert told == ["0", "0", "02:00:00:00:00:99", "10.7.0.1/16", "0", SECOND, "10.7.0.1/16"]


_OFF = "echo 1 >/proc/sys/net/ipv6/conf/wire/disable_ipv6\n"
_SHOW6 = "sh=ip -6 -o addr show dev wire | sed 's/.*inet6 //; s/ .*//'; ip -6 route show default dev wire | sed 's/ metric.*//'"


def test_a_card_has_only_the_requested_ipv6_address(tmp_path: Path) -> None:
    """The card has no IPv6 address before the request, and none derived from the MAC after it. The
    address and its route stay when a new MAC sets the card down.
    """
    six = "fd00:5::2/126,fd00:5::1"
    told = guest(
        tmp_path,
        _CARD + _OFF,
        _network(FIRST),
        _SHOW6,
        f"{_network(FIRST)},{six}",
        _SHOW6,
        "refuse-mac=up",
        f"{_network(SECOND)},{six}",
        _SHOW6,
    ).splitlines()
    assert told == ["0", "0", "fd00:5::2/126", "default via fd00:5::1", "0", "fd00:5::2/126", "default via fd00:5::1"]


def test_a_new_ipv6_address_replaces_the_old_one(tmp_path: Path) -> None:
    """The gateway is replaced too. An invalid address leaves the card unchanged."""
    words = [
        f"{_network(FIRST)},{each}" for each in ("fd00:5::2/126,fd00:5::1", "fd00:6::2/64,fd00:6::1", "fd00::/200,")
    ]
    told = guest(tmp_path, _CARD + _OFF, *words, _SHOW6).splitlines()
    assert told == ["0", "0", "22", "fd00:6::2/64", "default via fd00:6::1"]


# ---- identities ----


def test_a_missing_working_directory_is_made(tmp_path: Path) -> None:
    """The agent makes the process's working directory and its parents, as container runtimes do."""
    result = tmp_path / "result"
    line = guest(
        tmp_path, "",
        identity(start_process=True, argv=("/bin/sh", "-c", f"pwd > {result}"), cwd="/var/lib/app/data"),
    )  # fmt: skip
    assert answer(line)[0] is FrameType.OK
    assert result.read_text() == "/var/lib/app/data\n"


def test_a_working_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """If a file is in the way, the refusal names the path."""
    kind, fields = answer(guest(tmp_path, "", identity(start_process=True, argv=("true",), cwd="/etc/passwd/app")))
    assert kind is FrameType.ERROR
    assert fields.text(2) == "image: /etc/passwd/app: Not a directory"


@pytest.mark.parametrize(
    ("path", "mount", "step"),
    [
        ("/var/lib/systemd/random-seed", "/var/lib", "random-seed"),
        ("/etc/ssh/ssh_host_rsa_key", "/etc", "ssh-host-keys"),
    ],
)
def test_a_seed_or_key_that_cannot_be_removed_is_named(tmp_path: Path, path: str, mount: str, step: str) -> None:
    """On a read-only root a seed or key cannot be removed: the identity is refused, and the refusal
    names the file.
    """
    script = f"mkdir -p {Path(path).parent} && touch {path} && mount -o remount,ro {mount}"
    kind, fields = answer(guest(tmp_path, script, identity(new_machine=True)))
    assert kind is FrameType.ERROR
    assert fields.text(2).startswith(f"{step}: ")
    assert Path(path).name in fields.text(2)
    assert fields.text(2).endswith(": Read-only file system")


def test_keys_that_cannot_be_looked_for_are_an_error(tmp_path: Path) -> None:
    """If the directory of the keys cannot be read, the identity is refused: it may hold the source's keys."""
    kind, fields = answer(guest(tmp_path, "ln -s ssh /etc/ssh", identity(new_machine=True)))
    assert kind is FrameType.ERROR
    assert fields.text(2) == "ssh-host-keys: /etc/ssh: Too many levels of symbolic links"


def test_a_read_only_root_without_seeds_is_forked(tmp_path: Path) -> None:
    """The fork succeeds because there is nothing to remove, although the kernel answers each
    removal with EROFS.
    """
    line = guest(tmp_path, "mount -o remount,ro /var/lib && mount -o remount,ro /etc", identity(new_machine=True))
    assert answer(line)[0] is FrameType.OK


def test_every_name_server_is_written(tmp_path: Path) -> None:
    """No server of a long list is left out."""
    servers = tuple(f"10.0.2.{number}" for number in range(1, 31))
    told = guest(tmp_path, "", identity(dns=servers), "sh=cat /etc/resolv.conf").splitlines()
    assert answer(told[0])[0] is FrameType.OK
    assert told[1:] == [f"nameserver {server}" for server in servers]
