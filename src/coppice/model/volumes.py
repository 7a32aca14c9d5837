"""Volumes: named disks that outlive the instances they are attached to."""

from typing import Literal

from coppice.model.record import Record


class Attachment(Record, frozen=True, kw_only=True):
    """One holder of a volume."""

    holder: Literal["instance", "snapshot"]
    instance_id: str  # or the snapshot's
    name: str
    mount_path: str
    readonly: bool


class Volume(Record, frozen=True, kw_only=True):
    """A named disk with an ext4 file system. It outlives the instances it is attached to."""

    id: str
    name: str
    size_bytes: int
    created_at: float
    owner: str | None = None  # None: the operator's
    tags: dict[str, str] = {}
    layers: tuple[int, ...] = ()  # over its raw file, lowest first; while a machine writes to it, see its `disk_layers`
    driver: str = ""  # that has made the layers
    attachments: tuple[Attachment, ...] = ()  # derived from the holders' records, never stored
