"""Requests for images and kernels."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from coppice.model import Image
from coppice.model.kernel import Kernel
from coppice.names import check_host_path, check_tags
from coppice.requests.base import PATH, SECRET, Certificates, Request, Tags
from coppice.trust import certificates_in, check_proxy

ImageKey = Annotated[str, Meta(description="Name, digest or unique prefix of the digest of an image.")]
ImageName = Annotated[str, Meta(description="Name for the image, such as `web` or `team/web:1`.")]
Public = Annotated[bool, Meta(description="Other owners may run it too.")]


class ImageBuildRequest(Request[Image], frozen=True, kw_only=True):
    """Build an image of a Debian suite with extra packages.

    :raises MissingTool: mmdebstrap is not installed
    :raises ImageError: the suite or a package is not available
    """

    reports_progress: ClassVar[bool] = True

    name: ImageName
    suite: Annotated[str, Meta(description="The Debian suite.")] = "bookworm"
    include: Annotated[Sequence[str], Meta(description="Packages to add.")] = ()
    certificates: Certificates = ()
    proxy: Annotated[
        str | None, Meta(description="URL of a proxy for the downloads. The image does not keep it.", extra=SECRET)
    ] = None
    public: Public = False

    def check(self) -> None:
        """Check the certificates and the proxy."""
        certificates_in(self.certificates)
        check_proxy(self.proxy)


class ImageImportRequest(Request[Image], frozen=True, kw_only=True):
    """Make an image of a root file system tar, a `docker save` archive or an OCI layout (directory
    or tar).

    The format is detected.

    :raises UsageError: there is no such path
    :raises ImageError: the archive is corrupt, truncated or unsafe, or `tag` does not name one of
        its images
    """

    reports_progress: ClassVar[bool] = True

    name: ImageName
    path: Annotated[str, Meta(description="The archive or directory, on this machine.", extra=PATH)]
    tag: Annotated[
        str | None,
        Meta(
            description="Selects one of several images: a tag of a `docker save` archive, a reference or digest of a "
            "layout."
        ),
    ] = None
    certificates: Certificates = ()
    public: Public = False

    def check(self) -> None:
        """Check the path and the certificates."""
        check_host_path(self.path)
        certificates_in(self.certificates)


class ImagePullRequest(Request[Image], frozen=True, kw_only=True):
    """Pull an image from a registry. It gets the name `reference`, as typed, unless `name` is given.

    `alpine` means docker.io/library/alpine:latest, and is found by both names. Layers of earlier
    pulls are not fetched again. The operator uses the logins that `skopeo login` and `docker login`
    have saved on the host; an owner uses `credentials` only.

    :raises MissingTool: skopeo is not installed
    :raises NotFound: the registry has no such image, or none for this machine
    :raises Refused: the registry refuses the credentials, or wants some
    :raises Forbidden: the token's owner may not have the server ask this registry
    :raises HostCannot: the registry cannot be reached, or its certificate is not trusted
    :raises ImageError: the image exceeds a limit, or its content does not match its digests
    """

    reports_progress: ClassVar[bool] = True

    reference: Annotated[str, Meta(description="The image: `[REGISTRY/]NAME[:TAG][@DIGEST]`.")]
    name: Annotated[str | None, Meta(description="Name for the image. Default: the reference.")] = None
    platform: Annotated[
        str | None, Meta(description="`OS/ARCHITECTURE[/VARIANT]` of a multi-platform image. Default: this machine's.")
    ] = None
    credentials: Annotated[str | None, Meta(description="`USER:PASSWORD` for the registry.", extra=SECRET)] = None
    tls_verify: Annotated[
        bool | None,
        Meta(
            description="Require HTTPS with a trusted certificate. Default: unless the registry is on a loopback "
            "address."
        ),
    ] = None
    public: Public = False
    tags: Tags = {}

    def check(self) -> None:
        """Check the tags."""
        check_tags(self.tags)


class ImageLsRequest(Request[list[Image]], frozen=True, kw_only=True):
    """Return the images that this host's owner may run: its own and public ones. The operator sees
    all.
    """


class ImageInspectRequest(Request[Image], frozen=True, kw_only=True):
    """Return one image.

    :raises NotFound: there is no such image
    """

    image: ImageKey


class ImageTagRequest(Request[Image], frozen=True, kw_only=True):
    """Give an image another name, which belongs to this owner.

    If the image already has the name, only `public` changes.

    :raises NameTaken: the name belongs to another owner
    """

    image: ImageKey
    name: ImageName
    public: Public = False


class ImageRmRequest(Request[None], frozen=True, kw_only=True):
    """Remove an image, or one of its names.

    :raises InUse: instances or snapshots use the image as their root; the message names them
    :raises Refused: the image is public and belongs to another owner
    """

    image: ImageKey


class KernelAddRequest(Request[Kernel], frozen=True, kw_only=True):
    """Add your own kernel.

    A kernel with CONFIG_IKCONFIG contains its configuration. For another kernel, the other
    parameters describe it.

    :raises UsageError: the file is not a kernel, or its configuration is unknown; the hint names a
        parameter
    """

    positional: ClassVar[tuple[str, ...]] = ("modules",)

    kernel: Annotated[str, Meta(description="The bzImage or the uncompressed vmlinux, on this machine.", extra=PATH)]
    modules: Annotated[
        str | None, Meta(description="Directory of its modules: .../lib/modules/VERSION.", extra=PATH)
    ] = None
    config: Annotated[str | None, Meta(description="The file .config that it was built with.", extra=PATH)] = None
    no_modules: Annotated[bool, Meta(description="All drivers that a guest needs are built in.")] = False
    acpi: Annotated[
        bool | None, Meta(description="Whether it supports ACPI. Without ACPI, devices are listed on its command line.")
    ] = None

    def check(self) -> None:
        """Check the paths."""
        for path in (self.kernel, self.modules, self.config):
            if path is not None:
                check_host_path(path)


class KernelFetchRequest(Request[Kernel], frozen=True, kw_only=True):
    """Return Debian's cloud kernel. Fetch it into the data directory if it is missing."""

    reports_progress: ClassVar[bool] = True


class KernelLsRequest(Request[list[Kernel]], frozen=True, kw_only=True):
    """Return all kernels, newest last."""


class KernelRmRequest(Request[None], frozen=True, kw_only=True):
    """Remove a kernel.

    :raises NotFound: there is no such kernel
    :raises InUse: instances or snapshots use the kernel; the message names them
    :raises Refused: the host has an owner; only the operator may remove kernels, which all owners
        share
    """

    kernel: Annotated[str, Meta(description="Key of the kernel.")]
