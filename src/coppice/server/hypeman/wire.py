"""Bodies of the hypeman API. Unknown fields of requests are ignored, as there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from coppice import model
from coppice.model import GIB, MemoryReport, Record, State
from coppice.model.inspection import Inspection
from coppice.model.instance import said
from coppice.server.hypeman.paths import moment
from coppice.server.hypeman.policies import (
    AutoStandby,
    HealthCheck,
    HealthStatus,
    PolicyFields,
    RestartPolicy,
    RestartStatus,
    auto_standby_of,
    health_check_of,
    health_status_of,
    restart_policy_of,
    restart_status_of,
)
from coppice.server.hypeman.sizes import show_size
from coppice.server.running import OperationView

Kind = Literal["Standby", "Stopped"]
_FETCHING: Final = ("manifest", "download")  # stages of a pull
ImageStatus = Literal["pending", "pulling", "converting", "ready", "failed"]


class Network(Record, frozen=True, kw_only=True):
    """The network of an instance."""

    enabled: bool = True
    name: str | UnsetType = UNSET


class NetworkCreate(Record, frozen=True, kw_only=True):
    """The network of a new instance."""

    enabled: bool = True
    bandwidth_download: str = ""
    bandwidth_upload: str = ""
    egress: NetworkEgress | None = None


class NetworkEgress(Record, frozen=True, kw_only=True):
    """A proxy for what an instance sends. Not supported."""

    enabled: bool = False


class VolumeMount(Record, frozen=True, kw_only=True):
    """A volume attached to an instance."""

    volume_id: str
    mount_path: str
    readonly: bool = False


class Instance(Record, frozen=True, kw_only=True):
    """An instance. The last fields are Coppice's own: `memory` and the names of its forks are in answers about
    one instance alone.
    """

    id: str
    name: str
    image: str
    state: State
    created_at: datetime
    expires_at: datetime | None
    env: dict[str, str]
    tags: dict[str, str]
    vcpus: int
    size: str
    overlay_size: str
    hypervisor: str
    has_snapshot: bool
    network: Network
    volumes: list[VolumeMount]
    started_at: datetime | UnsetType = UNSET
    exit_code: int | UnsetType = UNSET
    exit_message: str | UnsetType = UNSET
    restart_policy: RestartPolicy | UnsetType = UNSET
    restart_status: RestartStatus | UnsetType = UNSET
    health_check: HealthCheck | UnsetType = UNSET
    health_status: HealthStatus | UnsetType = UNSET
    auto_standby: AutoStandby | UnsetType = UNSET
    parent: str | None = None
    snapshot: str | None = None
    fork_count: int | UnsetType = UNSET
    forks: tuple[str, ...] | UnsetType = UNSET
    memory: MemoryReport | UnsetType = UNSET


def instance_of(record: model.Instance, fork_count: int | UnsetType = UNSET) -> Instance:
    """Return an instance for a client."""
    machine, end = record.machine, record.process_end
    return Instance(
        id=record.id,
        name=record.name,
        image=record.image_name,
        state=record.state,
        created_at=moment(record.created_at),
        expires_at=None if record.expires_at is None else moment(record.expires_at),
        env=record.process.env,
        tags=record.tags,
        vcpus=machine.cpus,
        size=show_size(machine.memory_bytes),
        overlay_size=show_size(machine.overlay_bytes),
        hypervisor=record.driver,
        has_snapshot=record.state in (State.STANDBY, State.TEMPLATE),
        network=Network(enabled=machine.network != "none", name=machine.network),
        volumes=[
            VolumeMount(volume_id=each.volume_id, mount_path=each.mount_path, readonly=each.readonly)
            for each in machine.volumes
            if not each.private
        ],
        started_at=UNSET if record.started_at is None else moment(record.started_at),
        exit_code=UNSET if end is None else end.exit_code,
        exit_message=record.exit_reason or (UNSET if end is None else f"its process {said(end)}"),
        restart_policy=restart_policy_of(record),
        restart_status=restart_status_of(record),
        health_check=health_check_of(record),
        health_status=health_status_of(record),
        auto_standby=auto_standby_of(record),
        parent=record.parent,
        snapshot=record.snapshot,
        fork_count=fork_count,
    )


def inspected(found: Inspection) -> Instance:
    """Return an instance with its forks and its memory."""
    memory = UNSET if found.memory is None else found.memory
    shown = instance_of(found.instance, found.fork_count)
    return msgspec.structs.replace(shown, forks=found.forks, memory=memory)


class VolumeMountCreate(VolumeMount, frozen=True, kw_only=True):
    """A volume to attach to a new instance."""

    overlay: bool = False


class InstanceCreate(PolicyFields, frozen=True, kw_only=True):
    """A request for a new instance."""

    image: str
    name: str
    size: str = "512MB"
    vcpus: int = 1
    overlay_size: str = "2GB"
    env: dict[str, str] = {}
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    network: NetworkCreate = NetworkCreate()
    volumes: list[VolumeMountCreate] = []
    hypervisor: str | None = None
    tags: dict[str, str] = {}
    skip_guest_agent: bool = False
    disk_io_bps: str = ""
    devices: list[object] = []
    gpu: object = None
    platform: str | None = None
    credentials: object = None
    snapshot_policy: object = None


class InstanceUpdate(PolicyFields, frozen=True, kw_only=True):
    """A request to change the policies of an instance."""

    env: object = None


class InstanceFork(Record, frozen=True, kw_only=True):
    """A request for one fork."""

    name: str
    from_running: bool = False
    target_state: Literal["Stopped", "Standby", "Running"] | None = None
    target_hypervisor: str | None = None


class InstanceStandby(Record, frozen=True, kw_only=True):
    """A request to put an instance into standby."""

    compression: dict[str, object] | None = None


class InstanceStart(Record, frozen=True, kw_only=True):
    """A request to start a stopped instance."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None


class Waited(Record, frozen=True, kw_only=True):
    """The state after a wait."""

    state: State
    timed_out: bool


class PathInfo(Record, frozen=True, kw_only=True):
    """The status of a path in a guest."""

    exists: bool
    is_dir: bool = False
    is_file: bool = False
    is_symlink: bool = False
    error: str | UnsetType = UNSET
    link_target: str | UnsetType = UNSET
    mode: int | UnsetType = UNSET
    size: int | UnsetType = UNSET


class InstanceStats(Record, frozen=True, kw_only=True):
    """What an instance uses."""

    instance_id: str
    instance_name: str
    cpu_seconds: float
    memory_rss_bytes: int
    memory_vms_bytes: int
    network_rx_bytes: int | None
    network_tx_bytes: int | None
    allocated_vcpus: int
    allocated_memory_bytes: int
    memory_utilization_ratio: float


class Image(Record, frozen=True, kw_only=True):
    """An image."""

    name: str
    digest: str
    status: ImageStatus
    created_at: datetime
    tags: dict[str, str]
    size_bytes: int | UnsetType = UNSET  # this and the following four: of an image that is ready
    entrypoint: list[str] | UnsetType = UNSET
    cmd: list[str] | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    working_dir: str | UnsetType = UNSET
    queue_position: int | UnsetType = UNSET
    error: str | UnsetType = UNSET


def image_of(record: model.Image, name: str | None = None) -> Image:
    """Return an image for a client, under the name that the client used."""
    config = record.config
    return Image(
        name=name or record.name,
        digest=record.digest,
        status="ready",
        created_at=moment(record.created_at),
        size_bytes=record.size_bytes,
        entrypoint=list(config.entrypoint),
        cmd=list(config.cmd),
        env=config.env,
        working_dir=config.workdir,
        tags=record.tags,
    )


def image_under_way(name: str, pull: OperationView, position: int | None, tags: Mapping[str, str]) -> Image:
    """Return an image that is being pulled, or whose pull has failed.

    :param position: among the pulls that wait; None: it does not wait
    """
    converting = pull.progress is not None and pull.progress.stage not in _FETCHING
    status: ImageStatus = "converting" if converting else "pulling" if position is None else "pending"
    return Image(
        name=name,
        digest="",
        status=status if pull.status == "running" else "failed",
        created_at=moment(pull.created_at),
        tags=dict(tags),
        queue_position=UNSET if position is None else position,
        error=UNSET if pull.error is None else pull.error.message,
    )


class Credentials(Record, frozen=True, kw_only=True):
    """The login of a registry."""

    username: str = ""
    password: str = ""
    registry_token: str = ""


class ImageCreate(Record, frozen=True, kw_only=True):
    """A request for an image."""

    name: str
    platform: str | None = None
    credentials: Credentials | None = None
    tags: dict[str, str] = {}


class ImageTag(Record, frozen=True, kw_only=True):
    """A request for another name of an image."""

    target: str


class Snapshot(Record, frozen=True, kw_only=True):
    """A snapshot."""

    id: str
    name: str
    kind: str
    source_instance_id: str
    source_instance_name: str
    source_hypervisor: str
    created_at: datetime
    size_bytes: int
    tags: dict[str, str]
    compression_state: Literal["none"] = "none"


def snapshot_of(record: model.Snapshot) -> Snapshot:
    """Return a snapshot for a client."""
    return Snapshot(
        id=record.id,
        name=record.name,
        kind=str(record.kind),
        source_instance_id=record.source,
        source_instance_name=record.source_name,
        source_hypervisor=record.driver,
        created_at=moment(record.created_at),
        size_bytes=record.size_bytes,
        tags=record.tags,
    )


class SnapshotCreate(Record, frozen=True, kw_only=True):
    """A request for a snapshot."""

    kind: Kind
    name: str | None = None
    tags: dict[str, str] = {}
    compression: dict[str, object] | None = None


class SnapshotRestore(Record, frozen=True, kw_only=True):
    """A request to restore an instance in place."""

    target_state: Literal["Stopped", "Standby", "Running"] | None = None
    target_hypervisor: str | None = None


class VolumeAttachment(Record, frozen=True, kw_only=True):
    """One instance that a volume is attached to."""

    instance_id: str
    mount_path: str
    readonly: bool


class Volume(Record, frozen=True, kw_only=True):
    """A volume."""

    id: str
    name: str
    size_gb: int
    created_at: datetime
    attachments: list[VolumeAttachment]
    tags: dict[str, str]


def volume_of(record: model.Volume) -> Volume:
    """Return a volume for a client. Its size is rounded up to whole GiB."""
    return Volume(
        id=record.id,
        name=record.name,
        size_gb=-(-record.size_bytes // GIB),
        created_at=moment(record.created_at),
        attachments=[
            VolumeAttachment(instance_id=each.instance_id, mount_path=each.mount_path, readonly=each.readonly)
            for each in record.attachments
            if each.holder == "instance"
        ],
        tags=record.tags,
    )


class VolumeCreate(Record, frozen=True, kw_only=True):
    """A request for a volume."""

    name: str
    size_gb: int
    id: str | None = None
    tags: dict[str, str] = {}
