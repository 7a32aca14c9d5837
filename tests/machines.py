"""Helpers of tests with real machines: their image, a warm process in it, and questions to it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from coppice.client import AsyncHost, AsyncMachine
from coppice.model import MIB, Instance
from coppice.requests import ExecRequest, LsRequest, RmRequest
from coppice.state.store import Store
from coppice.vmm.process import own_process

IMAGE = "debian-python"
PACKAGES = ("python3", "python3-numpy")
RUNTIMES = "debian-programs"
RUNTIME_PACKAGES = (
    "nodejs", "python3", "python3-numpy", "python3-pip", "nginx-light", "openssl", "postgresql",
    "chromium-headless-shell",
)  # fmt: skip
GUEST_MEMORY = 512 * MIB

# A resident process with state, which every fork finds warm. It evaluates expressions from named
# pipes, so that a shell can be the client: in an emulated guest a client in Python takes longer to
# start than everything else.
WARM_SERVER = """
import os, numpy
os.makedirs("/run/warm")
for name in ("ask", "answer"): os.mkfifo(f"/run/warm/{name}")
print("WARM", flush=True)
while True:
    with open("/run/warm/ask") as ask: expression = ask.readline()
    answer = repr(eval(expression, {"numpy": numpy, "os": os}))
    with open("/run/warm/answer", "w") as stream: stream.write(answer + "\\n")
"""
ASK = 'printf "%s\\n" "$1" >/run/warm/ask; IFS= read -r answer </run/warm/answer; printf "%s\\n" "$answer"'
CACHES = ("images", "kernels", "initramfs", "overlays")


def link_caches(source: Path, home: Path) -> None:
    """Hard-link the caches of one data directory into another one. Images keep their names. Content that
    another worker is making is left out.
    """
    unfinished = shutil.ignore_patterns(".*")
    for cache in CACHES:
        shutil.rmtree(home / cache, ignore_errors=True)
        shutil.copytree(source / cache, home / cache, ignore=unfinished, copy_function=os.link)
    with closing(Store(source / "coppice.db", own_process())) as here:
        images = here.images.all()
    with closing(Store(home / "coppice.db", own_process())) as there:
        for image in images:
            there.images.add(image, lambda: None)


def link_image(source: Path, home: Path, name: str) -> None:
    """Hard-link one image of a data directory into another one, unless it is there."""
    with closing(Store(source / "coppice.db", own_process())) as here:
        image = here.images.named(name)
    assert image is not None
    content = Path("images", image.digest.removeprefix("sha256:"))
    if not (home / content).exists():
        shutil.copytree(source / content, home / content, copy_function=os.link)
    with closing(Store(home / "coppice.db", own_process())) as there:
        there.images.add(image, lambda: None)


async def remove_all(host: AsyncHost) -> None:
    """Remove every instance, children first: a template with forks cannot be removed."""
    for instance in reversed(await host.call(LsRequest())):
        await host.call(RmRequest(instance=instance.id))


async def warm_up(host: AsyncHost, vm: Instance) -> None:
    """Wait until the resident server of the machine has numpy loaded and listens."""
    async with asyncio.timeout(120):
        async for line in (await host.get(vm.id)).logs(follow=True):
            if b"WARM" in line:
                break
    assert await ask(host, vm, "1 + 1") == "2"  # warms the client too


async def ask(host: AsyncHost, vm: Instance | AsyncMachine, expression: str) -> str:
    """Evaluate an expression in the warm process of a machine, one at a time."""
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", ASK, "ask", expression], timeout_s=60))
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode().strip()


async def require_sysrq(host: AsyncHost, vm: Instance) -> None:
    """Skip the test if the kernel of a machine has no magic SysRq key."""
    found = await host.call(ExecRequest(instance=vm.id, argv=["test", "-e", "/proc/sysrq-trigger"], timeout_s=60))
    if found.exit_code:
        pytest.skip("the guest's kernel has no magic SysRq key (CONFIG_MAGIC_SYSRQ)")


def mem_file(host: AsyncHost, instance: Instance) -> Path:
    """Return the path of an instance's mem-file."""
    return host.local.rooms.directory(instance.id) / "memory"


async def copy_ms(path: Path) -> float:
    """Return how long a plain copy of a mem-file takes, zeros included, without a sync: a machine
    must not be paused for as long.
    """

    def copy() -> float:
        begin = time.perf_counter()
        with path.open("rb") as source, tempfile.TemporaryFile(dir=path.parent) as target:
            while data := source.read(MIB):
                target.write(data)
        return (time.perf_counter() - begin) * 1000

    return await asyncio.to_thread(copy)


async def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""

    def read() -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return await asyncio.to_thread(read)
