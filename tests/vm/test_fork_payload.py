"""Payloads in real guests: written before the image's hook runs, and readable by root alone.

A fork whose hook fails does not run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from coppice.client import AsyncHost
from coppice.errors import NotFound
from coppice.model import Instance
from coppice.names import MAX_PAYLOAD
from coppice.requests import (
    ForkRequest,
    GetRequest,
    ReadFileRequest,
    RmRequest,
    StandbyRequest,
    StatRequest,
    WriteFileRequest,
)

HOOK = b"""#!/bin/sh
test -z "$COPPICE_PAYLOAD" && exit 0
grep -q refuse "$COPPICE_PAYLOAD" && { echo one; echo "no such job" >&2; exit 3; }
( sleep 1; echo left running >/run/left; echo more ) &
cp "$COPPICE_PAYLOAD" /run/seen-by-hook
"""


@pytest.fixture
async def hooked(host: AsyncHost, template: Instance) -> AsyncIterator[Instance]:
    """A machine in standby with a hook, which was written while the machine ran."""
    async with (await host.get(template.id)).fork(1, atomic=True) as (vm,):
        await host.call(WriteFileRequest(instance=vm.id, path="/etc/coppice/on-fork", data=HOOK, mode=0o755))
        yield (await host.call(StandbyRequest(instance=vm.id))).instance


async def test_payloads_reach_the_hook_and_its_failure_the_caller(host: AsyncHost, hooked: Instance) -> None:
    """Each fork's hook sees its own payload before the fork is Running.

    A fork whose hook fails is removed, and its result says why.
    """
    payloads = [b"first", b"refuse", b"third\x00\xff"]
    report = await host.call(ForkRequest(instance=hooked.id, count=3, payloads=payloads))
    async with AsyncExitStack() as stack:
        for fork in report.instances:
            stack.push_async_callback(host.call, RmRequest(instance=fork.id))
        assert [result.ok for result in report.results] == [True, False, True]
        failed = report.results[1]
        assert failed.error_code == "guest_refused"
        assert "/etc/coppice/on-fork ended with exit code 3; the end of its output: one | no such job" in (
            failed.error or ""
        )
        with pytest.raises(NotFound):
            await host.call(GetRequest(instance=failed.name))
        for fork, payload in zip(report.instances, (payloads[0], payloads[2]), strict=True):
            assert await host.call(ReadFileRequest(instance=fork.id, path="/run/seen-by-hook")) == payload
            assert await host.call(ReadFileRequest(instance=fork.id, path="/run/coppice/payload")) == payload
            status = await host.call(StatRequest(instance=fork.id, path="/run/coppice/payload"))
            assert (status.mode & 0o777, status.uid) == (0o600, 0)


async def test_the_largest_payload_and_none(host: AsyncHost, hooked: Instance) -> None:
    """The largest payload arrives whole, and a fork without one does not see its source's."""
    large = bytes(range(256)) * (MAX_PAYLOAD // 256)
    (first,) = (await host.call(ForkRequest(instance=hooked.id, payload=large, atomic=True))).instances
    try:
        assert await host.call(ReadFileRequest(instance=first.id, path="/run/seen-by-hook")) == large
        await host.call(StandbyRequest(instance=first.id))
        (second,) = (await host.call(ForkRequest(instance=first.id, atomic=True))).instances
        try:
            with pytest.raises(Exception, match="No such file"):
                await host.call(ReadFileRequest(instance=second.id, path="/run/coppice/payload"))
        finally:
            await host.call(RmRequest(instance=second.id))
    finally:
        await host.call(RmRequest(instance=first.id))


@pytest.mark.parametrize(
    ("hook", "said", "hint"),
    [
        (b"#!/bin/sh\nkill -9 $$\n", "was ended by signal 9", "sh -x /etc/coppice/on-fork"),
        (b"#!/no/such/shell\n", "cannot be started: No such file", "#!/bin/sh"),
        (b"exit 0\n", "cannot be started: Exec format error", "#!/bin/sh"),
        (b"#!/bin/sh\necho begun; exec sleep 1000\n", "did not end within 30 s; the end of its output: begun", "30 s"),
        (b"#!/bin/sh\nseq 1 100000; exit 1\n", "99999 | 100000", "sh -x /etc/coppice/on-fork"),
    ],
    ids=["signal", "no interpreter", "no first line", "too long", "much output"],
)
async def test_a_failed_hook_says_why(host: AsyncHost, hooked: Instance, hook: bytes, said: str, hint: str) -> None:
    """The error and the report have the reason, the end of the output, and a hint for that reason."""
    async with (await host.get(hooked.id)).fork(1, atomic=True) as (vm,):
        await host.call(WriteFileRequest(instance=vm.id, path="/etc/coppice/on-fork", data=hook, mode=0o755))
        await host.call(StandbyRequest(instance=vm.id))
        (failed,) = (await host.call(ForkRequest(instance=vm.id))).results
    assert said in (failed.error or "")
    assert hint in (failed.error or "")


async def test_what_a_hook_leaves_running_lives_on(host: AsyncHost, hooked: Instance) -> None:
    """A process in the background writes to the hook's output after the hook has ended."""
    async with (await host.get(hooked.id)).fork(1, atomic=True, payload=b"go") as (vm,):
        result = await vm.exec(
            ["sh", "-c", "while ! grep -qx more /run/coppice/on-fork.log; do sleep 0.1; done; cat /run/left"]
        )
        assert result.stdout == b"left running\n"
