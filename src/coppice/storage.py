"""A file system with reflinks for the data directory, in a sparse file next to it. Needs root.

    HOME.xfs        a sparse file with an XFS; HOME is where it is mounted
    UNIT            a mount unit of systemd, which mounts it again after a reboot

All functions block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot, InUse, MissingTool, NoSpace, NotFound, Refused, UsageError
from coppice.linux.files import os_errors, publish, sync, temporary_beside
from coppice.linux.reflinks import has_reflinks
from coppice.linux.tool import run_tool
from coppice.model import GIB, MIB, Record

UNITS: Final = Path("/etc/systemd/system")
_WANTS: Final = "local-fs.target.wants"
_RUNNING: Final = Path("/run/systemd/system")  # exists while systemd is process 1
_LEAST: Final = 300 * MIB  # of mkfs.xfs
_OPTIONS: Final = "loop,discard,noatime,nosuid,nodev"
_DEADLINE_S: Final = 300.0
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_UNIT_HEAD: Final = "[Unit]\nDescription=Data directory of Coppice"
_KEPT: Final = ("config.toml", "server.key")  # settings, which `remove` keeps
_CONTENT: Final = ("instances", "snapshots", "volumes", "images")


class Storage(Record, frozen=True, kw_only=True):
    """The file system of a data directory. `unit` None: nothing mounts it after a reboot."""

    home: str
    file: str
    size_bytes: int
    unit: str | None = None


def file_of(home: Path) -> Path:
    """Return the path of the file for a data directory."""
    return home.with_name(f"{home.name}.xfs")


def unit_name(home: Path) -> str:
    """Return the name of the mount unit of a directory, which systemd prescribes."""
    text = str(home).strip("/")
    characters = (
        "-"
        if each == "/"
        else each
        if (each.isascii() and each.isalnum()) or each in ":_" or (each == "." and at)
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(each))
        for at, each in enumerate(text)
    )
    return f"{''.join(characters)}.mount"


def init(home: Path, size_bytes: int, *, units: Path = UNITS) -> Storage:
    """Make the file system and mount it at the data directory. If it fails, nothing is left.

    A file that a killed call has left is mounted.

    :raises Refused: the data directory has reflinks already, or a mount unit that Coppice has not made
    :raises InUse: the data directory is not empty
    :raises NoSpace: the disk has less free space than `size_bytes`
    :raises HostCannot: this user is not root, or the host cannot mount the file
    """
    home = home.resolve()
    _require_root()
    file = file_of(home)
    mount = units / unit_name(home)
    if not _is_ours(mount):
        raise Refused(f"{mount} exists, and Coppice has not made it", hint=f"move it away, and unmount {home}")
    _require_unused(home, file)
    if size_bytes < _LEAST:
        raise UsageError(f"an XFS cannot have {size_bytes} bytes", hint=f"ask for at least {_LEAST // MIB}M")
    with contextlib.ExitStack() as undo, os_errors(f"make the file system of {home}"):
        home.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(file):
            _make(file, size_bytes)
            undo.callback(file.unlink)
        existed = home.exists()
        home.mkdir(mode=0o700, exist_ok=True)
        if not existed:
            undo.callback(home.rmdir)
        settings = [(path, path.read_bytes()) for name in _KEPT if (path := home / name).exists()]
        _mount(file, home)
        undo.callback(_run, "umount", str(home))
        home.chmod(0o700)
        for path, content in settings:
            path.touch(mode=0o600)
            path.write_bytes(content)
        undo.callback(_remove_unit, home, units)
        unit = _write_unit(home, file, units)
        undo.pop_all()
    return Storage(home=str(home), file=str(file), size_bytes=file.stat().st_size, unit=unit)


def grow(home: Path, size_bytes: int) -> Storage:
    """Enlarge the file system, which stays in use. A killed call can be repeated.

    :raises NotFound: `init` has not made the file system
    :raises UsageError: it is larger already
    :raises NoSpace: the disk has less free space than the growth
    """
    home = home.resolve()
    _require_root()
    file, device = _mounted(home)
    before = file.stat().st_size
    if size_bytes < before:
        raise UsageError(
            f"{file} has {_text(before)}, and an XFS cannot shrink", hint="give a larger size, such as --size 200G"
        )
    _require_space(file, size_bytes - before)
    with os_errors(f"grow {file}"):
        os.truncate(file, size_bytes)
        sync(file)
    _run("losetup", "--set-capacity", device)
    _run("xfs_growfs", str(home))
    return Storage(home=str(home), file=str(file), size_bytes=size_bytes)


def remove(home: Path, *, units: Path = UNITS) -> None:
    """Unmount the file system and remove its file. The settings stay.

    :raises NotFound: `init` has not made the file system
    :raises InUse: it has machines, snapshots, volumes or images, or a program uses it
    """
    home = home.resolve()
    _require_root()
    file = file_of(home)
    if _backing_of(home) is None and file.exists():  # a killed call, or a reboot without systemd
        _require_unused(home, file)
        home.mkdir(mode=0o700, exist_ok=True)
        _mount(file, home)
    _mounted(home)
    if found := _content_of(home):
        raise InUse(f"{home} still has {found}", hint="remove them with `coppice rm`, `coppice image rm` and the like")
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".coppice-settings-") as kept:
        for name in _KEPT:
            if (home / name).exists():
                shutil.copy2(home / name, kept)
        _run("umount", str(home))
        with os_errors(f"remove {file}"):
            _remove_unit(home, units)
            file.unlink()
            for each in Path(kept).iterdir():
                shutil.move(each, home / each.name)
            sync(home.parent)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise HostCannot("only root can mount a file system", hint="run the command with sudo")
    for program, package in (("mkfs.xfs", "xfsprogs"), ("losetup", "mount")):
        if shutil.which(program, path=_ENVIRONMENT["PATH"]) is None:
            raise MissingTool(f"{program} is not installed", hint=f"run `apt-get install {package}`")


def _require_unused(home: Path, file: Path) -> None:
    """Check that a file system can be mounted at the data directory."""
    if _backing_of(home) == file:
        raise Refused(f"{home} is on {file} already", hint="enlarge it with `coppice storage grow --size SIZE`")
    if home.is_dir() and any(each.name not in _KEPT for each in home.iterdir()):
        has = _content_of(home) or "files"
        raise InUse(
            f"{home} is not empty: it has {has}",
            hint=f"move it aside with `mv {home} {home}.old`, and run this again; running machines go on, and "
            f"`COPPICE_HOME={home}.old coppice ls` shows them",
        )
    where = next(each for each in (home, *home.parents) if each.is_dir())
    if has_reflinks(where):
        raise Refused(f"the file system of {home} has reflinks already", hint="use it as it is")


def _require_space(file: Path, size_bytes: int) -> None:
    """Check for the free space that the file may take: a full host damages the XFS in it."""
    disk = os.statvfs(file.parent)
    free = disk.f_bavail * disk.f_frsize
    if size_bytes > free:
        raise NoSpace(
            f"{file} may take {_text(size_bytes)} more, and {file.parent} has {_text(free)} free",
            hint="choose a smaller size with --size",
        )


def _make(file: Path, size_bytes: int) -> None:
    _require_space(file, size_bytes)
    temporary = temporary_beside(file)
    try:
        with temporary.open("xb") as output:
            os.fchmod(output.fileno(), 0o600)
            output.truncate(size_bytes)
        _run("mkfs.xfs", "-q", "-m", "reflink=1", str(temporary))
        sync(temporary)
        publish(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _mount(file: Path, home: Path) -> None:
    _run("mount", "-t", "xfs", "-o", _OPTIONS, str(file), str(home))


def _run(program: str, *arguments: str) -> None:
    """Run a tool as root.

    :raises InUse: umount says that the file system is in use
    :raises HostCannot: it failed
    """
    ran = run_tool(
        program,
        *arguments,
        environment=_ENVIRONMENT,
        deadline_s=_DEADLINE_S,
        cure="run `apt-get install xfsprogs mount util-linux`",
    )
    if ran.status == 0:
        return
    if program == "umount":
        raise InUse(
            f"{arguments[-1]} is in use: {ran.failure()}",
            hint=f"end the server and the shells in it; `fuser -vm {arguments[-1]}` lists them",
        )
    raise HostCannot(f"{program} failed: {ran.failure()}", hint="in a container, run it on the host instead")


def _backing_of(home: Path) -> Path | None:
    """Return the file that is mounted at a directory through a loop device, or None."""
    if not os.path.ismount(home):
        return None
    device = home.stat().st_dev
    backing = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/loop/backing_file")
    try:
        return Path(backing.read_text().rstrip("\n"))
    except OSError:
        return None


def _mounted(home: Path) -> tuple[Path, str]:
    """Return the file of the data directory and its loop device.

    :raises NotFound: another file system is mounted there, or none
    """
    file = file_of(home)
    if _backing_of(home) != file:
        raise NotFound(f"{home} has no file system of its own", hint="make one with `coppice storage init --size 100G`")
    device = home.stat().st_dev
    return file, f"/dev/{Path(f'/sys/dev/block/{os.major(device)}:{os.minor(device)}').resolve().name}"


def _content_of(home: Path) -> str:
    """Return what a data directory has, such as `2 instances and 1 images`; empty if nothing."""
    counts = {name: sum(not each.name.startswith(".") for each in _listed(home / name)) for name in _CONTENT}
    counts["kernels of its own"] = sum(each.name.startswith("custom-") for each in _listed(home / "kernels"))
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)


def _listed(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from directory.iterdir()


def _write_unit(home: Path, file: Path, units: Path) -> str | None:
    """Have systemd mount the file after a reboot. Return the unit's path; None without systemd.

    systemd itself orders the mount after those of the paths that it names.
    """
    if not units.is_dir():
        return None
    unit = units / unit_name(home)
    what, where = (str(path).replace("%", "%%") for path in (file, home))
    unit.write_text(
        f"{_UNIT_HEAD}\nBefore=local-fs.target\n\n"
        f"[Mount]\nWhat={what}\nWhere={where}\nType=xfs\nOptions={_OPTIONS}\n\n"
        "[Install]\nWantedBy=local-fs.target\n"
    )
    wants = units / _WANTS
    wants.mkdir(exist_ok=True)
    (wants / unit.name).unlink(missing_ok=True)
    (wants / unit.name).symlink_to(unit)
    for path in (unit, wants, units):
        sync(path)
    _reload()
    return str(unit)


def _remove_unit(home: Path, units: Path) -> None:
    wants = units / _WANTS
    for path in (wants / unit_name(home), units / unit_name(home)):  # the link first
        if _is_ours(path):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other units are in it; systemd removes an empty one too
        wants.rmdir()
    _reload()


def _is_ours(unit: Path) -> bool:
    """Return whether Coppice has made a unit, or there is none."""
    try:
        return unit.read_text(errors="replace").startswith(_UNIT_HEAD)
    except FileNotFoundError:  # also a link to nothing, which `remove` has left if it was killed
        return True


def _reload() -> None:
    if _RUNNING.is_dir():
        _run("systemctl", "daemon-reload")


def _text(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
