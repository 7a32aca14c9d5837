"""Build hook of hatchling: compile the guest agent and the VMM launcher to static binaries, and the
provider of OpenSSL to a library. All go into the wheel.

The host's C compiler is used if it can link statically; otherwise the ziglang wheel, which has its
own libc.
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

BINARIES = (Path("src/coppice/agent/c/coppice-agent"), Path("src/coppice/vmm/launcher/coppice-launcher"))
PROVIDER = Path("src/coppice/agent/random/openssl_random.c")
LIBRARY = PROVIDER.with_name("openssl-random.so")
# For any C library: it uses none.
LIBRARY_FLAGS = (
    *("-std=gnu11", "-O2", "-fPIC", "-shared", "-nostdlib", "-s", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fno-builtin", "-fno-stack-protector"),
)
FLAGS = (
    *("-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra"),
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
)
# A static binary needs no libc of the host. These tags mean any Linux on x86_64.
TAG = "py3-none-manylinux_2_17_x86_64.musllinux_1_1_x86_64"
DEADLINE_S = 300


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles both programs for wheels and editable installs. The sdist has only the sources."""

    def dependencies(self) -> list[str]:
        """Return the build's dependencies besides hatchling: a compiler, if the host has none."""
        return [] if static_compiler() else ["ziglang>=0.13"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface has it
        """Compile the programs, before hatchling collects the files."""
        for binary in BINARIES:
            path = Path(self.root) / binary
            compile_program(sorted(path.parent.glob("*.c")), path)
        root = Path(self.root)
        compile_program([root / PROVIDER], root / LIBRARY, LIBRARY_FLAGS)
        build_data["pure_python"] = False
        build_data["tag"] = TAG


def compile_program(sources: list[Path], binary: Path, flags: tuple[str, ...] = FLAGS) -> None:
    """Compile and link a program, or what `flags` make. `binary` is replaced in one step.

    :raises RuntimeError: it cannot be compiled; the message has the compiler's output
    """
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise RuntimeError(
            "coppice runs on Linux on x86_64 only: its guests are x86_64 and share the host's time-stamp counter"
        )
    if not sources:
        raise RuntimeError(f"the sources of {binary.name} are missing in {binary.parent}")
    compiler = static_compiler() or zig_compiler()
    if compiler is None:
        raise RuntimeError(
            f"no C compiler can link {binary.name} statically; "
            "run `apt-get install gcc libc6-dev`, or `pip install ziglang` and build without isolation"
        )
    new = binary.with_name(f".{binary.name}.new")
    try:
        done = _run([*compiler, *flags, "-o", str(new), *map(str, sources)])
        if done.returncode != 0:
            raise RuntimeError(f"{binary.name} does not compile with {' '.join(compiler)}:\n{done.stderr}")
        new.chmod(0o755)
        new.replace(binary)
    finally:
        new.unlink(missing_ok=True)


@functools.cache
def static_compiler() -> tuple[str, ...] | None:
    """Return the host's compiler if it can link statically: some distributions have no static
    libc.
    """
    for name in ("gcc", "cc"):
        if path := shutil.which(name):
            with tempfile.TemporaryDirectory() as directory:
                source = Path(directory, "probe.c")
                source.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
                if _run([path, "-static", "-o", f"{directory}/probe", str(source)]).returncode == 0:
                    return (path,)
    return None


def zig_compiler() -> tuple[str, ...] | None:
    """Return the compiler of the ziglang wheel, with musl."""
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
