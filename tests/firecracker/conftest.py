"""Fixtures of the tests with a real Firecracker.

They run if COPPICE_FIRECRACKER names a binary and COPPICE_TEST_KERNEL a kernel that this host's KVM
runs; else they are skipped with the reason. They need only what kernels of microVMs have: one CPU,
no modules, no ACPI.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.model.kernel import Kernel
from coppice.requests import PromoteRequest, RunRequest, StandbyRequest
from machines import GUEST_MEMORY, IMAGE, WARM_SERVER, link_caches, remove_all, warm_up
from remains import machines_ended

VARIABLES = ("COPPICE_FIRECRACKER", "COPPICE_TEST_KERNEL")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here, and skip it without a Firecracker and a kernel."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.firecracker)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not set"))


@pytest.fixture(scope="session")
def home(common_home: Path) -> Path:
    """A data directory of this process, separate from that of QEMU's machines."""
    own = common_home / "workers" / f"firecracker-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    link_caches(common_home, own)
    return own


@pytest.fixture(scope="session")
async def host(home: Path) -> AsyncIterator[AsyncHost]:
    """One host for the session, which makes Firecracker machines.

    At the end no instance and no VMM is left.
    """
    with machines_ended(home):
        async with AsyncHost(home, vmm="firecracker") as opened:
            await remove_all(opened)
            rooms = opened.local.rooms
            yield opened
            await remove_all(opened)
    for driver in rooms.drivers:
        assert not driver.find_orphans(rooms.layout.instances)
    assert list(rooms.layout.instances.iterdir()) == []


@pytest.fixture(scope="session")
async def kernel(host: AsyncHost) -> Kernel:
    """The kernel, in the data directory."""
    return await host.kernels.add(Path(os.environ[VARIABLES[1]]), no_modules=True, acpi=False)


@pytest.fixture(scope="session")
async def image(host: AsyncHost) -> str:
    """A Debian image with Python and numpy."""
    return (await host.images.inspect(IMAGE)).name


@pytest.fixture(scope="session")
async def template(host: AsyncHost, image: str, kernel: Kernel) -> Instance:
    """A template with a warm Python: booted once, forked by nearly every test."""
    request = RunRequest(
        image=image,
        command=["python3", "-c", WARM_SERVER],
        name="stump",
        memory_bytes=GUEST_MEMORY,
        kernel=kernel.key,
        network="none",
    )
    vm = await host.call(request)
    await warm_up(host, vm)
    await host.call(StandbyRequest(instance=vm.id))
    return await host.call(PromoteRequest(instance=vm.id))


@pytest.fixture
async def vm(host: AsyncHost, template: Instance) -> AsyncIterator[Instance]:
    """A machine for one test: a fork of the template."""
    async with (await host.get(template.id)).fork(1, atomic=True) as (fork,):
        yield fork.record
