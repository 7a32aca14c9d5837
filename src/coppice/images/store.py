"""The images of one data directory: found by name or digest, made, named and removed.

    images/<64 hex>/root.img        the root file system, mode 0444; the hex is its SHA-256
    images/<64 hex>/image.json      the image as it was first made
    images/names/<sha256>.json      one name: the image as that name knows it; the file is called by the name's hash
    images/.lock                    held while names and directories change
    images/.staging-<random>/       a build that runs, or the leftover of one (see workspace)

Two images that differ only in their config share one root file, each name with its own config. A directory appears
before the first name for it and goes after the last, each by one rename: readers take no lock.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from coppice.errors import IntegrityError, InUse, NameTaken, NotFound
from coppice.images.reference import (
    MIN_PREFIX,
    check_name,
    digest_hex,
    is_hex_digest,
    is_hex_prefix,
)
from coppice.images.workspace import PREFIX, leftovers, locked
from coppice.model import Image, to_json

ROOT_FILE = "root.img"
IMAGE_FILE = "image.json"
# Made here, where one thread imports it: two that decode a type for the first time, side by side, crash in msgspec.
_decode = msgspec.json.Decoder(Image).decode

Allowed = Callable[[Image], bool]
"""Whether a caller may see an image."""


def everyone(_: Image) -> bool:
    """All images are allowed."""
    return True


class ImageStore:
    """Finding, naming and removing; what makes images is ImageCatalog."""

    def __init__(self, root: Path) -> None:
        """`root` is the catalog's own directory; it is made when missing."""
        self.root = root
        self._names = root / "names"
        self._names.mkdir(parents=True, exist_ok=True, mode=0o755)

    @property
    def lock_file(self) -> Path:
        """What is locked while the catalog changes."""
        return self.root / ".lock"

    def list(self) -> builtins.list[Image]:
        """Every name's image, and images that lost their last name to another (`name` is empty); the oldest first."""
        named = self._named()
        known = {image.digest for image in named}
        unnamed = [image for image in self._stored() if image.digest not in known]
        return sorted([*named, *unnamed], key=lambda image: (image.created_at, image.name))

    def get(self, reference: str, allowed: Allowed = everyone) -> Image:
        """The image by name, `sha256:<hex>`, or the beginning of the hex, six digits at least, among those that are allowed.

        Raises NotFound, also where several images begin so; InvalidName; IntegrityError where a record is damaged.
        """
        digits = digest_hex(reference)
        if digits is None and not is_hex_digest(reference):
            named = self._read_name(check_name(reference))
            if named is not None and allowed(named):
                return named
            if not is_hex_prefix(reference):
                raise NotFound(
                    f"there is no image {reference!r}",
                    hint="`coppice image ls` shows those there are; `coppice image build` and `coppice image import` make one",
                )
        digits = digits or reference
        # One root may have names of several owners; which of them made it first does not matter.
        known = {image.digest: image for image in self.list() if allowed(image)}
        found = [known[digest] for digest in known if digest.removeprefix("sha256:").startswith(digits)]
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(f"{len(found)} images begin with {digits!r}", hint="give more digits of the one you mean")
        raise NotFound(
            f"there is no image {reference!r}", hint=f"give a name, or at least {MIN_PREFIX} digits of a digest"
        )

    def names(self, digest: str, allowed: Allowed = everyone) -> builtins.list[str]:
        """All names of the image with this digest that are allowed, sorted."""
        return sorted(image.name for image in self._named() if image.digest == digest and allowed(image))

    def root_file(self, image: Image) -> Path:
        """The image's read-only root file system. Raises NotFound where it has been removed."""
        path = self._directory(image) / ROOT_FILE
        if not path.is_file():
            raise NotFound(
                f"the image {image.name or image.digest!r} has been removed", hint="build or import it again"
            )
        return path

    def tag(
        self,
        reference: str,
        name: str,
        *,
        owner: str | None = None,
        public: bool = False,
        allowed: Allowed = everyone,
    ) -> Image:
        """Give the image one more name, which is the owner's; a name that another image has moves here.

        Raises NotFound, InvalidName, NameTaken where another owner has the name.
        """
        check_name(name)
        with locked(self.lock_file):
            image = msgspec.structs.replace(self.get(reference, allowed), name=name, owner=owner, public=public)
            self._write_name(image)
        return image

    def remove(self, reference: str, in_use: Callable[[str], builtins.list[str]], allowed: Allowed = everyone) -> None:
        """Remove a name; with the last name, or when given by digest, the image. Names that are not allowed stay, and keep it.

        `in_use` answers which instances and snapshots need the image with a digest. Raises InUse naming them, NotFound.
        """
        with locked(self.lock_file):
            image = self.get(reference, allowed)
            names = self.names(image.digest)
            doomed = [reference] if reference in names else self.names(image.digest, allowed)
            if len(doomed) < len(names):
                for name in doomed:
                    self._name_file(name).unlink()
                return
            users = in_use(image.digest)
            if users:
                raise InUse(
                    f"the image {reference!r} is used by {', '.join(users)}",
                    hint="remove those first with `coppice rm` or `coppice snapshot rm`, or keep it under another name with `coppice image tag`",
                )
            for name in names:
                self._name_file(name).unlink()
            trash = self.root / f"{PREFIX}removed-{image.digest[-16:]}"
            shutil.rmtree(trash, ignore_errors=True)
            self._directory(image).rename(trash)
            _sync_directory(self.root)
        shutil.rmtree(trash, ignore_errors=True)

    def publish(self, staged: Path, image: Image) -> Image:
        """Move a finished directory into its place, and name it. Where that content is here already, only the name is
        new.

        `staged` holds the root file; it must be on the same file system. The caller removes what is left of it.
        """
        root_file = staged / ROOT_FILE
        root_file.chmod(0o444)
        _sync_file(root_file)
        _write_synced(staged / IMAGE_FILE, to_json(image))
        staged.chmod(0o755)
        _sync_directory(staged)
        with locked(self.lock_file):
            self._refuse_taken(image)  # before the directory appears
            target = self._directory(image)
            if not target.exists():
                staged.rename(target)
                _sync_directory(self.root)
            self._write_name(image)
        return image

    def stale_staging(self) -> builtins.list[Path]:
        """Staging directories whose process is gone: they can be removed. Those of running builds are not among
        them."""
        return leftovers(self.root, self.lock_file)

    def _directory(self, image: Image) -> Path:
        digits = digest_hex(image.digest)
        if digits is None:
            raise IntegrityError(f"{image.digest!r} is not the digest of an image", hint="remove and import it again")
        return self.root / digits

    def _name_file(self, name: str) -> Path:
        # A name may hold slashes and 255 characters; its hash is always one valid file name.
        return self._names / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _read_name(self, name: str) -> Image | None:
        try:
            return _read_image(self._name_file(name))
        except FileNotFoundError:
            return None

    def _refuse_taken(self, image: Image) -> None:
        """Raises NameTaken where the name is another owner's. The operator may take any."""
        holder = self._read_name(image.name)
        if holder is not None and image.owner not in (None, holder.owner):
            raise NameTaken(f"the image name {image.name!r} is taken", hint="choose another")

    def _write_name(self, image: Image) -> None:
        self._refuse_taken(image)
        target = self._name_file(image.name)
        temporary = target.with_suffix(".new")  # one writer at a time: the catalog is locked
        temporary.unlink(missing_ok=True)
        _write_synced(temporary, to_json(image))
        temporary.replace(target)
        _sync_directory(self._names)

    def _named(self) -> builtins.list[Image]:
        return builtins.list(self._read_all(sorted(self._names.glob("*.json"))))

    def _stored(self) -> builtins.list[Image]:
        """The images themselves, each once; `name` is the newest that still stands for it, or empty."""
        newest: dict[str, str] = {}
        for named in sorted(self._named(), key=lambda image: image.created_at):
            newest[named.digest] = named.name
        files = [path / IMAGE_FILE for path in sorted(self.root.iterdir()) if is_hex_digest(path.name)]
        return [msgspec.structs.replace(image, name=newest.get(image.digest, "")) for image in self._read_all(files)]

    @staticmethod
    def _read_all(files: builtins.list[Path]) -> Iterator[Image]:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                yield _read_image(file)


def _read_image(path: Path) -> Image:
    data = path.read_bytes()
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", hint="remove that file, and build or import the image again"
        ) from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_directory = _sync_file  # the same call makes renames durable
