"""Payloads in real guests: written before the image's hook is run, readable by root alone; a hook that fails keeps its fork out of Running."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from coppice.errors import NotFound
from coppice.host import AsyncHost
from coppice.model import Instance
from coppice.names import MAX_PAYLOAD

HOOK = b"""#!/bin/sh
test -z "$COPPICE_PAYLOAD" && exit 0
grep -q refuse "$COPPICE_PAYLOAD" && exit 3
cp "$COPPICE_PAYLOAD" /run/seen-by-hook
"""


@pytest.fixture
async def hooked(host: AsyncHost, template: Instance) -> AsyncIterator[Instance]:
    """A standby machine with a hook, which was written while it ran."""
    async with host.forks(template, 1) as (vm,):
        await host.write_file(vm, "/etc/coppice/on-fork", HOOK, mode=0o755)
        yield (await host.standby(vm))[0]


async def test_payloads_reach_the_hook_and_its_failure_the_caller(host: AsyncHost, hooked: Instance) -> None:
    """Each fork's hook saw its own payload before the fork was Running; the one whose hook failed is not there, and the result says why."""
    payloads = [b"first", b"refuse", b"third\x00\xff"]
    report = await host.fork(hooked, count=3, payloads=payloads)
    async with AsyncExitStack() as stack:
        for fork in report.instances:
            stack.push_async_callback(host.rm, fork)
        assert [result.ok for result in report.results] == [True, False, True]
        failed = report.results[1]
        assert failed.error_code == "guest_refused"
        assert "/etc/coppice/on-fork ended with exit code 3" in (failed.error or "")
        with pytest.raises(NotFound):
            await host.get(failed.name)
        for fork, payload in zip(report.instances, (payloads[0], payloads[2]), strict=True):
            assert await host.read_file(fork, "/run/seen-by-hook") == payload
            assert await host.read_file(fork, "/run/coppice/payload") == payload
            status = await host.stat(fork, "/run/coppice/payload")
            assert (status.mode & 0o777, status.uid) == (0o600, 0)


async def test_the_largest_payload_and_none(host: AsyncHost, hooked: Instance) -> None:
    """A whole payload of the size that is allowed arrives; a fork without one has no file of its source's."""
    large = bytes(range(256)) * (MAX_PAYLOAD // 256)
    (first,) = (await host.fork(hooked, payload=large, atomic=True)).instances
    try:
        assert await host.read_file(first, "/run/seen-by-hook") == large
        await host.standby(first)
        (second,) = (await host.fork(first, atomic=True)).instances
        try:
            with pytest.raises(Exception, match="No such file"):
                await host.read_file(second, "/run/coppice/payload")
        finally:
            await host.rm(second)
    finally:
        await host.rm(first)
