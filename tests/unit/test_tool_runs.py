"""External programs have a deadline, are ended as a whole process group, and end soon after a
cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coppice.completion import in_thread
from coppice.errors import HostCannot, MissingTool
from coppice.linux.tool import NotFinished, Ran, run_tool

SOURCES = Path(__file__).parents[2] / "src" / "coppice"
# enough for a loaded machine; without a cancellation the programs here would run for 1000 s
SOON_S = 10.0


class Tool:
    """A shell script that is run as an external program."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "tool"
        self.held = directory / "held"
        os.mkfifo(self.held)
        self.held_end = os.open(self.held, os.O_RDONLY | os.O_NONBLOCK)

    def __call__(self, script: str, **options: object) -> Ran:
        self.path.write_text(f'#!/bin/sh\nexec 9> "{self.held}"\n{script}\n')
        self.path.chmod(0o755)
        environment = {"PATH": f"{self.path.parent}:/usr/bin:/bin"}
        settings: dict[str, object] = {"deadline_s": 60.0, "environment": environment, "cure": "install it"} | options
        return run_tool("tool", **settings)  # type: ignore[arg-type]  # a table of options

    async def all_gone(self) -> None:
        """Wait until no process of the tool is left: the last one closes the pipe."""
        os.set_blocking(self.held_end, True)
        async with asyncio.timeout(SOON_S):
            assert await asyncio.to_thread(os.read, self.held_end, 1) == b""


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    """Return a tool of the test."""
    return Tool(tmp_path)


def test_the_output_and_the_status_are_returned(tool: Tool) -> None:
    """Both streams are returned line by line, including an unfinished last line; any status is
    accepted.
    """
    seen: list[str] = []
    ran = tool("echo one; echo two >&2; printf three; exit 3", line=seen.append)
    assert (ran.status, ran.lines, seen) == (3, ("one", "two", "three"), ["one", "two", "three"])


def test_output_can_go_to_a_file(tool: Tool) -> None:
    """Only the errors are then returned as lines."""
    with tempfile.TemporaryFile() as output:
        ran = tool("echo data; echo 'E: no' >&2; exit 1", output=output)
        output.seek(0)
        assert (output.read(), ran.failure()) == (b"data\n", "no")


def test_large_output_is_read_as_it_comes(tool: Tool) -> None:
    """All output is read as it comes, but only its end is kept."""
    ran = tool("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
    assert (ran.status, len(ran.lines), ran.lines[-1]) == (0, 200, "19999")


async def test_a_child_left_behind_does_not_delay_the_result(tool: Tool) -> None:
    """A run ends with the program itself, even if a child has its output open; the child is ended
    too.
    """
    async with asyncio.timeout(SOON_S):
        ran = await in_thread(tool, "sleep 1000 & echo done")
    assert ran.lines == ("done",)
    await tool.all_gone()


async def test_the_deadline_ends_the_program_and_its_children(tool: Tool) -> None:
    """The error quotes the program's last line."""
    with pytest.raises(NotFinished, match=r"tool did not finish within 0.3 s; its last output: stuck"):
        tool("echo stuck; sleep 1000 & wait", deadline_s=0.3)
    await tool.all_gone()


async def test_a_program_that_prints_without_end_is_ended_at_its_deadline(tool: Tool) -> None:
    """The deadline is checked even while output keeps coming."""
    with pytest.raises(NotFinished):
        tool("exec yes", deadline_s=0.3)
    await tool.all_gone()


@pytest.mark.parametrize("script", ["sleep 1000 & wait", "trap '' TERM INT; sleep 1000", "exec yes"])
async def test_a_cancellation_ends_the_program_and_its_children(tool: Tool, script: str) -> None:
    """They end soon, whatever they do with signals, and before the cancellation is raised."""
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.create_task(in_thread(tool, script, tick=lambda: loop.call_soon_threadsafe(begun.set)))
    await begun.wait()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=SOON_S)
    assert done
    assert task.cancelled()
    await tool.all_gone()


async def test_a_program_may_clean_up_before_it_is_killed(tool: Tool, tmp_path: Path) -> None:
    """mmdebstrap, for one, removes its directory on SIGTERM."""
    script = f"trap 'echo clean > {tmp_path}/cleaned; exit 1' TERM; echo ready; sleep 1000 & wait"
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    options = {"line": lambda _: loop.call_soon_threadsafe(begun.set), "grace_s": SOON_S}
    task = asyncio.create_task(in_thread(tool, script, **options))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "cleaned").read_text() == "clean\n"
    await tool.all_gone()


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT"])
def test_a_killed_program_has_no_outcome(tool: Tool, name: str) -> None:
    """A killed program has no outcome: the kernel may have run out of memory."""
    with pytest.raises(NotFinished, match=f"SIG{name}"):
        tool(f"kill -{name} $$")
    assert tool("kill -SEGV $$").status == -signal.SIGSEGV


def test_a_missing_program_is_named(tool: Tool, tmp_path: Path) -> None:
    """The error says what to install, for a missing launcher too."""
    with pytest.raises(MissingTool, match="tool") as caught:
        tool("", environment={"PATH": str(tmp_path / "nothing")})
    assert caught.value.hint == "install it"
    with pytest.raises(MissingTool, match="setpriv"):
        tool("", environment={"PATH": str(tmp_path)})
    assert issubclass(NotFinished, HostCannot)


HOSTS = {
    "run_tool": "run_tool('tool', environment=os.environ, deadline_s=60, cure='', grace_s={grace})",
    "qemu": "from coppice.vmm.qemu import images; images.create(Path('layer'), 1 << 20)",
}


@pytest.fixture
def anyones_path() -> Iterator[Path]:
    """Yield a directory that the user without rights may enter."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)  # noqa: PTH101, S103
        yield Path(path)


def made_fifo(path: Path) -> Path:
    """Make a FIFO that every user may open."""
    os.mkfifo(path)
    path.chmod(0o666)
    return path


@contextlib.asynccontextmanager
async def reader_of(fifo: Path, flags: int) -> AsyncIterator[asyncio.StreamReader]:
    """Yield a reader of a FIFO whose waits can be cancelled."""
    reader = asyncio.StreamReader()
    opened = os.fdopen(os.open(fifo, flags | os.O_NONBLOCK), "rb", buffering=0)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, opened)
    try:
        yield reader
    finally:
        transport.close()


@pytest.mark.parametrize(("how", "grace"), [("run_tool", 0), ("run_tool", 5), ("qemu", 0)])
@pytest.mark.parametrize("late", [True, False], ids=["before it could ask for that", "later"])
async def test_a_tool_ends_with_a_killed_host(anyones_path: Path, how: str, grace: int, *, late: bool) -> None:
    """Even if the host is killed before the kernel has learnt that the tool shall end with it."""
    path, programs = anyones_path, anyones_path / "bin"
    programs.mkdir(mode=0o755)
    alive, held, ready = (made_fifo(path / name) for name in ("alive", "held", "ready"))
    # Late: the launcher waits for the host's end before it becomes setpriv. The tool itself never ends.
    waiting = {"setpriv": f'exec 8< {alive}\necho here > {ready}\nread line <&8\nexec /usr/bin/setpriv "$@" 8<&-'}
    scripts = (waiting if late else {}) | dict.fromkeys(
        ("tool", "qemu-system-x86_64"), f"echo here > {ready}\nexec sleep 60"
    )
    for name, script in scripts.items():
        (programs / name).write_text(f'#!/bin/sh\nexec 9> "{held}"\n{script}\n')
        (programs / name).chmod(0o755)
    script = (
        "import os\nfrom pathlib import Path\nfrom coppice.linux.tool import run_tool\n"
        f"kept = os.open({str(alive)!r}, os.O_RDWR)\n" + HOSTS[how].format(grace=grace)
    )
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin"}
    environment |= {"PYTHONPATH": str(SOURCES.parent), "COPPICE_QEMU": str(programs / "qemu-system-x86_64")}
    async with reader_of(ready, os.O_RDWR) as begun, reader_of(held, os.O_RDONLY) as gone:
        host = await asyncio.create_subprocess_exec(sys.executable, "-c", script, env=environment, cwd=path)
        try:
            async with asyncio.timeout(6 * SOON_S):
                assert await begun.readline() == b"here\n"
        finally:
            host.kill()
            await host.wait()
        async with asyncio.timeout(SOON_S):
            assert await gone.read() == b""


def test_there_is_one_way_to_run_a_tool() -> None:
    """A program started in another way would have no deadline. VMMs, their helpers, the filter of names
    and the maker of network slots are services, which outlive their host. The QEMU that works on disks
    is asked over its control protocol, with a deadline for each answer, and ends with this process.
    """
    starts = re.compile(
        r"subprocess\.(run|Popen|call|check_\w+)\(|create_subprocess_\w+\(|os\.(system|popen|spawn\w+)\("
    )
    found = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if starts.search(path.read_text())}
    services = {"vmm/process.py", "vmm/program.py", "vmm/starting.py", "vmm/helpers.py", "network/nat/helper.py"}
    assert found - {"linux/tool.py", "vmm/qemu/images.py"} - services == set()
