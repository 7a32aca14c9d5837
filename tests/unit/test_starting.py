"""Started processes: each right that is taken from one is gone, and a failure is told with its cause."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coppice.errors import HostCannot, MissingTool
from coppice.vmm import starting
from coppice.vmm.launcher import launcher_binary
from coppice.vmm.process import is_alive, kill, reap, wait_exit
from coppice.vmm.starting import Rights, spawn
from statuses import status_of

USER = 0x41000000 - 7  # below those that instances get
SLEEP = str(Path(shutil.which("sleep") or "/bin/sleep").resolve())
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="coppice-starting-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


async def said(place: Path, script: str, **rights: object) -> str:
    """What a shell with these rights prints."""
    log = place / "said"
    log.unlink(missing_ok=True)
    process = spawn(["sh", "-c", script], cwd=place, log=log, rights=Rights(**rights))  # type: ignore[arg-type]
    await wait_exit(process)
    return log.read_text()


async def test_no_file_grows_beyond_its_limit(tmp_path: Path) -> None:
    """A guest writes to its console as it likes: the log has an end, and the VMM lives on there."""
    go, tell = os.pipe()
    script = f"read word </proc/self/fd/{go}; head -c 3000000 /dev/zero; exec sleep 1000"
    process = spawn(
        ["sh", "-c", script],
        cwd=tmp_path,
        log=tmp_path / "log",
        pass_fds=[go],
        rights=Rights(largest_file=1 << 20),
    )
    os.close(go)
    os.write(tell, b"now\n")
    os.close(tell)
    async with asyncio.timeout(10):
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":  # noqa: ASYNC110 - an exec has no event
            await asyncio.sleep(0.01)
    assert (tmp_path / "log").stat().st_size == 1 << 20
    await kill(msgspec.structs.replace(process, executable=str(Path(f"/proc/{process.pid}/exe").readlink())))


async def test_limits_are_there_from_the_start(tmp_path: Path) -> None:
    """A restricted process leaves no core file, which would hold a guest's memory; limits above those of this process are no error."""
    rights = Rights(restricted=True, largest_file=1 << 20, most_files=77)
    process = spawn([SLEEP, "1000"], cwd=tmp_path, log=tmp_path / "log", rights=rights)
    try:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        for name, most in (("file size", 1 << 20), ("core file size", 0), ("open files", 77)):
            assert re.search(rf"Max {name} +{most} +{most} ", limits), limits
        assert status_of(process.pid)["NoNewPrivs"] == "1"
    finally:
        await kill(process)
    assert await said(tmp_path, "ulimit -f", largest_file=1 << 62)


async def test_what_is_returned_is_the_program(tmp_path: Path) -> None:
    """Not the launcher: a record of the launcher would be taken for dead. It is a child, and its status is known."""
    for rights in (Rights(), Rights(restricted=True, readable=("/",), writable=(".",))):
        process = spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log", rights=rights)
        assert (process.executable, is_alive(process)) == (SLEEP, True)
        os.kill(process.pid, signal.SIGTERM)
        assert await wait_exit(process) == -signal.SIGTERM
        assert reap(process) == -signal.SIGTERM
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert str(process.pid) not in children


async def test_it_starts_with_all_signals(tmp_path: Path) -> None:
    """A thread that blocks signals starts a process that does not."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        process = spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    assert int(status_of(process.pid)["SigBlk"], 16) == 0
    await kill(process)


def test_a_missing_program_is_said_so(tmp_path: Path) -> None:
    """With the way to its cure."""
    with pytest.raises(MissingTool, match="no-such-vmm") as refusal:
        spawn(["no-such-vmm"], cwd=tmp_path, log=tmp_path / "log")
    assert "doctor" in str(refusal.value)


def test_what_cannot_be_started_leaves_no_process(tmp_path: Path) -> None:
    """The working directory, the program, a namespace: the message has the step and the kernel's reason, and no zombie stays."""
    before = zombies()
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    (tmp_path / "log").touch()
    cases: list[tuple[str, Path, Rights, str]] = [
        (str(broken), tmp_path, Rights(), "execute"),
        (SLEEP, tmp_path / "missing", Rights(), "No such file"),
        (SLEEP, tmp_path, Rights(network_namespace="/run/netns/coppice-none"), "No such file"),
        (SLEEP, tmp_path, Rights(network_namespace="/proc/self/ns/uts"), "enter the network namespace"),
        (SLEEP, tmp_path, Rights(cgroup=tmp_path), "in its control group"),
    ]
    for program, cwd, rights, word in cases:
        with pytest.raises(HostCannot, match=word):
            spawn([program], cwd=cwd, log=tmp_path / "log", rights=rights)
    deadline = time.monotonic() + 10
    while zombies() - before and time.monotonic() < deadline:  # children of other threads are soon collected
        time.sleep(0.01)
    assert zombies() - before == set()


def zombies() -> set[str]:
    """Return the ended children of this process that nobody has waited for."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in found if Path("/proc", pid).exists() and status_of(int(pid))["State"].startswith("Z")}


def test_a_user_without_namespaces_is_told_how_to_permit_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU before 8.2 needs one if this user is not root."""

    def refused(said: bytes) -> str:
        return f"failed {errno.ENOSPC} make a user namespace\n{said.decode()}"

    real = starting._started
    monkeypatch.setattr(starting, "_started", lambda said, *others: real(refused(said.encode()), *others))
    with pytest.raises(HostCannot, match="user namespace") as refusal:
        spawn(["true"], cwd=tmp_path, log=tmp_path / "log")
    assert "doctor" in (refusal.value.hint or "")


@as_root
async def test_its_own_user_has_nothing_of_root(place: Path) -> None:
    """No user, group or capability of root is left, in no set, and none can be gained."""
    rights = Rights(restricted=True, user=USER, groups=(4242,), capabilities=0)
    process = spawn([SLEEP, "1000"], cwd=place, log=place / "log", rights=rights)
    try:
        status = status_of(process.pid)
        assert status["Uid"].split() == status["Gid"].split() == [str(USER)] * 4
        assert status["Groups"].split() == ["4242"]
        assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
    finally:
        await kill(process)
    own = status_of(os.getpid())
    assert (own["NoNewPrivs"], own["Uid"].split()[0]) == ("0", "0")


@as_root
async def test_root_that_stays_root_keeps_no_more_than_it_is_left(place: Path) -> None:
    """The capabilities that QEMU needs until it has opened its files; Firecracker none."""
    for mask in (0, 1 << 6 | 1 << 7):
        process = spawn(
            [SLEEP, "1000"], cwd=place, log=place / "log", rights=Rights(restricted=True, capabilities=mask)
        )
        status = status_of(process.pid)
        assert {int(status[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Bnd")} == {mask}
        await kill(process)


@as_root
async def test_a_program_that_its_user_cannot_reach_is_run(tmp_path: Path) -> None:
    """Its directory is root's alone, as a VMM's may be; no file of it can be opened by its path afterwards."""
    program = tmp_path / "vmm"
    shutil.copy(SLEEP, program)
    tmp_path.chmod(0o700)
    process = spawn([str(program), "1000"], cwd=tmp_path, log=tmp_path / "log", rights=Rights(user=USER))
    assert process.executable == str(program)
    await kill(process)


@as_root
def test_it_starts_in_its_network_namespace(place: Path) -> None:
    """The caller stays in its own."""
    before = Path("/proc/thread-self/ns/net").readlink()
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; read word"], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        namespace = f"/proc/{other.pid}/ns/net"
        process = spawn(
            [SLEEP, "9"], cwd=place, log=place / "log", rights=Rights(network_namespace=namespace, user=USER)
        )
        try:
            assert Path(f"/proc/{process.pid}/ns/net").readlink() == Path(namespace).readlink() != before
            assert Path("/proc/thread-self/ns/net").readlink() == before
        finally:
            asyncio.run(kill(process))
            other.communicate(b"\n")


async def test_files_that_no_rule_names_are_closed(place: Path) -> None:
    """Landlock refuses reads, writes and execution outside the directory and the rules, for any owner."""
    if not starting.landlock_version():
        pytest.skip("this kernel has no Landlock")
    other = place / "other"
    own = place / "own"
    for directory in (other, own):
        directory.mkdir()
        (directory / "file").write_text("secret")
    script = (
        f"cat file; cat {other}/file; echo x > {other}/made; ln {other}/file linked; cp /bin/true run; ./run; "
        "echo made > made; cat made; true < /dev/null; rm made; test -e made || echo gone"
    )
    libraries = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
    text = await said(own, script, restricted=True, readable=libraries, writable=(".", "/dev/null"))
    assert "secret" in text
    assert text.count("secret") == 1
    assert text.count("ermission denied") >= 3, text  # cat, echo, ./run
    assert "made\n" in text
    assert text.endswith("gone\n")
    assert sorted(entry.name for entry in other.iterdir()) == ["file"]
    assert not (own / "linked").exists()


async def test_processes_and_abstract_sockets_of_others_are_out_of_reach(place: Path) -> None:
    """Also those of the same user, where the kernel can tell them apart."""
    if starting.landlock_version() < 6:
        pytest.skip("this kernel's Landlock has no scopes")
    script = f"kill -0 {os.getpid()} || echo refused; kill -0 $$ && echo own"
    text = await said(place, script, restricted=True, readable=("/usr", "/lib", "/lib64", "/bin"), writable=(".",))
    assert text.endswith("refused\nown\n")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0coppice-{os.getpid()}")
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + 'coppice-{os.getpid()}')"
        python = Path(os.path.realpath(shutil.which("python3") or "python3"))
        text = await said(
            place, f'{python} -S -c "{code}"', restricted=True, readable=("/usr", "/lib", "/lib64", "/bin", str(python.parent.parent)), writable=(".",)
        )  # fmt: skip
        assert "PermissionError" in text


async def test_root_of_its_own_namespace_is_nobody_elsewhere(place: Path) -> None:
    """For QEMU before 8.2: it opens immutable files of its user for writing, and gains nothing."""
    (place / "immutable").touch(mode=0o444)
    text = await said(place, "id -u; : >> immutable && echo opened; cat /proc/self/uid_map", own_user_namespace=True)
    numbers = text.split()
    assert numbers[:2] == ["0", "opened"]
    assert numbers[2:] == ["0", str(os.geteuid()), "1"]


def test_the_launcher_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """A wheel and a binary of two versions: a right that is not understood is not left to the process."""
    for words in (["report=1", "frobnicate=1", "--", "/bin/true"], ["report=1", "--"], ["user=x"], ["report=99"]):
        done = subprocess.run(
            [launcher_binary(), *words], capture_output=True, text=True, timeout=20, cwd=tmp_path, check=False
        )
        assert (done.returncode, done.stderr[:17]) == (2, "coppice-launcher:")
