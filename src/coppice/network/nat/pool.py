"""Slots made in advance: their existence, their holders, and how many are free.

At any time a slot is one symlink in one of four directories of /run/coppice/KEY. One rename(2)
moves it to another:

    making/NUMBER      being made, or its maker was killed
    free/NUMBER        waits for an instance
    used/ID            belongs to the instance; the link's target has the number
    removing/NUMBER    being removed, or its remover was killed

The link is written before the side effect, so other processes find what a killed process left.
Making and removing need the lock of the pool: a slot in these two directories is a leftover if the
lock is free. A claim needs no lock.

`settings.json` has the changed settings of the host. It is written before the change, which is
undone with the last slot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from coppice.errors import NoSpace
from coppice.linux import netns, nft
from coppice.model import Egress, EgressReport, Publish, to_builtins
from coppice.network.nat import RUNTIME, addresses, egress, link, resolver, rows, rules
from coppice.network.nat.addresses import Slot
from coppice.network.nat.filtering import needs_names, read_policy, read_refused, start_names

_DIRECTORIES: Final = ("making", "free", "used", "removing", "ports", "egress", "refused")
_TRIES: Final = 64


class Pool:
    """The slots of one data directory."""

    def __init__(
        self,
        key: str,
        host: Path | None = None,
        runtime: Path = RUNTIME,
        resolv_conf: Path = resolver.RESOLV_CONF,
    ) -> None:
        """`host` is the network namespace that the slots are connected to; None means this
        process's.
        """
        self.key = key
        self.host = host
        self.root = runtime / key
        self.resolv_conf = resolv_conf

    # ---- who has what ----

    def find(self, instance_id: str) -> Slot | None:
        """Return the slot of an instance."""
        try:
            return Slot(self.key, int((self.root / "used" / instance_id).readlink().name))
        except FileNotFoundError:
            return None

    def used(self) -> set[str]:
        """Return the ids of the instances that have a slot."""
        return set(rows(self.root, "used"))

    def free(self) -> int:
        """Return the number of free slots."""
        return len(rows(self.root, "free"))

    def is_empty(self) -> bool:
        """Return whether the data directory has no pool on this host."""
        return not self.root.exists()

    def claim(self, instance_id: str) -> Slot | None:
        """Give a free slot to an instance that has none; return None if no slot is free."""
        for number in rows(self.root, "free"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                (self.root / "free" / number).rename(self.root / "used" / instance_id)
                return Slot(self.key, int(number))
        return None

    # ---- making and removing ----

    def fill(self, wanted: int, while_true: Callable[[], bool] = lambda: True) -> None:
        """Make slots until `wanted` are free, no instance has a slot, or `while_true` returns
        False.

        The lock is taken for each slot separately, so that others get their turn.

        :raises OSError: the kernel refused; the partial slot was removed
        """
        while self.used() and self.free() < wanted and while_true():
            with self._locked() as there:
                if there and self.used() and self.free() < wanted:
                    self._make("free")

    def make(self, instance_id: str) -> Slot:
        """Make a slot for an instance at once, if none is free.

        :raises OSError: the kernel refused
        :raises NoSpace: no number is left
        """
        with self._locked(create=True):
            return self.claim(instance_id) or self._make("used", instance_id)

    def release(self, instance_id: str) -> None:
        """Remove the slot of an instance, and its published ports. Idempotent.

        :raises OSError: the kernel refused; a later call tries again
        """
        slot = self.find(instance_id)
        if slot is None:
            return
        self.unpublish(slot)
        with self._locked() as there:
            if not there:
                return
            with contextlib.suppress(FileNotFoundError):
                (self.root / "used" / instance_id).rename(self.root / "removing" / str(slot.number))
            self._remove_remains()

    def tidy(self, *, keep: bool) -> None:
        """Remove what killed processes left.

        Without `keep`, and if no instance has a slot, also remove the free slots and the pool.

        :raises OSError: the kernel refused
        """
        if self.is_empty() or (keep and not rows(self.root, "making") and not rows(self.root, "removing")):
            return
        with self._locked() as there:
            if not there:
                return
            self._remove_remains()
            if keep or rows(self.root, "used"):
                return
            for number in rows(self.root, "free"):
                with contextlib.suppress(FileNotFoundError):
                    (self.root / "free" / number).rename(self.root / "removing" / number)
            self._remove_remains()
            if not rows(self.root, "used"):
                self._close()

    def _make(self, where: str, name: str | None = None) -> Slot:
        self._remove_remains()
        taken = {int(number) for directory in ("making", "free", "removing") for number in rows(self.root, directory)}
        taken |= {slot.number for each in self.used() if (slot := self.find(each))}
        for _ in range(_TRIES):
            # Start at a random number: data directories do not know of each other, and so seldom
            # pick the same.
            number = random.choice(addresses.NUMBERS)  # noqa: S311 - no secret
            if number in taken:
                continue
            slot = Slot(self.key, number)
            (self.root / "making" / str(number)).symlink_to(str(number))
            try:
                link.create(slot, self.host, self._settings()["mtu"])
            except link.Taken:
                self._remove_remains()
                continue
            except BaseException:
                self._remove_remains()
                raise
            (self.root / "making" / str(number)).rename(self.root / where / (name or str(number)))
            return slot
        raise NoSpace("no network slot is left", hint="stop instances of this or another data directory")

    def _remove_remains(self) -> None:
        links = [self.root / each / number for each in ("making", "removing") for number in rows(self.root, each)]
        slots = [Slot(self.key, int(each.name)) for each in links]
        if not slots:
            return
        for slot in slots:
            self.unpublish(slot)
        link.remove(slots, self.host)
        for each in links:
            for kind in ("egress", "refused"):
                (self.root / kind / each.name).unlink(missing_ok=True)
            each.unlink(missing_ok=True)

    # ---- what guests may reach ----

    def permit(self, slot: Slot, policy: Egress) -> None:
        """Give a slot a policy if it differs from the current one, and start the filter of names if
        the policy needs it.

        :raises nft.Refused: the kernel refused
        """
        upstream = self._follow_resolver()
        file = self.root / "egress" / str(slot.number)
        current = read_policy(file)
        if policy != Egress() or upstream is None:
            _write(file, to_builtins(policy))
        else:
            file.unlink(missing_ok=True)
        if policy != current:
            netns.inside(slot.namespace, lambda: nft.apply(egress.rules(policy)))
        if policy.names or (policy.mode == "all" and upstream is None):
            start_names(self.root, self.key, self.host, self.resolv_conf)

    def revive_names(self) -> None:
        """Restart the filter of names if a slot needs it and it was killed."""
        if any(needs_names(file) for file in list((self.root / "egress").glob("[0-9]*"))):
            start_names(self.root, self.key, self.host, self.resolv_conf)

    def egress(self, slot: Slot, policy: Egress) -> EgressReport:
        """Return what a slot has passed and refused."""
        refused = read_refused(self.root / "refused" / str(slot.number))
        return netns.inside(slot.namespace, lambda: egress.report(policy, refused))

    def _follow_resolver(self) -> str | None:
        """Direct guests to the name server that this host currently uses; return it, or None if
        slots cannot reach it.
        """
        file = self.root / "resolver.json"
        try:
            stamp = self.resolv_conf.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        with contextlib.suppress(FileNotFoundError):
            known = json.loads(file.read_text())
            if known["stamp"] == stamp:
                upstream: str | None = known["upstream"]
                return upstream
        found = netns.inside(self.host, lambda: resolver.reachable_by_slots(resolver.servers(self.resolv_conf)))
        netns.inside(self.host, lambda: nft.apply(rules.resolver(self.key, found)))
        _write(file, {"stamp": stamp, "upstream": found})
        return found

    # ---- published ports ----

    def publish(self, slot: Slot, ports: list[Publish]) -> None:
        """Forward more ports of this host to a slot, in one transaction.

        :raises nft.Refused: another slot has one of them
        """
        file = self.root / "ports" / str(slot.number)
        before = _decode_ports(file)
        _write(
            file, [[port.protocol, port.host_address, port.host_port, port.guest_port] for port in [*before, *ports]]
        )
        try:
            netns.inside(self.host, lambda: nft.apply(rules.published(self.key, slot, ports, verb="create")))
        except BaseException:
            _write(file, [[port.protocol, port.host_address, port.host_port, port.guest_port] for port in before])
            raise

    def unpublish(self, slot: Slot) -> None:
        """Stop forwarding ports to a slot. Idempotent."""
        file = self.root / "ports" / str(slot.number)

        def delete() -> None:
            for port in _decode_ports(file):
                with contextlib.suppress(nft.Refused):  # the table was never made, or is gone
                    nft.apply(rules.published(self.key, slot, [port], verb="delete"))

        if file.exists():
            netns.inside(self.host, delete)
            file.unlink(missing_ok=True)

    # ---- the host ----

    @property
    def mtu(self) -> int:
        """The MTU of the slots."""
        mtu: int = self._settings()["mtu"]
        return mtu

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((self.root / "settings.json").read_text())
        return settings

    @contextlib.contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[bool]:
        """Hold the lock of the pool, and yield whether the pool exists; with `create`, make it.

        Without `create`, a pool that another thread or process closed meanwhile stays closed.
        """
        while True:
            if create:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                if create:
                    continue
                yield False
                return
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._is_current(descriptor):
                    self._open()
                    yield True
                    return
            finally:
                os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        """Return whether the locked file is still the pool's, which may have been closed and
        reopened meanwhile.
        """
        try:
            return os.stat(self.root / "lock").st_ino == os.fstat(descriptor).st_ino  # noqa: PTH116
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        if (self.root / "settings.json").exists() and (self.root / "ready").exists():
            return
        for name in _DIRECTORIES:
            (self.root / name).mkdir(exist_ok=True)
        with self._host_locked():
            if not (self.root / "settings.json").exists():
                found = netns.apart(self.host, lambda: {"mtu": link.uplink_mtu(), "changes": link.forwarding_changes()})
                _write(self.root / "settings.json", found)
            netns.inside(self.host, self._prepare_host)
        (self.root / "ready").touch()

    def _prepare_host(self) -> None:
        with contextlib.suppress(nft.Refused):  # left by a killed process
            nft.apply(f"delete table inet {rules.table(self.key)}")
        nft.apply(rules.host(self.key))
        link.change(self._settings()["changes"])

    @contextlib.contextmanager
    def _host_locked(self) -> Iterator[None]:
        """Hold the lock of this host's settings, which the pools of all data directories change."""
        descriptor = os.open(self.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _close(self) -> None:
        with self._host_locked():
            self._put_back()

    def _put_back(self) -> None:
        others = [
            path for path in self.root.parent.iterdir() if path != self.root and (path / "settings.json").exists()
        ]
        changes = self._settings()["changes"]
        for other in others:  # another data directory needs the changes too: the last one undoes them
            settings = json.loads((other / "settings.json").read_text())
            settings["changes"] = {**changes, **settings["changes"]}
            _write(other / "settings.json", settings)

        def undo() -> None:
            with contextlib.suppress(nft.Refused):
                nft.apply(f"delete table inet {rules.table(self.key)}")
            if not others:
                link.change(changes, undo=True)

        netns.inside(self.host, undo)
        shutil.rmtree(self.root)


def _decode_ports(file: Path) -> list[Publish]:
    try:
        listed = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    return [
        Publish(protocol=protocol, host_address=address, host_port=host_port, guest_port=guest_port)
        for protocol, address, host_port, guest_port in listed
    ]


def _write(file: Path, content: object) -> None:
    """Replace a file atomically. No fsync: slots and /run do not survive a reboot anyway."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(content))
    new.replace(file)
