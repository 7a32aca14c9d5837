"""Owners: each object belongs to one owner, who alone can use it; memory is shared with others only
if its owner allows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from coppice.client import AsyncHost, AsyncMachine
from coppice.errors import InUse, InvalidName, NameTaken, NotFound, Refused
from coppice.model import MIB, Instance, State, VolumeMount
from coppice.requests import (
    AutoStandbyHoldRequest,
    AutoStandbyRequest,
    ConnectRequest,
    DemoteRequest,
    ExecRequest,
    ForkRequest,
    GetRequest,
    HealthRequest,
    InspectRequest,
    LogsRequest,
    LsRequest,
    OpenExecRequest,
    PromoteRequest,
    ReadFileRequest,
    Request,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    SnapshotRmRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
    StandbyRequest,
    StartRequest,
    StatRequest,
    StatsRequest,
    StopRequest,
    TreeRequest,
    UpdateRequest,
    WaitRequest,
    WriteFileRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.rooms import DEADLINES, IMAGE, open_rooms

Hosts = dict[str, AsyncHost]


def _asked(kind: type[Request[object]], name: str, *, field: str = "instance") -> Request[object]:
    """Return a request of that kind for one object, with all other fields at their defaults."""
    return kind(**{field: name})


EVERY_USE: tuple[Callable[[str], Request[object]], ...] = (
    *(
        partial(_asked, kind)
        for kind in (
            GetRequest, InspectRequest, StandbyRequest, RestoreRequest, StartRequest, StopRequest, RmRequest, ForkRequest, PromoteRequest,
            DemoteRequest, HealthRequest, StatsRequest, TreeRequest, SnapshotRequest, UpdateRequest,
            AutoStandbyRequest, AutoStandbyHoldRequest, SnapshotScheduleRequest, SnapshotScheduleRmRequest,
        )
    ),
    lambda name: ExecRequest(instance=name, argv=["hostname"]),
    lambda name: ForkRequest(instance=name, from_running=True),
    lambda name: ReadFileRequest(instance=name, path="/etc/hostname"),
    lambda name: WriteFileRequest(instance=name, path="/etc/hostname", data=b""),
    lambda name: StatRequest(instance=name, path="/etc/hostname"),
    lambda name: WaitRequest(instance=name, deadline_s=1),
    lambda name: SnapshotScheduleSetRequest(instance=name, interval_s=60, max_count=1),
)  # fmt: skip


@pytest.fixture
async def hosts(driver: FakeDriver, fake_home: Path) -> AsyncIterator[Hosts]:
    """The hosts of the operator, alice and bob, over one data directory with one public image."""
    async with AsyncExitStack() as stack:
        opened = {
            owner: await stack.enter_async_context(
                AsyncHost(
                    fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, owner=owner or None, spares=0
                )
            )
            for owner in ("", "alice", "bob")
        }
        await opened[""].images.tag(IMAGE, IMAGE, public=True)
        yield opened


def names(instances: Sequence[Instance | AsyncMachine]) -> list[str]:
    return [instance.name for instance in instances]


async def test_each_owner_sees_its_own_instances_and_the_operator_sees_all(hosts: Hosts) -> None:
    """`ls`, `tree` and `stats` show an owner its own instances only, and not the operator's."""
    for owner, name in (("", "elm"), ("alice", "oak"), ("bob", "ash")):
        assert (await boot(hosts[owner], name)).owner == (owner or None)
    assert [names(await hosts[owner].ls()) for owner in hosts] == [["elm", "oak", "ash"], ["oak"], ["ash"]]
    assert set(await hosts["alice"].stats()) == {"oak"}
    assert [node.instance.name for node in await hosts["bob"].tree()] == ["ash"]


async def test_another_owners_instance_is_not_found(hosts: Hosts) -> None:
    """Every use of its name or id raises the error of an unknown name, and changes nothing."""
    oak = await boot(hosts["alice"], "oak")
    before = snapshot(hosts[""])
    bob = hosts["bob"]
    with pytest.raises(NotFound) as missing:
        await bob.call(GetRequest(instance="nothing"))
    for reference in ("oak", oak.id):
        for use in EVERY_USE:
            with pytest.raises(NotFound) as hidden:
                await bob.call(use(reference))
            assert hidden.value.hint == missing.value.hint
        with pytest.raises(NotFound):
            async with bob.stream(LogsRequest(instance=reference)):
                pass
        with pytest.raises(NotFound):
            async with bob.stream(OpenExecRequest(instance=reference, argv=["hostname"])):
                pass
        with pytest.raises(NotFound):
            async with bob.stream(ConnectRequest(instance=reference, to=80)):
                pass
    assert snapshot(hosts[""]) == before
    assert await ask(hosts["alice"], "oak", "hostname") == "oak"


async def test_an_owner_cannot_fork_anothers_template(hosts: Hosts) -> None:
    """Shared pages are a side channel (CVE-2015-2877), so a template belongs to its owner alone
    until it is made public.
    """
    source = await make(hosts["alice"], State.TEMPLATE)
    with pytest.raises(NotFound):
        await hosts["bob"].call(ForkRequest(instance="oak"))
    assert memory_of(hosts[""], source).stat().st_nlink == 1
    await assert_tidy(hosts[""], "oak")


async def test_a_public_template_can_be_forked_and_nothing_else(hosts: Hosts) -> None:
    """The fork belongs to the owner who made it.

    The template stays with its owner, who cannot see the fork.
    """
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.STANDBY)
    assert (await alice.call(PromoteRequest(instance="oak", public=True))).public
    (elm,) = (await bob.call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert (elm.owner, elm.public) == ("bob", False)
    assert await ask(bob, "elm", "hostname") == "elm"
    assert names(await bob.call(LsRequest())) == ["elm"]
    for use in (GetRequest, RmRequest, DemoteRequest, InspectRequest):
        with pytest.raises(Refused, match="another owner"):
            await bob.call(_asked(use, "oak"))
    with pytest.raises(Refused, match="another owner"):
        await bob.call(PromoteRequest(instance="oak", public=False))
    with pytest.raises(NotFound):
        await alice.call(GetRequest(instance="elm"))


async def test_a_public_template_can_be_made_private_again(hosts: Hosts) -> None:
    """Other owners can fork it no longer, and their existing forks live on with their own memory.

    A demoted template is private.
    """
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.TEMPLATE)
    assert (await alice.call(PromoteRequest(instance="oak", public=True))).public
    assert (await alice.call(PromoteRequest(instance="oak"))).public
    await bob.call(ForkRequest(instance="oak", names=["elm"], atomic=True))
    assert not (await alice.call(PromoteRequest(instance="oak", public=False))).public
    with pytest.raises(NotFound):
        await bob.call(ForkRequest(instance="oak"))
    assert await ask(bob, "elm", "hostname") == "elm"
    await bob.call(RmRequest(instance="elm"))
    await alice.call(PromoteRequest(instance="oak", public=True))
    assert not (await alice.call(DemoteRequest(instance="oak"))).public
    with pytest.raises(NotFound):
        await bob.call(ForkRequest(instance="oak"))


async def test_a_fork_by_the_operator_stays_with_its_owner(hosts: Hosts) -> None:
    """The operator works on behalf of an owner: the fork has the same owner as its source."""
    await make(hosts["alice"], State.TEMPLATE)
    (fork,) = (await hosts[""].call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert fork.owner == "alice"
    assert names(await hosts["alice"].call(LsRequest())) == ["oak", "elm"]


async def test_an_image_belongs_to_its_owner(hosts: Hosts) -> None:
    """Another owner's private image is not found, by name or digest."""
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    own = await alice.images.tag(IMAGE, "team/alice")
    assert (own.owner, own.public) == ("alice", False)
    assert {image.name for image in await bob.images.ls()} == {IMAGE}
    await operator.images.tag(IMAGE, IMAGE)  # private again
    assert await bob.images.ls() == []
    for reference in ("team/alice", IMAGE, own.digest, own.digest.removeprefix("sha256:")[:12]):
        with pytest.raises(NotFound):
            await bob.images.inspect(reference)
        with pytest.raises(NotFound):
            await bob.call(RunRequest(image=reference))
        with pytest.raises(NotFound):
            await bob.images.tag(reference, "mine")
        with pytest.raises(NotFound):
            await bob.images.rm(reference)
    assert (await alice.images.inspect(own.digest)).name == "team/alice"
    assert (await alice.call(RunRequest(image="team/alice", start=False))).owner == "alice"


async def test_names_of_images_are_not_taken_over(hosts: Hosts) -> None:
    """A name that another owner has is refused, and keeps its image. The operator may take it."""
    alice, bob = hosts["alice"], hosts["bob"]
    await alice.images.tag(IMAGE, "web")
    for name in ("web", IMAGE):
        with pytest.raises(NameTaken, match=name):
            await bob.images.tag(IMAGE, name)
    assert (await alice.images.inspect("web")).owner == "alice"
    assert (await hosts[""].images.tag(IMAGE, "web")).owner is None


async def test_removing_an_image_leaves_the_names_of_others(hosts: Hosts) -> None:
    """Removing by digest removes the caller's own names only; the files go with the last name."""
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    image = await alice.images.tag(IMAGE, "web")
    with pytest.raises(Refused, match="another owner"):
        await bob.images.rm(IMAGE)
    await alice.images.rm(image.digest)
    assert [each.name for each in await operator.images.ls()] == [IMAGE]
    assert operator.local.rooms.images.root_file(image).exists()
    await operator.images.rm(IMAGE)
    assert await operator.images.ls() == []


async def test_a_snapshot_belongs_to_its_owner(hosts: Hosts) -> None:
    """A public template's snapshot belongs to its owner too, and other owners do not find it."""
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.TEMPLATE)
    await alice.call(PromoteRequest(instance="oak", public=True))
    kept = await alice.call(SnapshotRequest(instance="oak", name="noon"))
    assert kept.owner == "alice"
    assert await bob.snapshots.ls() == []
    for reference in ("noon", kept.id):
        for use in (SnapshotInspectRequest, SnapshotRestoreRequest, SnapshotForkRequest, SnapshotRmRequest):
            with pytest.raises(NotFound, match="no snapshot"):
                await bob.call(_asked(use, reference, field="snapshot"))
    with pytest.raises(Refused):
        await bob.call(SnapshotRequest(instance="oak"))
    (fork,) = (await alice.call(SnapshotForkRequest(snapshot="noon", payload=b"for alice", atomic=True))).instances
    assert fork.owner == "alice"
    assert await ask(alice, fork, "payload") == "for alice"


async def test_a_volume_belongs_to_its_owner(hosts: Hosts) -> None:
    """Other owners cannot find it by name or id to inspect, attach or remove it, but its name is
    taken for them.
    """
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    data = await alice.volumes.create("data", size_bytes=16 * MIB)
    assert data.owner == "alice"
    assert [await host.volumes.ls() for host in (operator, alice, bob)] == [[data], [data], []]
    for reference in ("data", data.id, data):
        for use in (bob.volumes.inspect, bob.volumes.rm):
            with pytest.raises(NotFound, match="there is no volume"):
                await use(reference)
    for reference in ("data", data.id):
        with pytest.raises(NotFound, match="there is no volume"):
            await boot(bob, "ash", volumes=[VolumeMount(volume=reference, mount_path="/data")])
    with pytest.raises(NameTaken):
        await bob.volumes.create("data", size_bytes=16 * MIB)
    await boot(alice, "oak", volumes=[VolumeMount(volume="data", mount_path="/data")])
    await assert_tidy(operator, "oak")


async def test_a_public_template_shares_its_volumes(hosts: Hosts) -> None:
    """Its memory may contain their data anyway, so its forks get them read-only.

    Other owners get no other access to them.
    """
    alice, bob = hosts["alice"], hosts["bob"]
    data = await alice.volumes.create("data", size_bytes=16 * MIB)
    await boot(alice, "oak", volumes=[VolumeMount(volume="data", mount_path="/data", readonly=True)])
    await alice.call(StandbyRequest(instance="oak"))
    await alice.call(PromoteRequest(instance="oak", public=True))
    (elm,) = (await bob.call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert [(disk.volume_id, disk.readonly) for disk in elm.machine.volumes] == [(data.id, True)]
    with pytest.raises(NotFound):
        await bob.volumes.inspect("data")
    with pytest.raises(InUse, match="oak, elm have it"):
        await alice.volumes.rm("data")


async def test_operations_on_everything_are_for_the_operator(hosts: Hosts) -> None:
    """gc, verify and the removal of kernels concern all owners."""
    for work in (hosts["alice"].gc(), hosts["alice"].verify(), hosts["alice"].kernels.rm("custom-6.1-0123abcd")):
        with pytest.raises(Refused, match="operator"):
            await work
    assert (await hosts[""].gc()).removed == ()


def test_an_owner_is_a_name(tmp_path: Path) -> None:
    """The owner's name comes from outside, so it is validated before anything is opened."""
    with pytest.raises(InvalidName):
        AsyncHost(tmp_path, owner="../alice")
    assert not list(tmp_path.iterdir())
