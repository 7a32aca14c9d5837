"""Payloads: each fork gets its own, nobody else does, and nothing of it is kept on the host."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from coppice.errors import GuestRefused, UsageError, VmmError
from coppice.fork.plan import make_request
from coppice.host import AsyncHost
from coppice.model import State
from coppice.names import MAX_PAYLOAD
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, make, snapshot

SECRET = b"correct horse battery staple"


async def test_each_fork_has_its_own_payload(fake_host: AsyncHost) -> None:
    """The first payload goes to the first fork, and so on; the source has none."""
    await make(fake_host, State.TEMPLATE)
    report = await fake_host.fork("oak", count=3, payloads=[b"one", b"two", b""], atomic=True)
    assert [await ask(fake_host, fork, "payload") for fork in report.instances] == ["one", "two", ""]


async def test_one_payload_for_all(fake_host: AsyncHost) -> None:
    """`payload` is every fork's, and not the source's."""
    await make(fake_host, State.STANDBY)
    report = await fake_host.fork("oak", count=2, payload=SECRET, atomic=True)
    assert {await ask(fake_host, fork, "payload") for fork in report.instances} == {SECRET.decode()}
    await fake_host.restore("oak")
    assert (await fake_host.exec("oak", ["payload"])).exit_code == 1


async def test_a_fork_that_boots_has_its_payload_too(fake_host: AsyncHost) -> None:
    """A fork of a Stopped instance finds it when its process is started."""
    await make(fake_host, State.STOPPED)
    (fork,) = (await fake_host.fork("oak", payload=SECRET, atomic=True)).instances
    assert await ask(fake_host, fork, "payload") == SECRET.decode()


async def test_a_payload_is_not_inherited(fake_host: AsyncHost) -> None:
    """The payload of a machine goes with its memory, but a fork of it is another machine, and has none."""
    await make(fake_host, State.TEMPLATE)
    (elm,) = (await fake_host.fork("oak", names=["elm"], payload=SECRET, atomic=True)).instances
    await fake_host.standby(elm)
    (ash,) = (await fake_host.fork("elm", names=["ash"], atomic=True)).instances
    assert (await fake_host.exec(ash, ["payload"])).exit_code == 1
    await fake_host.restore(elm)
    assert await ask(fake_host, elm, "payload") == SECRET.decode()


async def test_the_largest_payload_arrives(fake_host: AsyncHost) -> None:
    """A payload of the size that is allowed passes through the protocol."""
    await make(fake_host, State.TEMPLATE)
    (fork,) = (await fake_host.fork("oak", payload=bytes(MAX_PAYLOAD), atomic=True)).instances
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
async def test_a_payload_that_can_never_be_makes_nothing(fake_host: AsyncHost, options: dict[str, object]) -> None:
    """Refused before the first side effect, with a message that does not repeat what it refuses."""
    await make(fake_host, State.TEMPLATE)
    before = snapshot(fake_host)
    with pytest.raises(UsageError) as refused:
        await fake_host.fork("oak", **options)  # type: ignore[arg-type]  # the options of all cases together
    assert SECRET.decode() not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert snapshot(fake_host) == before


async def test_a_hook_that_fails_keeps_its_fork_out_of_running(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The guest's own error is the result's, its siblings run, and nothing of the fork is left."""
    await make(fake_host, State.TEMPLATE)
    said = "hook: /etc/coppice/on-fork ended with exit code 3"
    driver.faults.fail_at("identity", nth=2, error=lambda: VmmError(said, hint="see the test"))
    report = await fake_host.fork("oak", count=2, payloads=[b"a", b"b"])
    (failed,) = [result for result in report.results if not result.ok]
    assert failed.error_code == GuestRefused.code
    assert said in (failed.error or "")
    await assert_tidy(fake_host, "oak", *(fork.name for fork in report.instances))


async def test_nothing_of_a_payload_is_kept(
    fake_host: AsyncHost, fake_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the database, nor any file of the data directory, nor the log, nor a command line of the VMM has it: only the guest's memory."""
    caplog.set_level(logging.DEBUG)
    await make(fake_host, State.TEMPLATE)
    (fork,) = (await fake_host.fork("oak", payload=SECRET, atomic=True)).instances
    assert fork.vmm is not None
    assert SECRET not in Path(f"/proc/{fork.vmm.pid}/cmdline").read_bytes()
    assert SECRET not in Path(f"/proc/{fork.vmm.pid}/environ").read_bytes()
    holders = [path for path in fake_home.rglob("*") if path.is_file() and SECRET in path.read_bytes()]
    assert holders == []
    assert SECRET.decode() not in caplog.text
    request = make_request(
        count=1, names=(), target=State.RUNNING, atomic=True, tags={}, publish=(), from_running=False, payload=SECRET
    )
    assert SECRET.decode() not in repr(request)
