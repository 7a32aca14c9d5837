"""The images of one data directory: looked up by name or digest, named and removed.

    images/<64 hex>/root.img        the root file system, mode 0444; the hex is its SHA-256

The database has the names and other facts of images (see `coppice.state.images`). Two images that
differ only in their config share one root file, and each name has its own config. The content
appears in the transaction that records it, and is removed after its record.
"""

from __future__ import annotations

import builtins
import contextlib
from functools import partial
from pathlib import Path

import msgspec

from coppice.content.store import ContentStore, Removed
from coppice.errors import IntegrityError, InUse, NotFound
from coppice.images.reference import MIN_PREFIX, check_name, digest_hex, full_name, is_hex_digest, is_hex_prefix
from coppice.model import Image
from coppice.state.images import Allowed, ImageRecords, everyone

ROOT_FILE = "root.img"


class ImageStore:
    """Look up, name and remove images; ImageCatalog makes them."""

    def __init__(self, root: Path, records: ImageRecords) -> None:
        """`root` is the directory of the content alone; it is made with the first image."""
        self.content = ContentStore(root)
        self.records = records

    def list(self) -> builtins.list[Image]:
        """Return the image of every name, and images without a name (`name` is empty), the oldest
        first.
        """
        return self.records.all()

    def get(self, reference: str, allowed: Allowed = everyone) -> Image:
        """Return the allowed image with this name, `sha256:<hex>`, or hex prefix of at least six
        digits. `alpine` and `docker.io/library/alpine:latest` are the same name.

        Raises NotFound, also if the prefix is ambiguous; InvalidName.
        """
        digits = digest_hex(reference)
        if digits is None and not is_hex_digest(reference):
            named = self.records.named(check_name(reference))
            if named is not None and allowed(named):
                return named
            if alike := self.called(reference, allowed):
                return alike[-1]
            if not is_hex_prefix(reference):
                raise NotFound(
                    f"there is no image {reference!r}",
                    hint=f"list the images with `coppice image ls`; get it from its registry with `coppice pull {reference}`, "
                    "or make one with `coppice image build`",
                )
        digits = digits or reference
        # One root may have names of several owners; any of its records will do.
        known = {image.digest: image for image in self.list() if allowed(image)}
        found = [known[digest] for digest in known if digest.removeprefix("sha256:").startswith(digits)]
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(f"{len(found)} images begin with {digits!r}", hint="give more digits")
        raise NotFound(
            f"there is no image {reference!r}", hint=f"give a name, or at least {MIN_PREFIX} digits of a digest"
        )

    def called(self, name: str, allowed: Allowed) -> builtins.list[Image]:
        """Return the allowed images under all spellings of a name, the oldest first."""
        whole = full_name(name)
        return [image for image in self.list() if image.name and allowed(image) and full_name(image.name) == whole]

    def root_file(self, image: Image) -> Path:
        """Return the image's read-only root file system.

        Raises NotFound if the image has been removed.
        """
        entry = self.content.find(_key(image.digest))
        if entry is None or not (entry / ROOT_FILE).is_file():
            raise NotFound(
                f"the image {image.name or image.digest!r} has been removed", hint="build or import it again"
            )
        return entry / ROOT_FILE

    def tag(
        self,
        reference: str,
        name: str,
        *,
        owner: str | None = None,
        public: bool = False,
        allowed: Allowed = everyone,
    ) -> Image:
        """Give the image another name, for the owner. A name of another image moves here.

        Raises NotFound, InvalidName, NameTaken if another owner has the name.
        """
        check_name(name)
        image = msgspec.structs.replace(self.get(reference, allowed), name=name, owner=owner, public=public)
        self.records.tag(image)
        return image

    def remove(self, reference: str, allowed: Allowed = everyone) -> None:
        """Remove a name; with its last name, or if given by digest, remove the image.

        Names that are not allowed stay, and keep the image.

        Raises NotFound, or InUse with the instances and snapshots that use it.
        """
        image = self.get(reference, allowed)
        by_name = bool(image.name) and full_name(reference) == full_name(image.name)
        if self.records.remove(image.digest, image.name if by_name else None, allowed):
            with contextlib.suppress(NotFound, InUse):  # another process has swept it, or has made it again
                self._discard(_key(image.digest))

    def publish(self, staged: Path, image: Image) -> None:
        """Move a finished directory with the root file to its final path, and name the image.

        Existing content only gets the name.

        Raises NameTaken before the directory appears.
        """
        self.content.publish(staged, _key(image.digest), partial(self.records.add, image))

    def sweep(self, *, unnamed: bool = False, dry_run: bool = False) -> builtins.list[Removed]:
        """Remove content without a record: leftovers of killed builds and removals, and files of
        older versions. Idempotent.

        With `unnamed`, also remove images without a name and without users. With `dry_run`, only
        return what would be removed.
        """
        found = self.content.sweep(dry_run=dry_run)
        present = self.content.entries()  # read first: content that appears later already has its record
        recorded = self.records.digests()
        if unnamed:
            recorded -= self.records.forget_unnamed(dry_run=dry_run)
        for path in present:
            if _digest(path.name) not in recorded:
                with contextlib.suppress(NotFound, InUse):
                    found.append(self._discard(path.name, dry_run=dry_run))
        return found

    def _discard(self, key: str, *, dry_run: bool = False) -> Removed:
        return self.content.remove(key, partial(self.records.retire, _digest(key)), dry_run=dry_run)


def _digest(key: str) -> str:
    return f"sha256:{key}"


def _key(digest: str) -> str:
    digits = digest_hex(digest)
    if digits is None:
        raise IntegrityError(f"{digest!r} is not the digest of an image", hint="remove and import it again")
    return digits
