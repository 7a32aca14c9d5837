"""Owners: whose thing is whose, and that memory is shared with others only where its owner says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coppice.errors import InUse, InvalidName, NameTaken, NotFound, Refused
from coppice.host import AsyncHost
from coppice.model import MIB, Instance, State, VolumeMount
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.rooms import DEADLINES, IMAGE, open_rooms

Hosts = dict[str, AsyncHost]


@pytest.fixture
async def hosts(driver: FakeDriver, fake_home: Path) -> AsyncIterator[Hosts]:
    """The operator's host, alice's and bob's, over one data directory with one public image."""
    async with AsyncExitStack() as stack:
        opened = {
            owner: await stack.enter_async_context(
                AsyncHost(
                    fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, owner=owner or None, spares=0
                )
            )
            for owner in ("", "alice", "bob")
        }
        await opened[""].image_tag(IMAGE, IMAGE, public=True)
        yield opened


def names(instances: list[Instance]) -> list[str]:
    return [instance.name for instance in instances]


async def test_each_sees_what_is_its_own_and_the_operator_sees_all(hosts: Hosts) -> None:
    """ls, tree and stats: nobody sees another's, and the operator's own are nobody else's."""
    for owner, name in (("", "elm"), ("alice", "oak"), ("bob", "ash")):
        assert (await boot(hosts[owner], name)).owner == (owner or None)
    assert [names(await hosts[owner].ls()) for owner in hosts] == [["elm", "oak", "ash"], ["oak"], ["ash"]]
    assert set(await hosts["alice"].stats()) == {"oak"}
    assert [node.instance.name for node in await hosts["bob"].tree()] == ["ash"]


async def test_anothers_instance_is_not_there(hosts: Hosts) -> None:
    """By name, by id and by record, for every use: the error is that of a name that nothing has, and nothing happens."""
    oak = await boot(hosts["alice"], "oak")
    before = snapshot(hosts[""])
    bob = hosts["bob"]
    with pytest.raises(NotFound) as missing:
        await bob.get("nothing")
    for reference in ("oak", oak.id, oak):
        uses = (bob.get, bob.inspect, bob.standby, bob.restore, bob.start, bob.stop, bob.rm, bob.fork, bob.promote)
        for use in (*uses, bob.demote, bob.health, bob.stats, bob.tree):
            with pytest.raises(NotFound) as hidden:
                await use(reference)
            assert hidden.value.hint == missing.value.hint
        with pytest.raises(NotFound):
            await bob.exec(reference, ["hostname"])
        with pytest.raises(NotFound):
            await bob.fork(reference, from_running=True)
        with pytest.raises(NotFound):
            await bob.read_file(reference, "/etc/hostname")
        with pytest.raises(NotFound):
            await anext(bob.logs(reference))
        with pytest.raises(NotFound):
            await bob.wait(reference, deadline_s=1)
    assert snapshot(hosts[""]) == before
    assert await ask(hosts["alice"], "oak", "hostname") == "oak"


async def test_an_owner_cannot_fork_anothers_template(hosts: Hosts) -> None:
    """Shared pages are a side channel (CVE-2015-2877): a template is its owner's alone until it is made public."""
    source = await make(hosts["alice"], State.TEMPLATE)
    with pytest.raises(NotFound):
        await hosts["bob"].fork("oak")
    assert memory_of(hosts[""], source).stat().st_nlink == 1
    await assert_tidy(hosts[""], "oak")


async def test_a_public_template_can_be_forked_and_nothing_else(hosts: Hosts) -> None:
    """The fork is the forker's; the template stays its owner's, who cannot see into the fork."""
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.STANDBY)
    assert (await alice.promote("oak", public=True)).public
    (elm,) = (await bob.fork("oak", names=["elm"], atomic=True)).instances
    assert (elm.owner, elm.public) == ("bob", False)
    assert await ask(bob, "elm", "hostname") == "elm"
    assert names(await bob.ls()) == ["elm"]
    for use in (bob.get, bob.rm, bob.demote, bob.inspect):
        with pytest.raises(Refused, match="another owner"):
            await use("oak")
    with pytest.raises(Refused, match="another owner"):
        await bob.promote("oak", public=False)
    with pytest.raises(NotFound):
        await alice.get("elm")


async def test_what_is_public_can_be_private_again(hosts: Hosts) -> None:
    """From then on nobody else forks it; forks that there are own their memory, and live on. A demoted template is private."""
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.TEMPLATE)
    assert (await alice.promote("oak", public=True)).public
    assert (await alice.promote("oak")).public
    await bob.fork("oak", names=["elm"], atomic=True)
    assert not (await alice.promote("oak", public=False)).public
    with pytest.raises(NotFound):
        await bob.fork("oak")
    assert await ask(bob, "elm", "hostname") == "elm"
    await bob.rm("elm")
    await alice.promote("oak", public=True)
    assert not (await alice.demote("oak")).public
    with pytest.raises(NotFound):
        await bob.fork("oak")


async def test_a_fork_by_the_operator_stays_with_its_owner(hosts: Hosts) -> None:
    """The operator works on behalf of an owner: the fork is of the same owner as its source."""
    await make(hosts["alice"], State.TEMPLATE)
    (fork,) = (await hosts[""].fork("oak", names=["elm"], atomic=True)).instances
    assert fork.owner == "alice"
    assert names(await hosts["alice"].ls()) == ["oak", "elm"]


async def test_an_image_is_its_owners(hosts: Hosts) -> None:
    """Another's image is not there, by name or digest; a public one can be run and tagged, and not removed."""
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    own = await alice.image_tag(IMAGE, "team/alice")
    assert (own.owner, own.public) == ("alice", False)
    assert {image.name for image in await bob.image_ls()} == {IMAGE}
    await operator.image_tag(IMAGE, IMAGE)  # private again
    assert await bob.image_ls() == []
    for reference in ("team/alice", IMAGE, own.digest, own.digest.removeprefix("sha256:")[:12]):
        with pytest.raises(NotFound):
            await bob.image_inspect(reference)
        with pytest.raises(NotFound):
            await bob.run(reference)
        with pytest.raises(NotFound):
            await bob.image_tag(reference, "mine")
        with pytest.raises(NotFound):
            await bob.image_rm(reference)
    assert (await alice.image_inspect(own.digest)).name == "team/alice"
    assert (await alice.run("team/alice", start=False)).owner == "alice"


async def test_names_of_images_are_not_taken_over(hosts: Hosts) -> None:
    """A name that another owner has is refused, and keeps what it names; the operator may take it."""
    alice, bob = hosts["alice"], hosts["bob"]
    await alice.image_tag(IMAGE, "web")
    for name in ("web", IMAGE):
        with pytest.raises(NameTaken, match=name):
            await bob.image_tag(IMAGE, name)
    assert (await alice.image_inspect("web")).owner == "alice"
    assert (await hosts[""].image_tag(IMAGE, "web")).owner is None


async def test_removing_an_image_leaves_the_names_of_others(hosts: Hosts) -> None:
    """By digest an owner removes its own names only; the root goes with the last name."""
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    image = await alice.image_tag(IMAGE, "web")
    with pytest.raises(Refused, match="another owner"):
        await bob.image_rm(IMAGE)
    await alice.image_rm(image.digest)
    assert [each.name for each in await operator.image_ls()] == [IMAGE]
    assert operator.rooms.images.root_file(image).exists()
    await operator.image_rm(IMAGE)
    assert await operator.image_ls() == []


async def test_a_snapshot_is_its_owners_alone(hosts: Hosts) -> None:
    """Of an instance of the same owner, also where that is a public template; for others it is not there."""
    alice, bob = hosts["alice"], hosts["bob"]
    await make(alice, State.TEMPLATE)
    await alice.promote("oak", public=True)
    kept = await alice.snapshot_create("oak", name="noon")
    assert kept.owner == "alice"
    assert await bob.snapshot_ls() == []
    for reference in ("noon", kept.id, kept):
        for use in (bob.snapshot_inspect, bob.snapshot_restore, bob.snapshot_fork, bob.snapshot_rm):
            with pytest.raises(NotFound, match="no snapshot"):
                await use(reference)
    with pytest.raises(Refused):
        await bob.snapshot_create("oak")
    (fork,) = (await alice.snapshot_fork("noon", payload=b"for alice", atomic=True)).instances
    assert fork.owner == "alice"
    assert await ask(alice, fork, "payload") == "for alice"


async def test_a_volume_is_its_owners_alone(hosts: Hosts) -> None:
    """For others it is not there, by name or id, to look at, attach or remove; its name is taken all the same."""
    operator, alice, bob = hosts[""], hosts["alice"], hosts["bob"]
    data = await alice.volume_create("data", size_bytes=16 * MIB)
    assert data.owner == "alice"
    assert [await host.volume_ls() for host in (operator, alice, bob)] == [[data], [data], []]
    for reference in ("data", data.id, data):
        for use in (bob.volume_inspect, bob.volume_rm):
            with pytest.raises(NotFound, match="there is no volume"):
                await use(reference)
    for reference in ("data", data.id):
        with pytest.raises(NotFound, match="there is no volume"):
            await boot(bob, "ash", volumes=[VolumeMount(volume=reference, mount_path="/data")])
    with pytest.raises(NameTaken):
        await bob.volume_create("data", size_bytes=16 * MIB)
    await boot(alice, "oak", volumes=[VolumeMount(volume="data", mount_path="/data")])
    await assert_tidy(operator, "oak")


async def test_a_public_template_takes_its_volumes_along(hosts: Hosts) -> None:
    """What it reads may be in its memory anyway: who may fork it shares them, read-only, and nothing else of them."""
    alice, bob = hosts["alice"], hosts["bob"]
    data = await alice.volume_create("data", size_bytes=16 * MIB)
    await boot(alice, "oak", volumes=[VolumeMount(volume="data", mount_path="/data", readonly=True)])
    await alice.standby("oak")
    await alice.promote("oak", public=True)
    (elm,) = (await bob.fork("oak", names=["elm"], atomic=True)).instances
    assert [(disk.volume_id, disk.readonly) for disk in elm.machine.volumes] == [(data.id, True)]
    with pytest.raises(NotFound):
        await bob.volume_inspect("data")
    with pytest.raises(InUse, match="oak, elm have it"):
        await alice.volume_rm("data")


async def test_what_concerns_all_is_the_operators(hosts: Hosts) -> None:
    """What is left behind belongs to nobody, a check of everything is not for everybody, and kernels are for all."""
    for work in (hosts["alice"].gc(), hosts["alice"].verify(), hosts["alice"].kernel_rm("custom-6.1-0123abcd")):
        with pytest.raises(Refused, match="operator"):
            await work
    assert (await hosts[""].gc()).removed == ()


def test_an_owner_is_a_name(tmp_path: Path) -> None:
    """It comes from outside: validated at the boundary, before anything is opened."""
    with pytest.raises(InvalidName):
        AsyncHost(tmp_path, owner="../alice")
    assert not list(tmp_path.iterdir())
