"""The plan of a fan-out: names, ids and records of all children, before the first side effect."""

from __future__ import annotations

import time

import msgspec

from coppice.addresses import told
from coppice.errors import IllegalTransition
from coppice.machine.volumes import with_clones
from coppice.model import Instance, Snapshot, State
from coppice.model.lifecycle import Operation, require
from coppice.names import new_id, new_name
from coppice.requests import FanOut
from coppice.requests.supervision import inherited, with_policies


def takes_memory(source: Instance, target: State) -> bool:
    """Return whether a fork to `target` gets its source's captured memory, not only the disk."""
    return source.state is not State.STOPPED and target is not State.STOPPED


def plan(source: Instance, request: FanOut, parent: Instance, owner: str | None) -> list[Instance]:
    """Return the children's records: the source's machine and disk, with new ids and names.

    They have clones of the volumes that the source writes to, if the caller has admitted such a source.

    :raises IllegalTransition: the source cannot be forked in its state, or not to that target
    """
    require(Operation.FORK, source, clones_volumes=True)
    if source.state is State.STOPPED and request.target is State.STANDBY:
        raise IllegalTransition(
            f"{source.name} is Stopped: it has no memory to fork to Standby", hint="fork it to Stopped or Running"
        )
    names = request.child_names or tuple(new_name(parent.name) for _ in range(request.count))
    now = time.time()
    policies = with_policies(inherited(source.supervision), request, now)
    return [
        Instance(
            id=new_id(),
            name=name,
            state=State.CREATED,
            created_at=now,
            driver=source.driver,
            image=source.image,
            image_name=source.image_name,
            machine=with_clones(source.machine),
            process=told(source.process, request.notify),
            hostname=name,
            tags=dict(request.tags),
            publish=tuple(request.publish),
            egress=request.egress or source.egress,
            limits=source.limits if request.limits is None else request.limits,
            parent=parent.id,
            parent_name=parent.name,
            owner=source.owner if owner is None else owner,
            supervision=policies,
        )
        for name in names
    ]


def grown_from(snapshot: Snapshot, child: Instance, parent: Instance | None) -> Instance:
    """Return a child's record with its snapshot, and the snapshot's source if that still exists."""
    return msgspec.structs.replace(
        child, snapshot=snapshot.id, parent=parent.id if parent else None, parent_name=snapshot.source_name
    )
