"""Requests for volumes: named disks that outlive the instances that they are attached to."""

from typing import Annotated, ClassVar

from msgspec import Meta

from coppice.model import GIB, Volume
from coppice.model.inspection import VolumeInspection
from coppice.names import check_host_path, check_name, check_reference, check_tags, check_volume_size
from coppice.requests.base import PATH, R, Request, TagFilter, Tags


class VolumeRequest(Request[R], frozen=True, kw_only=True):
    """A request that concerns one volume."""

    volume: Annotated[str, Meta(description="Name or id of the volume.")]

    def check(self) -> None:
        """Check the name or id."""
        check_reference(self.volume)


class VolumeCreateRequest(Request[Volume], frozen=True, kw_only=True):
    """Make a volume: a disk with an ext4 file system, allocated as it is filled. `run` attaches it.

    :raises NameTaken: another volume has the name
    :raises ImageError: the archive is corrupt, truncated or unsafe, or contains a device node
    :raises UsageError: there is no such archive, or its content does not fit
    :raises NoSpace: the disk is full
    """

    reports_progress: ClassVar[bool] = True

    name: Annotated[str, Meta(description="Name of the volume.")]
    size_bytes: Annotated[int, Meta(description="Size of the disk, in whole MiB.")] = GIB
    archive: Annotated[
        str | None,
        Meta(
            description="A tar archive of this machine with the volume's first content, plain or compressed by gzip, "
            "zstd, xz or bzip2. Owners, modes, times, links and extended attributes are kept; devices are refused.",
            extra=PATH,
        ),
    ] = None
    tags: Tags = {}

    def check(self) -> None:
        """Check name, size and tags."""
        check_name(self.name)
        check_volume_size(self.size_bytes)
        check_tags(self.tags)
        if self.archive is not None:
            check_host_path(self.archive)


class VolumeLsRequest(Request[list[Volume]], frozen=True, kw_only=True):
    """Return the owner's volumes, oldest first, with the instances and snapshots that hold them.

    The operator sees all.
    """

    tags: TagFilter = {}


class VolumeInspectRequest(VolumeRequest[VolumeInspection], frozen=True, kw_only=True):
    """Return one volume with its holders and its allocated size.

    :raises NotFound: there is no such volume
    """


class VolumeRmRequest(VolumeRequest[None], frozen=True, kw_only=True):
    """Remove a volume and everything on it.

    :raises NotFound: there is no such volume
    :raises InUse: instances or snapshots hold the volume; the message names them
    """
