"""Build hook of hatchling: compile the guest agent, which goes into the wheel as one static binary.

The host's C compiler does it where it can link statically; elsewhere the ziglang wheel, which brings its own libc.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AGENT = Path("src/coppice/guest/agent")
BINARY = AGENT / "coppice-agent"
FLAGS = (
    *("-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra"),
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
)
# A static binary needs no libc of the host at all; these tags say "any Linux on x86_64".
TAG = "py3-none-manylinux_2_17_x86_64.musllinux_1_1_x86_64"
DEADLINE_S = 300


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles the agent for wheels and editable installs; the sdist has the sources only."""

    def dependencies(self) -> list[str]:
        """What the build needs beside hatchling: a compiler, where the host has none."""
        return [] if static_compiler() else ["ziglang>=0.13"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface has it
        """Called by hatchling before it collects the files."""
        root = Path(self.root)
        compile_agent(sorted((root / AGENT).glob("*.c")), root / BINARY)
        build_data["pure_python"] = False
        build_data["tag"] = TAG


def compile_agent(sources: list[Path], binary: Path) -> None:
    """Compile and link the agent; replaces `binary` in one step. Raises RuntimeError with what the compiler said."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise RuntimeError(
            "coppice runs on Linux on x86_64 only: its guests are x86_64 and share the host's time-stamp counter"
        )
    if not sources:
        raise RuntimeError(f"the sources of the guest agent are missing in {binary.parent}")
    compiler = static_compiler() or zig_compiler()
    if compiler is None:
        raise RuntimeError(
            "no C compiler can link the guest agent statically; "
            "run `apt-get install gcc libc6-dev`, or `pip install ziglang` and build without isolation"
        )
    new = binary.with_name(f".{binary.name}.new")
    try:
        done = _run([*compiler, *FLAGS, "-o", str(new), *map(str, sources)])
        if done.returncode != 0:
            raise RuntimeError(f"the guest agent does not compile with {' '.join(compiler)}:\n{done.stderr}")
        new.chmod(0o755)
        new.replace(binary)
    finally:
        new.unlink(missing_ok=True)


@functools.cache
def static_compiler() -> tuple[str, ...] | None:
    """The host's compiler, if it makes static binaries: some distributions have no static libc."""
    for name in ("gcc", "cc"):
        if path := shutil.which(name):
            with tempfile.TemporaryDirectory() as directory:
                source = Path(directory, "probe.c")
                source.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
                if _run([path, "-static", "-o", f"{directory}/probe", str(source)]).returncode == 0:
                    return (path,)
    return None


def zig_compiler() -> tuple[str, ...] | None:
    """The compiler of the ziglang wheel, with musl."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl")


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
