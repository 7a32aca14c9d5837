"""Records of volumes, and the rule for attaching them.

The holders of a volume are derived from the records of instances and snapshots. A volume has one
holder that writes, or any number that read. Each transaction that records a holder checks this. A
machine's private clone of a volume makes it no holder.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence

import msgspec

from coppice.errors import InUse, NotFound
from coppice.model import Attachment, Volume, VolumeDisk
from coppice.model.ownership import no_volume
from coppice.state.journal import JournalOperation
from coppice.state.records import WHOLE, Records

SHOWN_NAME = "coalesce(json_extract(CAST(instances.record AS TEXT), '$.stem_of'), instances.name)"
"""The name of an instance in messages. A stem is internal and goes by the name of its source."""

_HOLDERS = " UNION ALL ".join(
    f"""
    SELECT '{holder}', {table}.id, {name} AS name, json_extract(disk.value, '$.mount_path'), json_extract(disk.value, '$.readonly'),
           json_extract(disk.value, '$.volume_id') AS volume, {name} <> {table}.name AS is_stem
    FROM {table}, json_each(CAST({table}.record AS TEXT), '$.machine.volumes') AS disk
    WHERE json_extract(disk.value, '$.private') IS NOT 1
    """  # noqa: S608 - constants
    for holder, table, name in (("instance", "instances", SHOWN_NAME), ("snapshot", "snapshots", "snapshots.name"))
)


class VolumeStore(Records[Volume]):
    """All methods block; see `Database`."""

    _noun = "volume"
    _decode = staticmethod(msgspec.json.Decoder(Volume).decode)

    def _missing(self, reference: str) -> NotFound:
        return no_volume(reference)

    def create(self, volume: Volume, operation: JournalOperation, check: Callable[[], None]) -> None:
        """Record a volume that is about to be made. `check` runs inside the transaction.

        :raises NameTaken: another volume has the name
        """
        with self._db.write() as connection:
            check()
            self._insert(connection, volume, operation)

    def save(self, volume: Volume) -> None:
        """Write a changed record, durably, without its holders."""
        encoded = self._encode(msgspec.structs.replace(volume, attachments=()))
        with self._db.write(durable=True) as connection:
            connection.execute("UPDATE volumes SET record = ? WHERE id = ?", (encoded, volume.id))

    def begin_removal(self, volume: Volume, operation: JournalOperation) -> None:
        """Record that a volume is to be removed.

        Lookups skip it from then on, so it cannot be attached.

        :raises InUse: it is attached; the message names the holders
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
        """Return the volume with this id or name, with its holders.

        :raises NotFound: there is none
        """
        volume = super().get(reference)
        with self._db.read() as connection:
            return msgspec.structs.replace(volume, attachments=_holders(connection, volume.id, with_stems=False))

    def all(self) -> list[Volume]:
        """Return all volumes, oldest first, each with its holders."""
        volumes = super().all()
        found: dict[str, list[Attachment]] = {}
        with self._db.read() as connection:
            for *attachment, volume, is_stem in connection.execute(_HOLDERS):
                if is_stem:
                    continue
                found.setdefault(volume, []).append(_attachment(*attachment))
        return [msgspec.structs.replace(each, attachments=tuple(found.get(each.id, ()))) for each in volumes]

    def require_free(self, disks: Sequence[VolumeDisk]) -> None:
        """Check that a machine could attach these volumes now.

        Only its record reserves them: another process may be first.

        :raises NotFound: a volume is gone
        :raises InUse: another holder prevents it; the message names it
        """
        with self._db.read() as connection:
            require_attachable(connection, [disks])


def require_attachable(connection: sqlite3.Connection, machines: Iterable[Sequence[VolumeDisk]]) -> None:
    """Refuse machines that cannot all attach their volumes, inside the transaction that records
    them.

    `machines` has the volumes of each machine.

    :raises NotFound: a volume is gone
    :raises InUse: another holder prevents it; the message names it
    """
    wanted: dict[str, list[VolumeDisk]] = {}
    for machine in machines:
        for disk in machine:
            if not disk.private:
                wanted.setdefault(disk.volume_id, []).append(disk)
    for volume_id, disks in wanted.items():
        whole = connection.execute(f"SELECT 1 FROM volumes WHERE id = ? AND {WHOLE}", (volume_id,))  # noqa: S608 - a constant
        if not whole.fetchone():
            raise no_volume(disks[0].volume_name)
        _require_rule(disks, _holders(connection, volume_id))


def _require_rule(disks: list[VolumeDisk], holders: tuple[Attachment, ...]) -> None:
    """Require a single writer without readers, or readers only."""
    name, path = disks[0].volume_name, disks[0].mount_path
    writers = tuple(holder for holder in holders if not holder.readonly)
    if all(disk.readonly for disk in disks):
        if writers:
            raise InUse(
                f"the volume {name} cannot be attached read-only: {_named(writers)}",
                hint="a volume with a writer cannot have readers: remove that machine first with `coppice rm`",
            )
    elif writers or len(disks) > 1:
        raise InUse(
            f"the volume {name} cannot be attached for writing: {_named(writers) or 'several machines request it'}",
            hint="one machine at a time can write to it: remove that machine first with `coppice rm`",
        )
    elif holders:
        raise InUse(
            f"the volume {name} cannot be attached for writing: {_named(holders)}",
            hint=f"attach it read-only ({name}:{path}:ro), or remove its holders",
        )


def _holders(connection: sqlite3.Connection, volume_id: str, *, with_stems: bool = True) -> tuple[Attachment, ...]:
    rows: Iterable[tuple[str, str, str, str, int, str, int]] = connection.execute(
        f"SELECT * FROM ({_HOLDERS}) WHERE volume = ? AND (? OR NOT is_stem)",  # noqa: S608 - a constant
        (volume_id, with_stems),
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
    names = list(
        dict.fromkeys(("the snapshot " if holder.holder == "snapshot" else "") + holder.name for holder in holders)
    )
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    how = "" if all(holder.readonly for holder in holders) else " for writing"
    return f"{shown} {'has' if len(names) == 1 else 'have'} it{how}"
