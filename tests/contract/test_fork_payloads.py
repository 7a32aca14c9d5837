"""Payloads: each fork gets only its own, and the host keeps no copy."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestRefused, UsageError, VmmError
from coppice.model import State
from coppice.names import MAX_PAYLOAD
from coppice.requests import ExecRequest, ForkRequest, RestoreRequest, StandbyRequest
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, make, snapshot

SECRET = b"correct horse battery staple"


async def test_each_fork_has_its_own_payload(fake_host: AsyncHost) -> None:
    """The first payload goes to the first fork, and so on; the source has none."""
    await make(fake_host, State.TEMPLATE)
    report = await fake_host.call(ForkRequest(instance="oak", count=3, payloads=[b"one", b"two", b""], atomic=True))
    assert [await ask(fake_host, fork, "payload") for fork in report.instances] == ["one", "two", ""]


async def test_one_payload_for_all(fake_host: AsyncHost) -> None:
    """`payload` goes to every fork, and not to the source."""
    await make(fake_host, State.STANDBY)
    report = await fake_host.call(ForkRequest(instance="oak", count=2, payload=SECRET, atomic=True))
    assert {await ask(fake_host, fork, "payload") for fork in report.instances} == {SECRET.decode()}
    await fake_host.call(RestoreRequest(instance="oak"))
    assert (await fake_host.call(ExecRequest(instance="oak", argv=["payload"]))).exit_code == 1


async def test_a_fork_that_boots_has_its_payload_too(fake_host: AsyncHost) -> None:
    """A fork of a Stopped instance has its payload when its process starts."""
    await make(fake_host, State.STOPPED)
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", payload=SECRET, atomic=True))).instances
    assert await ask(fake_host, fork, "payload") == SECRET.decode()


async def test_a_payload_is_not_inherited(fake_host: AsyncHost) -> None:
    """A machine keeps its payload through standby and restore, but a fork of that
    machine has none.
    """
    await make(fake_host, State.TEMPLATE)
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], payload=SECRET, atomic=True))).instances
    await fake_host.call(StandbyRequest(instance=elm.id))
    (ash,) = (await fake_host.call(ForkRequest(instance="elm", names=["ash"], atomic=True))).instances
    assert (await fake_host.call(ExecRequest(instance=ash.id, argv=["payload"]))).exit_code == 1
    await fake_host.call(RestoreRequest(instance=elm.id))
    assert await ask(fake_host, elm, "payload") == SECRET.decode()


async def test_the_largest_payload_arrives(fake_host: AsyncHost) -> None:
    """A payload of the largest allowed size passes through the protocol."""
    await make(fake_host, State.TEMPLATE)
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", payload=bytes(MAX_PAYLOAD), atomic=True))).instances
    assert await ask(fake_host, fork, "payload", "size") == str(MAX_PAYLOAD)


@pytest.mark.parametrize(
    "options",
    [
        {"payload": bytes(MAX_PAYLOAD + 1)},
        {"payload": b"a", "payloads": [b"b"]},
        {"count": 3, "payloads": [b"a", b"b"]},
        {"payload": SECRET, "target": State.STANDBY},
        {"payload": SECRET, "target": State.STOPPED},
    ],
    ids=["large", "both", "number", "standby", "stopped"],
)
async def test_an_invalid_payload_makes_nothing(fake_host: AsyncHost, options: dict[str, object]) -> None:
    """It is refused before the first side effect, and the message does not repeat it."""
    await make(fake_host, State.TEMPLATE)
    before = snapshot(fake_host)
    with pytest.raises(UsageError) as refused:
        await fake_host.call(ForkRequest(instance="oak", **options))  # type: ignore[arg-type]  # the options of all cases together
    assert SECRET.decode() not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert snapshot(fake_host) == before


async def test_a_fork_whose_hook_fails_does_not_run(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Its result has the guest's own error, its siblings run, and nothing of it is left."""
    await make(fake_host, State.TEMPLATE)
    said = "hook: /etc/coppice/on-fork ended with exit code 3"
    driver.faults.fail_at("identity", nth=2, error=lambda: VmmError(said, hint="see the test"))
    report = await fake_host.call(ForkRequest(instance="oak", count=2, payloads=[b"a", b"b"]))
    (failed,) = [result for result in report.results if not result.ok]
    assert failed.error_code == GuestRefused.code
    assert said in (failed.error or "")
    await assert_tidy(fake_host, "oak", *(fork.name for fork in report.instances))


async def test_the_host_keeps_no_copy_of_a_payload(
    fake_host: AsyncHost, fake_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The payload is in no database, file, log or command line: only in the guest's memory."""
    caplog.set_level(logging.DEBUG)
    await make(fake_host, State.TEMPLATE)
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", payload=SECRET, atomic=True))).instances
    assert fork.vmm is not None
    assert SECRET not in Path(f"/proc/{fork.vmm.pid}/cmdline").read_bytes()
    assert SECRET not in Path(f"/proc/{fork.vmm.pid}/environ").read_bytes()
    holders = [path for path in fake_home.rglob("*") if path.is_file() and SECRET in path.read_bytes()]
    assert holders == []
    assert SECRET.decode() not in caplog.text
    assert SECRET.decode() not in repr(ForkRequest(instance="oak", payload=SECRET))
    assert SECRET.decode() not in repr(ForkRequest(instance="oak", payloads=[SECRET]))
