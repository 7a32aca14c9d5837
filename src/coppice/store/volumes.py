"""Records of volumes, and who may have one.

Who has a volume is derived from the records of instances and snapshots. The rule is kept here, inside of each transaction that records a holder: one for
writing and nobody else, or any number for reading.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence

import msgspec

from coppice.errors import InUse, NotFound
from coppice.model import Attachment, Volume, VolumeDisk
from coppice.ownership import no_volume
from coppice.store.records import WHOLE, Records

_HOLDERS = " UNION ALL ".join(
    f"""
    SELECT '{holder}', {table}.id, {table}.name, json_extract(disk.value, '$.mount_path'), json_extract(disk.value, '$.readonly'),
           json_extract(disk.value, '$.volume_id') AS volume
    FROM {table}, json_each(CAST({table}.record AS TEXT), '$.machine.volumes') AS disk
    """  # noqa: S608 - constants
    for holder, table in (("instance", "instances"), ("snapshot", "snapshots"))
)


class VolumeStore(Records[Volume]):
    """All blocking; see `Database`."""

    _noun = "volume"
    _decode = staticmethod(msgspec.json.Decoder(Volume).decode)

    def _missing(self, reference: str) -> NotFound:
        return no_volume(reference)

    def create(self, volume: Volume, operation: str, check: Callable[[], None]) -> None:
        """Record a volume that is about to be made. `check` runs inside of the transaction.

        :raises NameTaken: another volume has the name
        """
        with self._db.write() as connection:
            check()
            self._insert(connection, volume, operation)

    def begin_removal(self, volume: Volume, operation: str) -> None:
        """Record that a volume is to be removed: from then on nobody finds it or can have it attached.

        :raises InUse: something has it; the message names them
        """
        with self._db.write() as connection:
            found = _holders(connection, volume.id)
            if found:
                raise InUse(
                    f"the volume {volume.name} cannot be removed: {_named(found)}",
                    hint="remove them first with `coppice rm` or `coppice snapshot rm`",
                )
            self._journal(connection, volume.id, operation)

    def get(self, reference: str) -> Volume:
        """The volume with this id or name, and who has it.

        :raises NotFound: there is none
        """
        volume = super().get(reference)
        with self._db.read() as connection:
            return msgspec.structs.replace(volume, attachments=_holders(connection, volume.id))

    def all(self) -> list[Volume]:
        """All volumes, oldest first, each with who has it."""
        volumes = super().all()
        found: dict[str, list[Attachment]] = {}
        with self._db.read() as connection:
            for *attachment, volume in connection.execute(_HOLDERS):
                found.setdefault(volume, []).append(_attachment(*attachment))
        return [msgspec.structs.replace(each, attachments=tuple(found.get(each.id, ()))) for each in volumes]

    def require_free(self, disks: Sequence[VolumeDisk]) -> None:
        """Look whether a machine could have these volumes now. Only its record takes them: another process may be quicker.

        :raises NotFound: a volume is gone
        :raises InUse: another has it; the message names who
        """
        with self._db.read() as connection:
            require_attachable(connection, [disks])


def require_attachable(connection: sqlite3.Connection, machines: Iterable[Sequence[VolumeDisk]]) -> None:
    """Refuse, inside of the transaction that records them, machines that cannot all have their volumes, of each machine those.

    :raises NotFound: a volume is gone
    :raises InUse: another has it; the message names who
    """
    wanted: dict[str, list[VolumeDisk]] = {}
    for machine in machines:
        for disk in machine:
            wanted.setdefault(disk.volume_id, []).append(disk)
    for volume_id, disks in wanted.items():
        whole = connection.execute(f"SELECT 1 FROM volumes WHERE id = ? AND {WHOLE}", (volume_id,))  # noqa: S608 - a constant
        if not whole.fetchone():
            raise no_volume(disks[0].volume_name)
        _require_rule(disks, _holders(connection, volume_id))


def _require_rule(disks: list[VolumeDisk], holders: tuple[Attachment, ...]) -> None:
    """One for writing and nobody else, or any number for reading."""
    name, path = disks[0].volume_name, disks[0].mount_path
    writers = tuple(holder for holder in holders if not holder.readonly)
    if all(disk.readonly for disk in disks):
        if writers:
            raise InUse(
                f"the volume {name} cannot be attached read-only: {_named(writers)}",
                hint="what one machine writes to no other can read: remove that machine first with `coppice rm`",
            )
    elif writers or len(disks) > 1:
        raise InUse(
            f"the volume {name} cannot be attached for writing: {_named(writers) or 'several machines would have it'}",
            hint="only one machine at a time can have it so: remove that machine first with `coppice rm`",
        )
    elif holders:
        raise InUse(
            f"the volume {name} cannot be attached for writing: {_named(holders)}",
            hint=f"attach it read-only ({name}:{path}:ro), or remove those that have it",
        )


def _holders(connection: sqlite3.Connection, volume_id: str) -> tuple[Attachment, ...]:
    rows: Iterable[tuple[str, str, str, str, int, str]] = connection.execute(
        f"SELECT * FROM ({_HOLDERS}) WHERE volume = ?",  # noqa: S608 - a constant
        (volume_id,),
    )
    return tuple(_attachment(*row[:5]) for row in rows)


def _attachment(holder: str, holder_id: str, name: str, mount_path: str, readonly: int) -> Attachment:
    return Attachment(
        holder="snapshot" if holder == "snapshot" else "instance",
        instance_id=holder_id,
        name=name,
        mount_path=mount_path,
        readonly=bool(readonly),
    )


def _named(holders: tuple[Attachment, ...]) -> str:
    if not holders:
        return ""
    names = [("the snapshot " if holder.holder == "snapshot" else "") + holder.name for holder in holders]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    how = "" if all(holder.readonly for holder in holders) else " for writing"
    return f"{shown} {'has' if len(names) == 1 else 'have'} it{how}"
