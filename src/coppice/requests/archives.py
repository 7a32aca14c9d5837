"""Requests that move templates between data directories."""

from typing import Annotated, ClassVar

from msgspec import Meta

from coppice.model import Instance
from coppice.model.archive import ExportSession, ImportSession
from coppice.names import check_host_path, check_name
from coppice.requests.base import PATH, InstanceRequest, R, Request, StreamRequest

ArchivePath = Annotated[str, Meta(description="A path on this machine.", extra=PATH)]


class Exporting(InstanceRequest[R], frozen=True, kw_only=True):
    """The parameters of all requests for an archive."""

    bare: Annotated[
        bool,
        Meta(description="Leave out the image and the kernel; only a host that has both can import the archive."),
    ] = False


class OpenExportRequest(Exporting[ExportSession], StreamRequest[ExportSession], frozen=True, kw_only=True):
    """Open a stream with the archive of a template or Standby instance. `export` uses it."""

    has_method: ClassVar[bool] = False


class ExportRequest(Exporting[int], frozen=True, kw_only=True):
    """Write a template or Standby instance to an archive; return the bytes of the archive.

    The archive has the memory, device state, disk, image and kernel, without their holes. The
    instance cannot be removed or changed meanwhile. An existing file is replaced when the archive
    is whole.

    :raises IllegalTransition: the instance is not a template or in standby
    :raises NotSupported: it has volumes
    :raises IntegrityError: a captured file has changed
    """

    reports_progress: ClassVar[bool] = True

    path: ArchivePath

    def check(self) -> None:
        """Check the path too."""
        super().check()
        check_host_path(self.path)


class Importing(Request[R], frozen=True, kw_only=True):
    """The parameters of all requests to import a template."""

    name: Annotated[str | None, Meta(description="Name of the template. Default: its name in the archive.")] = None

    def check(self) -> None:
        """Check the name."""
        if self.name is not None:
            check_name(self.name)


class OpenImportRequest(Importing[ImportSession], StreamRequest[ImportSession], frozen=True, kw_only=True):
    """Open a session that takes an archive as a stream. `import_template` uses it."""

    has_method: ClassVar[bool] = False


class ImportTemplateRequest(Importing[Instance], frozen=True, kw_only=True):
    """Make a template of an archive that `export` wrote, on this host or another one.

    Every file is compared with its digest before the template exists. The image and the kernel are
    kept too, unless they are here already. If it fails, no template is left behind.

    :raises ImageError: the archive is truncated, corrupt or not an archive of a template
    :raises HostCannot: this host cannot load the template's memory; the message says why
    :raises NameTaken: the name is in use
    :raises NoSpace: a budget is exceeded, or the disk is full
    """

    reports_progress: ClassVar[bool] = True

    path: ArchivePath

    def check(self) -> None:
        """Check the path too."""
        super().check()
        check_host_path(self.path)
