"""Images: read-only root file systems, each with the configuration of its process."""

from coppice.model.record import Record


class ImageConfig(Record, frozen=True, kw_only=True):
    """The configuration of an image's process (a subset of the OCI image config)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    labels: dict[str, str] = {}
    certificates: tuple[str, ...] = ()  # PEM; machines of the image trust them


class Image(Record, frozen=True, kw_only=True):
    """A read-only root file system, stored once by the digest of its file."""

    digest: str  # "sha256:<64 hex>" of the root file system file
    name: str  # the latest name of it
    size_bytes: int
    config: ImageConfig
    source: str  # how it was made, for display
    created_at: float
    owner: str | None = None  # None: the operator's
    public: bool = False  # whether other owners may run it
    tags: dict[str, str] = {}
    manifest_digest: str | None = None  # "sha256:<64 hex>" of the manifest in the registry, if it was pulled
