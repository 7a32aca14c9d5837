"""The start of a Firecracker is awaited by events."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

from coppice.vmm.firecracker.listening import Watch
from coppice.vmm.process import kill
from coppice.vmm.starting import spawn


async def test_a_socket_is_awaited_without_polling(tmp_path: Path) -> None:
    """The wait ends soon after the socket appears, when the process ends, and at the deadline."""
    process = spawn(["sleep", "60"], cwd=tmp_path, log=tmp_path / "log")
    listener = socket.socket(socket.AF_UNIX)

    def listen() -> None:
        time.sleep(0.1)  # the wait has begun by then
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()
        (tmp_path / "log").write_text("listening\n")

    try:
        with Watch(tmp_path) as watch:
            assert not watch.until_listening("api.sock", process, 0.05)
            thread = threading.Thread(target=listen)
            thread.start()
            assert watch.until_listening("api.sock", process, 20)
            thread.join()
        listener.close()
        (tmp_path / "api.sock").unlink()
        with Watch(tmp_path) as watch:
            await kill(process)
            assert not watch.until_listening("api.sock", process, 20)
    finally:
        listener.close()
        await kill(process)


async def test_a_socket_that_listens_without_an_event_is_noticed(tmp_path: Path) -> None:
    """The socket file is there, and refuses; later it listens, and nothing is written meanwhile."""
    process = spawn(["sleep", "60"], cwd=tmp_path, log=tmp_path / "log")
    try:
        with socket.socket(socket.AF_UNIX) as listener, Watch(tmp_path) as watch:
            listener.bind(str(tmp_path / "api.sock"))
            assert not watch.until_listening("api.sock", process, 0.05)
            thread = threading.Timer(0.1, listener.listen)
            thread.start()
            assert watch.until_listening("api.sock", process, 20)
            thread.join()
    finally:
        await kill(process)


async def test_a_watch_is_used_again(tmp_path: Path) -> None:
    """The kernel takes many milliseconds to close an inotify instance, so none is closed on the path
    of a fork; what was watched before is not seen.
    """

    def instances() -> list[str]:
        return [path.name for path in Path("/proc/self/fd").iterdir() if "inotify" in os.path.realpath(path)]

    process = spawn(["sleep", "60"], cwd=tmp_path, log=tmp_path / "log")
    try:
        with Watch(tmp_path):
            used = instances()
        before, after = tmp_path / "before", tmp_path / "after"
        for directory in (before, after):
            directory.mkdir()
            with Watch(directory) as watch:
                (before / "file").write_text("an event")
                assert instances() == used
                assert not watch.until_listening("api.sock", process, 0.05)
        assert instances() == used
    finally:
        await kill(process)
