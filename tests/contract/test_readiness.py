"""`ready` returns when a machine's service answers its health check, and says why it does not."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestTimeout, IllegalTransition, UsageError, VmmDied
from coppice.model import HealthCheck, State
from coppice.requests import ExecRequest, ForkRequest, ReadyRequest, UpdateRequest
from fakes.hosting import boot, make

CHECK = HealthCheck(kind="exec", command=("recall", "service"), successes=2)


async def serve(host: AsyncHost, name: str) -> None:
    """Have a guest's service answer from now on."""
    await host.call(ExecRequest(instance=name, argv=["remember", "service", "up"]))


async def test_it_waits_for_the_service(fake_host: AsyncHost) -> None:
    """It asks until the service answers. The record is that of the running machine."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    waiting = asyncio.create_task(fake_host.call(ReadyRequest(instance="oak")))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    await serve(fake_host, "oak")
    found = await waiting
    assert (found.id, found.state) == (oak.id, State.RUNNING)


async def test_a_warm_service_is_ready_in_each_fork(fake_host: AsyncHost) -> None:
    """Forks inherit the check of their source, and its service."""
    await boot(fake_host, "oak", health_check=CHECK)
    await serve(fake_host, "oak")
    vm = await fake_host.get("oak")
    template = await vm.freeze()
    forks = (await fake_host.call(ForkRequest(instance=template.id, count=3, atomic=True))).instances
    for fork in forks:
        assert (await fake_host.call(ReadyRequest(instance=fork.id))).name == fork.name


async def test_the_error_has_the_latest_failure(fake_host: AsyncHost) -> None:
    """The machine stays as it is."""
    await boot(fake_host, "oak", health_check=CHECK)
    with pytest.raises(GuestTimeout, match="does not answer after 2 s: exit status 1") as late:
        await fake_host.call(ReadyRequest(instance="oak", deadline_s=2))
    assert "coppice logs oak" in str(late.value.hint)
    assert (await fake_host.get("oak")).state is State.RUNNING


async def test_the_error_says_that_the_process_has_ended(fake_host: AsyncHost) -> None:
    """Which explains most services that do not answer."""
    await boot(fake_host, "oak", health_check=CHECK)
    await fake_host.call(ExecRequest(instance="oak", argv=["remember", "exited", "1"]))
    with pytest.raises(GuestTimeout, match="exit status 1; its process exited with status 1"):
        await fake_host.call(ReadyRequest(instance="oak", deadline_s=1))


async def test_the_end_of_the_machine_ends_the_wait(fake_host: AsyncHost) -> None:
    """At once, and not at the deadline."""
    await boot(fake_host, "oak", health_check=HealthCheck(kind="exec", command=("crash",)))
    with pytest.raises(VmmDied, match="oak ended before its service answered"):
        await fake_host.call(ReadyRequest(instance="oak", deadline_s=3600))


async def test_a_machine_without_a_check(fake_host: AsyncHost) -> None:
    """There is nothing to wait for, also if a check was taken away."""
    await boot(fake_host, "oak", health_check=CHECK)
    await fake_host.call(UpdateRequest(instance="oak", health_check=HealthCheck()))
    with pytest.raises(UsageError, match="oak has no health check") as refused:
        await fake_host.call(ReadyRequest(instance="oak"))
    assert "coppice update oak --health" in str(refused.value.hint)


async def test_a_machine_at_rest(fake_host: AsyncHost) -> None:
    """It is not started."""
    await make(fake_host, State.STANDBY, health_check=CHECK)
    with pytest.raises(IllegalTransition):
        await fake_host.call(ReadyRequest(instance="oak"))
