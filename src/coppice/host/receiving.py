"""Receive the archive of a template.

The order: read the manifest; refuse what this host cannot load; record the instance and its journal row;
receive the files into its directory; compare all digests; keep kernel and image; record the template. The
journal has the same operation as for `run`, so a killed import is undone like a killed `run`. The kernel
and the image are kept only when everything has arrived; like those of a `run` that fails later, they stay.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec

from coppice.addresses import check_notify
from coppice.archive.format import CURE, ArchivedFile, Manifest, data_bytes
from coppice.archive.reader import Receiver, Target, manifest_in
from coppice.boot.kernel import digest_of
from coppice.completion import complete, in_thread
from coppice.errors import (
    Busy,
    DigestMismatch,
    HostCannot,
    ImageError,
    InvalidName,
    NotFound,
    Refused,
    UsageError,
)
from coppice.host.admission import Admission, Demand
from coppice.images.reference import check_name, digest_hex
from coppice.images.store import ROOT_FILE
from coppice.machine import destroy, loadable, portable
from coppice.machine import directory as directories
from coppice.model import Image, ImageConfig, Instance, MachineSpec, ProcessSpec, State
from coppice.names import check_argv, check_env, check_recorded, new_id
from coppice.requests import RunRequest
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.trust import certificates_in
from coppice.vmm.driver import VmmDriver

_IMAGE = "image"
_KERNEL = "kernel/"
_ARRIVING = "arriving"  # the directory of image and kernel, inside of the instance's
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~@,=-]{0,254}")
_MOST_PARTS = 16
_LONGEST_NAME = 128


class _Plan(NamedTuple):
    """What an archive has, and what of it this host lacks."""

    instance: Instance
    manifest: Manifest
    driver: VmmDriver
    image: bool  # it is here already
    kernel: str | None  # the key of the same kernel here

    @property
    def written(self) -> list[ArchivedFile]:
        """The files that will be written."""
        return [file for file in self.manifest.files if not self.is_here(file.path)]

    def is_here(self, path: str) -> bool:
        """Return whether a file need not be kept."""
        return (path == _IMAGE and self.image) or (path.startswith(_KERNEL) and self.kernel is not None)


class Receiving(Admission):
    """The import of an archive that arrives as a stream."""

    async def receive(self, archive: AsyncIterable[bytes], name: str | None) -> Instance:
        """Receive an archive; return the template. If it fails, no template is left behind.

        :raises ImageError: the archive is not valid
        :raises HostCannot: this host cannot load the template
        :raises NameTaken: the name is in use
        :raises NoSpace: a budget is exceeded, or the disk is full
        """
        chunks = aiter(archive)
        manifest, rest = await _manifest(chunks)
        plan = await self._plan(manifest, name)
        instance = plan.instance
        await in_thread(self.rooms.store.require_free, [instance.name])
        admit = await self._admit(lambda: Demand(what=instance.name, instances=1, disk_bytes=data_bytes(plan.written)))

        def check() -> None:
            admit()
            if plan.image and instance.image not in self.rooms.images.records.digests():
                raise Busy(f"the image {instance.image} was removed meanwhile", hint="import the archive again")
            if plan.kernel is not None:
                self.rooms.kernels.get(plan.kernel)

        try:
            # Record first: gc removes a lock file that has no record.
            (instance,) = await in_thread(self.rooms.store.create, [instance], JournalOperation.RUN, check)
            async with locks.hold(self.rooms.layout.lock(instance.id), what=instance.name):
                await self.rooms.store.look_up(instance.id)  # another process may have removed it
                return await self._fill(plan._replace(instance=instance), rest, chunks)
        except BaseException:
            await complete(destroy.destroy(self.rooms, instance))
            raise

    async def _plan(self, manifest: Manifest, name: str | None) -> _Plan:
        """Check a manifest.

        :raises ImageError: it is not valid
        :raises HostCannot: this host cannot load the template
        """
        template, own = manifest.template, _own_files(manifest)
        portable.require_sound(template, {file.path: file.size_bytes for file in own})
        _require_valid(manifest)
        driver = self.rooms.drivers.named(template.driver)
        if driver.capabilities.state_names_files and self.owner is not None:
            raise Refused(
                f"only the operator can import a template of {driver.name}: its device state names files of the host",
                hint="ask the operator, or use a template of another VMM",
            )
        await self._require_loadable(template, driver)
        kernel = await in_thread(self.rooms.kernels.same, template.machine.kernel, manifest.kernel_sha256)
        image = await in_thread(self._has_image, template.image, bare=len(own) == len(manifest.files))
        if len(own) == len(manifest.files) and not (image and kernel):
            lacking = " and ".join(
                what
                for what, here in ((f"image {template.image}", image), (f"kernel {template.machine.kernel}", kernel))
                if not here
            )
            raise HostCannot(
                f"the archive does not contain its {lacking}, and this host lacks it", hint="export it without --bare"
            )
        machine = template.machine if kernel is None else msgspec.structs.replace(template.machine, kernel=kernel)
        instance = Instance(
            id=new_id(),
            name=name or template.name,
            state=State.CREATED,
            created_at=time.time(),
            driver=template.driver,
            image=template.image,
            image_name=template.image_name,
            machine=machine,
            process=template.process,
            hostname=template.hostname,
            tags=template.tags,
            egress=template.egress,
            limits=template.limits,
            vmm_bytes=driver.vmm_bytes(template.machine),
            identified=template.identified,
            owner=self.owner,
        )
        return _Plan(instance, manifest, driver, image, kernel)

    async def _require_loadable(self, template: Instance, driver: VmmDriver) -> None:
        # The record has no id, so that is its key.
        if reason := (await loadable.unloadable(self.rooms.drivers, [template])).get(template.id):
            raise HostCannot(
                f"this host cannot load the memory of {template.name}: {reason}",
                hint="import it on a host like the one that it was exported on",
            )
        if template.disk_layers and not driver.capabilities.layer_format:
            raise HostCannot(f"{driver.name} cannot use the layers of the disk here", hint="use another host")
        networks = self.rooms.networks
        await in_thread(networks.choose, template.machine.network, driver.capabilities.nic_backends)
        networks.check(template.machine, (), template.egress)
        provider = networks.of(template.machine)
        if missing := await in_thread(provider.missing):
            raise HostCannot(
                f"this host cannot provide the network {provider.name!r} of {template.name}: {missing}",
                hint="`coppice doctor` checks what networks need",
            )

    def _has_image(self, digest: str, *, bare: bool) -> bool:
        """Return whether the image is here. Whoever does not send it must be allowed to use it. Blocks."""
        if not bare:
            return digest in self.rooms.images.records.digests()
        with contextlib.suppress(NotFound):
            return self.rooms.images.get(digest, self._usable).digest == digest
        return False

    async def _fill(self, plan: _Plan, rest: bytes, chunks: AsyncIterator[bytes]) -> Instance:
        """Receive the files of a recorded instance, and make it a template."""
        directory = self.rooms.directory(plan.instance.id)
        await in_thread(directories.create, directory)
        targets = await in_thread(_targets, plan, directory)
        with Receiver(targets) as receiver:
            await in_thread(receiver.feed, rest)
            async for chunk in chunks:
                await in_thread(receiver.feed, chunk)
            digests = await in_thread(receiver.finish)
        found = {target.file.path: digest for target, digest in zip(targets, digests, strict=True)}
        _require_image_and_kernel(plan, found)
        template = plan.manifest.template
        await in_thread(portable.require_layers, directory, template, plan.driver)
        instance = await self._keep_kernel(plan, directory) if plan.kernel is None else plan.instance
        made = await in_thread(self._complete, plan, instance, found)
        await in_thread(self.rooms.store.save, made, done=True, durable=True)
        return made

    def _complete(self, plan: _Plan, instance: Instance, found: Mapping[str, str]) -> Instance:
        """Keep the image, and return the record of the template, whose files are durable. Blocks."""
        directory, image = self.rooms.directory(instance.id), plan.manifest.image
        if not plan.image:
            self._keep_image(image, directory / _ARRIVING / _IMAGE)
        directories.remove(directory / _ARRIVING)
        directories.place_root(directory, self.rooms.images.root_file(image))
        return portable.arrived(directory, instance, plan.manifest.template, found)

    async def _keep_kernel(self, plan: _Plan, directory: Path) -> Instance:
        """Keep the kernel, and record that the instance uses it."""
        key = await in_thread(self.rooms.kernels.adopt, directory / _ARRIVING / _KERNEL)
        machine: MachineSpec = msgspec.structs.replace(plan.instance.machine, kernel=key)
        instance = msgspec.structs.replace(plan.instance, machine=machine)

        def check() -> None:
            self.rooms.kernels.get(key)  # in the transaction: no process removes it between this and the record

        await in_thread(self.rooms.store.begin, instance, JournalOperation.RUN, check)
        return instance

    def _keep_image(self, image: Image, staged: Path) -> None:
        """Keep an image, under its own name if no other image has that. Blocks."""
        name = image.name
        try:
            taken = self.rooms.images.records.named(check_name(name)) is not None
        except InvalidName:
            taken = True
        if taken:
            name = f"imported/{digest_hex(image.digest) or ''}"[:_LONGEST_NAME]
        kept = msgspec.structs.replace(
            image,
            name=name,
            source="archive of a template",
            created_at=time.time(),
            owner=self.owner,
            public=False,
            tags={},
            manifest_digest=None,
        )
        self.rooms.images.publish(staged, kept)


async def _manifest(chunks: AsyncIterator[bytes]) -> tuple[Manifest, bytes]:
    """Return the manifest, and what arrived after it.

    :raises ImageError: the archive does not begin with a manifest
    """
    beginning = bytearray()
    async for chunk in chunks:
        beginning += chunk
        if (found := manifest_in(beginning)) is not None:
            manifest, end = found
            return manifest, bytes(beginning[end:])
    raise ImageError("the archive ends within its manifest: it is truncated", hint="send it again, as a whole")


def _own_files(manifest: Manifest) -> list[ArchivedFile]:
    """Return the files of the instance itself. Those of image and kernel must follow, or be missing.

    :raises ImageError: they are neither
    """
    listed = [file.path for file in manifest.files]
    if _IMAGE not in listed:
        return list(manifest.files)
    own, names = listed.index(_IMAGE), [path.removeprefix(_KERNEL) for path in listed[listed.index(_IMAGE) + 1 :]]
    in_order = names == sorted(set(names), key=PurePosixPath)
    if not in_order or not all(path == _KERNEL + name for path, name in zip(listed[own + 1 :], names, strict=True)):
        raise ImageError("the manifest does not list the files of a kernel", hint=CURE)
    if not all(_is_name(name) for name in names):
        raise ImageError("the manifest has files of a kernel with impossible names", hint=CURE)
    return list(manifest.files[:own])


def _is_name(name: str) -> bool:
    parts = name.split("/")
    nested = len(parts) == 1 or (parts[0] == "modules" and len(parts) <= _MOST_PARTS)
    return nested and all(_PART.fullmatch(part) for part in parts)


def _require_valid(manifest: Manifest) -> None:
    """Refuse values that no request could have recorded.

    :raises ImageError: the message names one
    """
    template, image = manifest.template, manifest.image
    machine, process = template.machine, template.process
    config: ImageConfig = image.config
    try:
        RunRequest(
            image=template.image,
            name=template.name,
            hostname=template.hostname,
            cpus=machine.cpus,
            memory_bytes=machine.memory_bytes,
            overlay_bytes=machine.overlay_bytes,
            tags=template.tags,
            egress=template.egress,
            limits=template.limits,
        )
        of_image = ProcessSpec(
            argv=(*config.entrypoint, *config.cmd),
            env=config.env,
            workdir=config.workdir,
            user=config.user,
            certificates=config.certificates,
        )
        for each in (process, of_image):
            check_recorded(*check_argv(each.argv), *check_env(each.env).values(), each.workdir, each.user)
            check_notify(each.notify)
            certificates_in(each.certificates)
        check_recorded(template.image_name, *config.labels, *config.labels.values())
        valid = digest_hex(template.image) is not None and not machine.volumes and template.image == image.digest
    except UsageError as error:
        raise ImageError(f"the template in the archive is not valid: {error.message}", hint=CURE) from error
    if not valid:
        raise ImageError("the template in the archive has volumes, or another image than the archive", hint=CURE)


def _require_image_and_kernel(plan: _Plan, found: Mapping[str, str]) -> None:
    """Compare the image and the kernel that arrived with their identities.

    :raises DigestMismatch: one is another
    """
    if _IMAGE not in found:
        return
    kernel = {path.removeprefix(_KERNEL): digest for path, digest in found.items() if path.startswith(_KERNEL)}
    if f"sha256:{found[_IMAGE]}" != plan.instance.image or digest_of(kernel) != plan.manifest.kernel_sha256:
        raise DigestMismatch("the archive has another image or kernel than its manifest says", hint=CURE)


def _targets(plan: _Plan, directory: Path) -> Sequence[Target]:
    """Return where each file goes, and make the directories. Blocks."""
    targets = []
    for file in plan.manifest.files:
        path = directory / file.path
        if file.path == _IMAGE:
            path = directory / _ARRIVING / _IMAGE / ROOT_FILE
        elif file.path.startswith(_KERNEL):
            path = directory / _ARRIVING / file.path
        kept = not plan.is_here(file.path)
        if kept and path.parent != directory:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        targets.append(Target(file, path if kept else None))
    return targets
