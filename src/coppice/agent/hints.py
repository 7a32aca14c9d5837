"""Hints for requests that the guest refused, by operation and errno of the guest's kernel."""

from __future__ import annotations

import errno
from typing import Final

from coppice.agent.protocol import OLDER_HINT, FrameType

_CONSOLE: Final = "see the guest's console with `coppice logs NAME`"
_OLD_AGENT: Final = f"the machine was captured with an older agent: {OLDER_HINT}"
_READ_ONLY: Final = (
    "its file system is read-only: run `coppice exec NAME -- mount -o remount,rw /`, or use a path on another one"
)
_FULL: Final = "free some space in the guest: `coppice exec NAME -- df -h` shows which file system is full"
_NO_DIRECTORY: Final = "make the directory first: `coppice exec NAME -- mkdir -p DIRECTORY`"
_WRITES: Final = {errno.EROFS: _READ_ONLY, errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.ENOENT: _NO_DIRECTORY}
_ANY: Final = 0

_BY_REQUEST: Final[dict[FrameType, dict[int, str]]] = {
    FrameType.EXEC: {
        errno.EOPNOTSUPP: "the guest's kernel cannot limit commands (control groups of version 2): omit the limits",
        errno.EAGAIN: "the agent holds as many commands as it can: wait until one has ended",
        _ANY: "check the program's name, the directory and the user in the guest",
    },
    FrameType.FILE_READ: {
        errno.EISDIR: "copy a directory with `coppice cp NAME:PATH DESTINATION`",
        _ANY: "see what is there with `coppice exec NAME -- ls -la DIRECTORY`",
    },
    FrameType.FILE_STAT: {_ANY: "see what is there with `coppice exec NAME -- ls -la DIRECTORY`"},
    FrameType.TREE_OUT: {_ANY: "see what is there with `coppice exec NAME -- ls -la DIRECTORY`"},
    FrameType.FILE_WRITE: {**_WRITES, _ANY: "see what is at the path with `coppice exec NAME -- ls -la DIRECTORY`"},
    FrameType.TREE_IN: {**_WRITES, _ANY: "see what is at the path with `coppice exec NAME -- ls -la DIRECTORY`"},
    FrameType.FILE_LIST: {_ANY: "see what is there with `coppice files ls NAME:DIRECTORY`"},
    FrameType.FILE_MKDIR: {
        **_WRITES,
        errno.ENOENT: "make its parents too: `coppice files mkdir -p NAME:PATH`",
        errno.EEXIST: "accept an existing directory with `coppice files mkdir -p NAME:PATH`",
        _ANY: "see what is there with `coppice files ls NAME:DIRECTORY`",
    },
    FrameType.FILE_MOVE: {
        **_WRITES,
        errno.ENOENT: "see what is there with `coppice files ls NAME:DIRECTORY`",
        errno.EXDEV: "they are on different file systems: `coppice exec NAME -- mv PATH DESTINATION` copies",
        errno.EEXIST: "replace it by leaving out --no-clobber, or give another name",
        errno.ENOTEMPTY: "remove what is there with `coppice files rm -r NAME:PATH`, or give another name",
        _ANY: "see what is there with `coppice files ls NAME:DIRECTORY`",
    },
    FrameType.FILE_REMOVE: {
        errno.EROFS: _READ_ONLY,
        errno.ENOTEMPTY: "remove its content too: `coppice files rm -r NAME:PATH`",
        errno.EBUSY: "a file system is mounted there: give paths in it, or `coppice exec NAME -- umount PATH`",
        _ANY: "see what is there with `coppice files ls NAME:DIRECTORY`",
    },
    FrameType.FILE_WATCH: {
        errno.ENOSPC: "watch a smaller directory; `coppice exec NAME -- sysctl fs.inotify` shows the kernel's limits",
        errno.ELOOP: "watch a directory further down: it is too deep",
        _ANY: "see what is there with `coppice files ls NAME:DIRECTORY`",
    },
    FrameType.CONNECT: {
        errno.ECONNREFUSED: "nothing listens there: `coppice exec NAME -- ss -ltnx` lists what does, if the image has ss",
        errno.ENOENT: "there is no such socket: see what is there with `coppice exec NAME -- ls -la DIRECTORY`",
        errno.EAGAIN: "its server does not accept connections: try again later",
        errno.EPROTOTYPE: "it is a socket for datagrams: connect to one for streams",
        errno.ENAMETOOLONG: "a socket's path has 107 bytes at most: "
        "make a link to its directory with `coppice exec NAME -- ln -s DIRECTORY /run/short`",
        _ANY: "see the server's log, or the guest's console with `coppice logs NAME`",
    },
    FrameType.FREEZE: {_ANY: "stop the machine with `coppice stop NAME`; then its disk can be forked"},
    FrameType.CLOCK: {_ANY: _CONSOLE},
}

# The steps of an identity message (docs/agent-protocol.md). If one fails, a new machine is removed,
# so most hints name the source.
_BY_STEP: Final[dict[str, str]] = {
    "clock": "the guest's kernel does not allow setting its clock: use another kernel",
    "entropy": "the guest's kernel accepts no entropy, so it would repeat its source's random numbers: use another kernel",
    "random-seed": "remove this file in the source before it is captured: `coppice exec SOURCE -- rm FILE`, then fork again",
    "ssh-host-keys": "the image's key generator failed: try it with `coppice exec SOURCE -- ssh-keygen -A`",
    "network": "its network card refused the change and is unchanged: see it with `coppice exec SOURCE -- cat /proc/net/dev`",
    "volumes": "mount the volume at another path: `coppice run --volume NAME:PATH IMAGE`",
    "certificates": "the guest's trusted certificates cannot be written: run without --ca, and see its /etc/ssl/certs",
    "payload": "give a smaller payload, or free some space in the guest's /run",
    "hook": "mend the hook in the source and capture it again; `coppice exec SOURCE -- sh -x /etc/coppice/on-fork` "
    "shows its steps in a machine that runs, and must end with status 0",
    "image": "give a directory that can be made, and an environment of at most 256 KiB: `coppice run --workdir DIR IMAGE`",
    "process": "give a program and a user that the image has: `coppice run --user USER IMAGE PROGRAM`",
}
_BY_HOOK: Final[dict[int, str]] = {
    errno.ETIMEDOUT: "let the hook end within 30 s: start what takes longer in the background, with `COMMAND >LOG 2>&1 &`",
    errno.ENOENT: "the program in the first line of the hook is missing in the image: begin the hook with `#!/bin/sh`",
    errno.ENOEXEC: "the hook has no line that names its program: begin it with `#!/bin/sh`",
    errno.EACCES: "the program in the first line of the hook is not executable: begin the hook with `#!/bin/sh`",
}
_INHERITED: Final = (
    "a fork must not keep this file, and its source's root is read-only: "
    "run `coppice exec SOURCE -- mount -o remount,rw /`, capture the source again, then fork again"
)


def hint_for(request: FrameType | None, number: int, reason: str) -> str:
    """Return the hint for a refused request.

    :param number: errno in the guest
    :param reason: the agent's message; for an identity it begins with the name of the failed step
    """
    if number == errno.ENOSYS:
        return _OLD_AGENT
    if request is FrameType.IDENTITY:
        step = reason.partition(":")[0]
        if step == "hook" and number in _BY_HOOK:
            return _BY_HOOK[number]
        inherited = step in ("random-seed", "ssh-host-keys") and number == errno.EROFS
        return _INHERITED if inherited else _BY_STEP.get(step, _CONSOLE)
    known = _BY_REQUEST.get(request, {}) if request else {}
    return known.get(number) or known.get(_ANY, _CONSOLE)
