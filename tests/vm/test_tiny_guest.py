"""A guest without an operating system, in assembly, is forked by each VMM that this host has: also
where KVM cannot run Linux, and in seconds under emulation.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from coppice.content.overlay import OverlayStore
from coppice.linux.kvm import kvm_device
from coppice.memory import memfile
from coppice.model import MIB, MachineSpec
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver
from coppice.vmm.firecracker.driver import FirecrackerDriver
from coppice.vmm.qemu.driver import QemuDriver
from driver_bench import Bench
from memory_helpers import mapping_is_shared

SOURCE = Path(__file__).parent.parent / "fakes" / "tiny_guest.S"
COUNT = 0x800000  # the physical address of the guest's count
RUNS_KVM = pytest.mark.skipif(kvm_device() != "ok", reason="this host has no KVM")
HAS_FIRECRACKER = pytest.mark.skipif(not os.environ.get("COPPICE_FIRECRACKER"), reason="COPPICE_FIRECRACKER not set")


@pytest.fixture(
    params=[
        pytest.param(lambda: QemuDriver("tcg"), id="emulated"),
        pytest.param(lambda: QemuDriver("kvm"), id="kvm", marks=[RUNS_KVM, pytest.mark.kvm]),
        pytest.param(FirecrackerDriver, id="firecracker", marks=[RUNS_KVM, HAS_FIRECRACKER, pytest.mark.firecracker]),
    ]
)
async def bench(request: pytest.FixtureRequest, common_home: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    """Machines of this guest, on the data directory's file system."""
    make: Callable[[], VmmDriver] = request.param
    (common_home / "contract").mkdir(exist_ok=True)
    instances = Path(tempfile.mkdtemp(dir=common_home / "contract"))  # all processes of the tests have that home
    kernel, rest = tmp_path / "tiny", tmp_path / "rest"
    command = ["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", f"-Wl,-Tdata={COUNT:#x},-e,start"]
    subprocess.run([*command, "-o", kernel, SOURCE], check=True, timeout=60)  # noqa: ASYNC221 - before all machines
    rest.write_bytes(bytes(MIB))  # its initramfs and root file system, which nothing reads
    yield Bench(
        make_driver=make,
        instances=instances,
        machine=MachineSpec(memory_bytes=64 * MIB, overlay_bytes=64 * MIB, kernel="tiny", acpi=False),
        root=rest,
        kernel=kernel,
        initrd=rest,
        stub=(kernel, rest),
        overlays=OverlayStore(common_home / "overlays"),
        patience_s=60.0,
    )
    for directory, processes in make().find_orphans(instances).items():
        for process in processes:
            await make().quit(directory, process)
    shutil.rmtree(instances)


async def counted(directory: Path, at_least: int = 3) -> list[int]:
    """Return the numbers that the guest has sent, once there are enough: without the first line,
    which a fork may begin in the middle.
    """
    console, lines = directory / files.CONSOLE_LOG, list[bytes]()
    async with asyncio.timeout(60):
        while len(lines) < at_least + 2:
            await asyncio.sleep(0.01)
            lines = console.read_bytes().split(b"\n") if console.exists() else []
    return [int(line, 16) for line in lines[1:-1]]


def count_in(directory: Path) -> int:
    """Return the count in a captured memory."""
    with (directory / files.MEMORY).open("rb") as memory:
        memory.seek(COUNT)
        (number,) = struct.unpack("<I", memory.read(4))
    return int(number)


async def test_forks_count_on_from_the_capture(bench: Bench) -> None:
    """Each fork, and a fork of a fork on layers, counts on from where its source was captured. The
    memory that they share does not change.
    """
    driver = bench.make_driver()
    source = await bench.launch(driver)
    process = await driver.boot(source)
    before = await counted(source.directory)
    base = await bench.capture(driver, source, process)
    count = count_in(source.directory)
    digest = memfile.sha256(source.directory / files.MEMORY)
    assert before == list(range(before[0], before[0] + len(before)))
    assert count >= before[-1]
    forks = [bench.fork(source, base) for _ in range(3)]
    processes = await asyncio.gather(*(driver.restore(fork) for fork in forks))
    for fork, restored in zip(forks, processes, strict=True):
        lines = await counted(fork.directory)
        assert lines == list(range(lines[0], lines[0] + len(lines)))
        assert lines[0] - count in (1, 2)
        assert mapping_is_shared(restored.pid, fork.directory / files.MEMORY, base)
    layers = await bench.capture_layer(driver, forks[0], processes[0], base)
    last = (await counted(forks[0].directory))[-1]
    grandchild = bench.fork(forks[0], base, layers)
    restored = await driver.restore(grandchild)
    assert (await counted(grandchild.directory))[0] - last in (1, 2)
    assert memfile.sha256(source.directory / files.MEMORY) == digest
    for launch, running in ((forks[1], processes[1]), (forks[2], processes[2]), (grandchild, restored)):
        await driver.quit(launch.directory, running)
