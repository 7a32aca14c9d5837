"""Who may use what: instances, images and volumes belong to an owner, and are shared with another only where their owner says so.

Guest memory that is shared is a side channel: who shares a page can tell, by timing, whether another has used it (CVE-2015-2877). So a template's
memory reaches another owner only where it was promoted with `public`. A host without an owner is the operator's, and may use all there is; what the
operator makes belongs to nobody, and is for others only where it is public.

This keeps the tenants of a program apart that opens hosts for them. It is no guard against who can read the data directory, or choose the owner.
Names are unique in a data directory, whoever's they are: they are no secret.
"""

from __future__ import annotations

from coppice.errors import NotFound, Refused
from coppice.model import Image, Instance, Snapshot, State, Volume


def owns(owner: str | None, thing: Instance | Image | Snapshot | Volume) -> bool:
    """Whether a host with this owner may do everything with the thing: it is its own, or the host is the operator's."""
    return owner is None or thing.owner == owner


def may_use_image(owner: str | None, image: Image) -> bool:
    """Whether a host with this owner may run the image: its own, or a public one."""
    return owns(owner, image) or image.public


def may_fork(owner: str | None, instance: Instance) -> bool:
    """Whether a host with this owner may fork the instance: its own, or a public template."""
    return owns(owner, instance) or (instance.public and instance.state is State.TEMPLATE)


def require_instance(owner: str | None, instance: Instance, reference: str, *, to_fork: bool = False) -> None:
    """Let a host with this owner use an instance, or only fork it.

    :raises NotFound: it is another owner's; the same words as where there is none
    :raises Refused: it is another owner's public template, which can only be forked
    """
    if owns(owner, instance) or (to_fork and may_fork(owner, instance)):
        return
    if may_fork(owner, instance):
        raise Refused(f"{instance.name} is another owner's", hint="it is public: it can be forked, and nothing else")
    raise no_instance(reference)


def no_instance(reference: str) -> NotFound:
    """The error for a name that nothing goes by, as far as the asker may know."""
    return NotFound(f"there is no instance {reference!r}", hint="`coppice ls` shows those there are")


def no_snapshot(reference: str) -> NotFound:
    """The same for snapshots, which are always their owner's alone."""
    return NotFound(f"there is no snapshot {reference!r}", hint="`coppice snapshot ls` shows those there are")


def no_volume(reference: str) -> NotFound:
    """The same for volumes, which are always their owner's alone."""
    return NotFound(f"there is no volume {reference!r}", hint="`coppice volume ls` shows those there are")


def require_operator(owner: str | None, what: str) -> None:
    """Keep what concerns all owners to the operator.

    :raises Refused: the host has an owner
    """
    if owner is not None:
        raise Refused(
            f"{what} is for the operator of the data directory", hint="do it without --owner or COPPICE_OWNER"
        )
