"""Read-only root file systems, made from OCI layouts, docker archives, rootfs archives and Debian
suites.
"""

from coppice.images.catalog import BuildOptions, ImageCatalog
from coppice.images.workspace import Limits

__all__ = ["BuildOptions", "ImageCatalog", "Limits"]
