"""The plan of a fan-out: names, ids and records of all children, before the first side effect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec

from coppice.errors import IllegalTransition, UsageError
from coppice.lifecycle import Operation, require
from coppice.model import ANY_PORT, OWN_ADDRESS, Instance, Publish, Record, Snapshot, State
from coppice.names import check_count, check_name, check_payloads, check_publish, check_tags, new_id, new_name

OPERATION = "fork"  # journal: a child that is not whole yet


class ForkRequest(Record, frozen=True, kw_only=True):
    """What the caller asked for. `names` is empty (generate), one (with a number behind it where count > 1), or one per child."""

    count: int = 1
    names: tuple[str, ...] = ()
    target: State = State.RUNNING
    atomic: bool = False
    tags: dict[str, str] = {}
    publish: tuple[Publish, ...] = ()
    from_running: bool = False
    payloads: tuple[bytes | None, ...] = ()

    def __repr__(self) -> str:
        """Without the payloads: they may be secrets, and a log is not the place for them."""
        return f"ForkRequest(count={self.count}, names={self.names}, target={self.target})"


def make_request(
    *,
    count: int,
    names: Sequence[str],
    target: State,
    atomic: bool,
    tags: Mapping[str, str],
    publish: Sequence[Publish],
    from_running: bool,
    payload: bytes | None = None,
    payloads: Sequence[bytes] = (),
) -> ForkRequest:
    """Validate what came from outside.

    :raises UsageError: a count, name, tag, target or payload that can never be
    """
    check_count(count)
    if target not in (State.STOPPED, State.STANDBY, State.RUNNING):
        raise UsageError(f"a fork cannot be made {target}", hint="the target is Stopped, Standby or Running")
    target = State(target)  # a caller without types may have given its name
    if isinstance(names, str):  # which is a sequence of strings, too
        names = [names]
    each = check_payloads(payload, payloads, count)
    if target is not State.RUNNING and any(data is not None for data in each):
        raise UsageError(
            f"a fork that is made {target} cannot have a payload: it is handed over when the guest starts, and kept nowhere",
            hint="fork it to Running, or without a payload",
        )
    if count > 1 and any(port.host_port != ANY_PORT and port.host_address != OWN_ADDRESS for port in publish):
        raise UsageError(
            "several forks cannot publish the same host port",
            hint="let each have an address of its own, as in `own:8080:80`, or any port, as in `auto:80`",
        )
    if len(names) == 1 and count > 1:
        width = len(str(count))
        names = [f"{names[0]}-{number:0{width}d}" for number in range(1, count + 1)]
    if names and len(names) != count:
        raise UsageError(f"{len(names)} names for {count} forks", hint="give one name per fork, or one for all")
    if len(set(names)) != len(names):
        raise UsageError("two forks cannot have the same name", hint="give each its own")
    return ForkRequest(
        count=count,
        names=tuple(check_name(name) for name in names),
        target=target,
        atomic=atomic,
        tags=check_tags(tags),
        publish=check_publish(publish),
        from_running=from_running,
        payloads=each,
    )


def takes_memory(source: Instance, target: State) -> bool:
    """Whether a fork to `target` takes the captured memory of its source along, or only its disk."""
    return source.state is not State.STOPPED and target is not State.STOPPED


def plan(source: Instance, request: ForkRequest, parent: Instance, owner: str | None) -> list[Instance]:
    """The children's records. A child is its source's machine and disk under its own id and name.

    :raises IllegalTransition: the source cannot be forked in its state, or not to that target
    """
    require(Operation.FORK, source)
    if source.state is State.STOPPED and request.target is State.STANDBY:
        raise IllegalTransition(
            f"{source.name} is Stopped: it has no memory to fork to Standby", hint="fork it to Stopped or Running"
        )
    names = request.names or tuple(new_name(parent.name) for _ in range(request.count))
    now = time.time()
    return [
        Instance(
            id=new_id(),
            name=name,
            state=State.CREATED,
            created_at=now,
            driver=source.driver,
            image=source.image,
            image_name=source.image_name,
            machine=source.machine,
            process=source.process,
            hostname=name,
            tags=dict(request.tags),
            publish=request.publish,
            parent=parent.id,
            parent_name=parent.name,
            manifest=source.manifest,
            identity_serial=source.identity_serial,
            open_ports=source.open_ports,
            frozen=source.frozen,
            captured_at=source.captured_at if takes_memory(source, request.target) else None,
            owner=source.owner if owner is None else owner,
        )
        for name in names
    ]


def grown_from(snapshot: Snapshot, child: Instance, parent: Instance | None) -> Instance:
    """A child's record with its lineage: the snapshot, and the instance that it was made of, if that still lives."""
    return msgspec.structs.replace(
        child, snapshot=snapshot.id, parent=parent.id if parent else None, parent_name=snapshot.source_name
    )
