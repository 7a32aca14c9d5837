"""Ownership: instances, images, snapshots and volumes belong to an owner, who may make some public.

Shared guest memory is a side channel: by timing, one guest can detect which shared pages another
has used (CVE-2015-2877). So another owner can fork a template only if it was promoted with
`public`. A host object without an owner is the operator's and may use everything. What the operator
makes has no owner, and other owners can use it only if it is public.

This separates the tenants of a program that opens a host object for each of them. It is no
protection against a user who can read the data directory or choose the owner. Names are unique
across owners, so a taken name reveals that it exists.
"""

from coppice.errors import NotFound, Refused
from coppice.model import Image, Instance, Snapshot, State, Volume


def owns(owner: str | None, thing: Instance | Image | Snapshot | Volume) -> bool:
    """Return whether a host with this owner may do everything with the thing."""
    return owner is None or thing.owner == owner


def may_use_image(owner: str | None, image: Image) -> bool:
    """Return whether a host with this owner may run the image: its own, or a public one."""
    return owns(owner, image) or image.public


def may_fork(owner: str | None, instance: Instance) -> bool:
    """Return whether a host with this owner may fork the instance: its own or a public template."""
    return owns(owner, instance) or (instance.public and instance.state is State.TEMPLATE)


def require_instance(owner: str | None, instance: Instance, reference: str, *, to_fork: bool = False) -> None:
    """Require that a host with this owner may use an instance, or fork it with `to_fork`.

    :raises NotFound: the instance is another owner's or internal; the message is that for a missing
        one
    :raises Refused: it is another owner's public template, which can only be forked
    """
    if instance.stem_of is not None:
        raise no_instance(reference)
    if owns(owner, instance) or (to_fork and may_fork(owner, instance)):
        return
    if may_fork(owner, instance):
        raise Refused(
            f"{instance.name} belongs to another owner", hint=f"it is public: run `coppice fork {instance.name}`"
        )
    raise no_instance(reference)


def no_instance(reference: str) -> NotFound:
    """Return the error for a name that is unknown, or that this owner must not know."""
    return NotFound(f"there is no instance {reference!r}", hint="list the instances with `coppice ls`")


def no_snapshot(reference: str) -> NotFound:
    """Return the same error for snapshots, which are never shared."""
    return NotFound(f"there is no snapshot {reference!r}", hint="list the snapshots with `coppice snapshot ls`")


def no_volume(reference: str) -> NotFound:
    """Return the same error for volumes, which are never shared."""
    return NotFound(f"there is no volume {reference!r}", hint="list the volumes with `coppice volume ls`")


def require_operator(owner: str | None, what: str) -> None:
    """Refuse an operation that concerns all owners.

    :raises Refused: the host has an owner
    """
    if owner is not None:
        raise Refused(
            f"{what} is for the operator of the data directory",
            hint="run it without --owner, after `unset COPPICE_OWNER`",
        )
