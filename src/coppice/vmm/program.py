"""The program file of a VMM: its path, and the version that it prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from coppice.errors import HostCannot, MissingTool
from coppice.linux.files import temporary_beside

_VERSION_DEADLINE_S = 20.0
_versions: dict[str, str] = {}


def find(name: str, variable: str, hint: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the absolute path of a VMM: the value of the environment variable, else the first
    match on PATH.

    :raises MissingTool: there is no such program; `hint` says how to install it
    :raises HostCannot: the variable names a program with another file name, by which recovery would
        not find its VMMs
    """
    chosen = environ.get(variable)
    key = chosen or name, environ.get("PATH")
    found = _found.get(key)
    if found is None or not os.access(found, os.X_OK):
        found = _found[key] = _find(name, variable, chosen, key[1], hint)
    return found


_found: dict[tuple[str, str | None], str] = {}  # each fork asks


def _find(name: str, variable: str, chosen: str | None, search: str | None, hint: str) -> str:
    path = shutil.which(chosen or name, path=search)
    if path is None and chosen:
        raise MissingTool(f"{variable} is {chosen}, which is not an executable file", hint=f"run `unset {variable}`")
    if path is None:
        raise MissingTool(f"{name} is not installed", hint=hint)
    if (target := Path(path).resolve().name) != name:
        raise HostCannot(
            f"{path} is a program named {target}, not {name}",
            hint=f"set {variable} to a file of that name, for example to a copy",
        )
    return str(Path(path).absolute())


async def version(path: str, pattern: str) -> str:
    """Return the version that `--version` prints, the first group of `pattern`; `unknown` if it
    does not match.

    Each program file is run once; the user's cache remembers the answer.

    :raises HostCannot: the program does not end in time
    """
    status = os.stat(path)  # noqa: PTH116 - each fork asks
    key = f"{path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    if key not in _versions:
        _versions.update(_remembered())
    if key not in _versions:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _VERSION_DEADLINE_S)
        except TimeoutError as error:
            raise HostCannot(
                f"{path} --version did not end within {_VERSION_DEADLINE_S:g} s",
                hint="check whether the host is overloaded",
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        found = re.search(pattern, output.decode(errors="replace"))
        _versions[key] = found[1] if found else "unknown"
        _remember({key: _versions[key]})
    return _versions[key]


def release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version; (0, 0) if it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice" / "vmm-versions.json"


def _remembered() -> dict[str, str]:
    """Return the versions that earlier processes found; empty if the file cannot be read."""
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError):
        return msgspec.json.decode(_cache().read_bytes(), type=dict[str, str])
    return {}


def _remember(versions: dict[str, str]) -> None:
    """Store versions for later processes, if possible.

    Entries of replaced program files are dropped.
    """
    with contextlib.suppress(OSError, RuntimeError):
        cache = _cache()
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = temporary_beside(cache)
        temporary.write_bytes(msgspec.json.encode(versions))
        temporary.replace(cache)
