"""Bootstrapping a suite: the arguments to mmdebstrap, the use of its log, and the files removed
from its result.

The real bootstrap needs a mirror; the tests with virtual machines run it.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from coppice.errors import HostCannot, ImageError, MissingTool, UsageError
from coppice.images import ImageCatalog, suite
from coppice.images.catalog import BuildOptions
from coppice.images.suite import Suite, host_mirrors, make_generic
from coppice.images.tree import Bytes, FileTree, Node
from coppice.model import Progress
from image_archives import directory, file, open_catalog, read_erofs, tar

APT_GET = """#!/bin/sh
case "$*" in
*--no-release-info*) prefix= ;;
*) prefix=$KNOWN ;;
esac
[ -n "$prefix" ] || case "$*" in *--no-release-info*) ;; *) exit 0 ;; esac
echo "Packages|Debian|http://m.example/debian/|bookworm|main"
echo "Packages|Debian|http://m.example/debian/|bookworm-updates|main"
echo "Packages|Debian|http://m.example/debian/|bookworm|main"
echo "DEP-11|Debian|http://m.example/debian/|bookworm|main"
echo "Packages|Debian|http://m.example/debian-security/|bookworm-security|main"
echo "Packages|Debian|http://m.example/debian/|bookworm|contrib"
echo "Packages|Vendor|http://vendor.example/apt/|bookworm|stable"
echo "Packages|Debian|http://m.example/debian/|trixie|main"
echo "broken"
"""


def program(directory: Path, name: str, text: str) -> None:
    """Write an executable script in `directory`."""
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that comes first in PATH, with an apt-get that has one mirror."""
    path = tmp_path / "tools"
    path.mkdir()
    program(path, "apt-get", APT_GET)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.setenv("KNOWN", "yes")
    monkeypatch.setenv("OUT", str(tmp_path))
    return path


@pytest.fixture
def catalog(tmp_path: Path) -> ImageCatalog:
    """Return an empty catalog."""
    return open_catalog(tmp_path)


@pytest.mark.parametrize("known", ["yes", ""])
def test_mirrors_come_from_the_hosts_apt(tools: Path, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    """The suite, its updates and its security archive come from the host's configuration; other
    repositories do not.
    """
    monkeypatch.setenv("KNOWN", known)
    assert host_mirrors("bookworm") == [
        "http://m.example/debian/ bookworm",
        "http://m.example/debian/ bookworm-updates",
        "http://m.example/debian-security/ bookworm-security",
    ]
    assert host_mirrors("noble") == []


async def test_a_bootstrap_becomes_an_image(
    tools: Path, catalog: ImageCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmdebstrap's archive becomes an image without traces of the host, not even its SOURCE_DATE_EPOCH."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "17")
    archive = tar(
        directory("etc"),
        file("etc/machine-id", b"0123"),
        file("etc/resolv.conf", b"nameserver 1.2.3.4"),
        file("etc/hostname", b"builder"),
        file("bin/sh", b"#!", mode=0o755),
    )
    (tmp_path / "archive").write_bytes(archive)
    program(
        tools,
        "mmdebstrap",
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT/argv"; env > "$OUT/env"\n'
        'echo "0 upgraded, 2 newly installed, 0 to remove" >&2; echo "Get:1 x" >&2\n'
        'echo "Setting up a" >&2; echo "Setting up b" >&2; cat "$OUT/archive"\n',
    )
    seen: list[Progress] = []
    image = await catalog.build_suite("debian:12", Suite(include=("python3-numpy", "curl=1:2~3")), progress=seen.append)
    found = read_erofs(catalog.root_file(image))
    assert found["/etc/machine-id"].data == b""
    assert {"/etc/resolv.conf", "/etc/hostname"}.isdisjoint(found)
    assert image.source == "bookworm minbase with python3-numpy, curl=1:2~3"
    argv = (tmp_path / "argv").read_text()
    assert "--include=python3-numpy,curl=1:2~3\n" in argv
    assert "\nbookworm\n-\ndeb http://m.example/debian/ bookworm main\n" in argv
    assert "SOURCE_DATE_EPOCH" not in (tmp_path / "env").read_text()
    assert Progress(stage="install", done=2, total=2, unit="items") in seen
    assert Progress(stage="download", done=1, unit="items") in seen


async def test_a_failed_bootstrap_quotes_the_error(tools: Path, catalog: ImageCatalog) -> None:
    """The error quotes mmdebstrap, and nothing is left."""
    program(tools, "mmdebstrap", "#!/bin/sh\necho 'I: x' >&2; echo 'E: Unable to locate package nope' >&2; exit 25\n")
    with pytest.raises(ImageError, match="Unable to locate package nope"):
        await catalog.build_suite("d", Suite(include=("nope",)))
    assert list(catalog.content.root.iterdir()) == []


@pytest.mark.parametrize(
    "said", ["E: unshare syscall failed: No space left on device", "E: unable to unshare the mount namespace"]
)
async def test_a_host_without_namespaces_is_reported_as_the_cause(
    tools: Path, catalog: ImageCatalog, said: str
) -> None:
    """The error for a user without namespaces, and for root in a container, names the host's
    restriction and a remedy.
    """
    program(tools, "mmdebstrap", f"#!/bin/sh\necho '{said}' >&2; echo 'E: chown failed' >&2; exit 1\n")
    with pytest.raises(HostCannot, match=r"namespaces.*import an image"):
        await catalog.build_suite("d", Suite())


async def test_the_deadline_ends_a_bootstrap(
    tools: Path, catalog: ImageCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bootstrap that hangs is ended with all its processes at the deadline."""
    monkeypatch.setattr(suite, "_DEADLINE_S", 0.5)
    program(tools, "mmdebstrap", '#!/bin/sh\necho "I: stuck" >&2; echo $$ > "$OUT/pid"; sleep 1000 & wait\n')
    with pytest.raises(HostCannot, match="stuck"):
        await catalog.build_suite("d", Suite())
    assert list(catalog.content.root.iterdir()) == []


async def test_cancellation_ends_a_bootstrap(tools: Path, catalog: ImageCatalog, tmp_path: Path) -> None:
    """A cancelled bootstrap leaves no process, not even a child of mmdebstrap, and no staging
    directory.
    """
    script = '#!/bin/sh\nexec 3> "$OUT/held"\necho "Get:1 x" >&2\nsleep 1000 &\nwait\n'
    program(tools, "mmdebstrap", script)
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    loop, started = asyncio.get_running_loop(), asyncio.Event()

    def progress(_: Progress) -> None:
        loop.call_soon_threadsafe(started.set)

    task = asyncio.create_task(catalog.build_suite("d", Suite(), progress=progress))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.set_blocking(held, True)
    # end of file comes when the last holder has ended
    assert await asyncio.to_thread(os.read, held, 1) == b""
    os.close(held)
    assert list(catalog.content.root.iterdir()) == []


async def test_a_missing_mmdebstrap_is_named(
    catalog: ImageCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without mmdebstrap the error names it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match="mmdebstrap"):
        await catalog.build_suite("d", Suite())


@pytest.mark.parametrize(
    "wanted",
    [
        Suite(suite="--help"),
        Suite(suite="../x"),
        Suite(include=("a,b",)),
        Suite(include=("-x",)),
        Suite(include=("/tmp/x.deb",)),
        Suite(include=("?essential",)),
    ],
)
async def test_arguments_cannot_become_options(catalog: ImageCatalog, wanted: Suite) -> None:
    """An argument that mmdebstrap would misread is refused before the start."""
    with pytest.raises(UsageError):
        await catalog.build_suite("d", wanted)


def test_machine_specific_files_are_removed(tmp_path: Path) -> None:
    """Machine ids, host keys and random seeds must not be copied to every guest."""
    tree = FileTree()
    for path in (
        "etc/machine-id",
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
        "etc/ssh/ssh_host_rsa_key",
        "etc/ssh/ssh_host_rsa_key.pub",
        "etc/ssh/sshd_config",
    ):
        tree.put(tuple(part.encode() for part in path.split("/")), Node(stat.S_IFREG | 0o600, content=Bytes(b"secret")))
    make_generic(tree)
    left = {name: node.content.size for _, name, node in tree.walk() if node.content}
    assert left == {b"machine-id": 0, b"sshd_config": 6}


async def test_a_build_behind_a_company_proxy(tools: Path, catalog: ImageCatalog, tmp_path: Path) -> None:
    """apt uses the proxy and trusts the company's authority besides those of this host. The image
    keeps the certificates, but neither the proxy nor apt's option.
    """
    (tmp_path / "archive").write_bytes(tar(file("x")))
    program(
        tools,
        "mmdebstrap",
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT/argv"; env > "$OUT/env"\n'
        'cat "$(printf "%s\\n" "$@" | sed -n "s/^--aptopt=.*CAInfo \\"\\(.*\\)\\"$/\\1/p")" > "$OUT/bundle"; cat "$OUT/archive"\n',
    )
    image = await catalog.build_suite("d", Suite(proxy="http://p:1"), options=BuildOptions(certificates=("COMPANY\n",)))
    assert (tmp_path / "bundle").read_text().endswith("COMPANY\n")
    assert "https_proxy=http://p:1\n" in (tmp_path / "env").read_text()
    assert '--customize-hook=rm "$1/etc/apt/apt.conf.d/99mmdebstrap"\n' in (tmp_path / "argv").read_text()
    assert image.config.certificates == ("COMPANY\n",)
    assert image.config.env == {}
