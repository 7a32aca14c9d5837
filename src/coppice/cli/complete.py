"""Tab completion of names. It must answer at once and may never fail: it reads the data directory without opening it.

Under an owner only what that owner may use is offered, by the rules of `coppice.ownership`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import typer

_OWNED = "(:owner IS NULL OR json_extract(CAST(record AS TEXT), '$.owner') = :owner)"
_PUBLIC = "(state = 'Template' AND json_extract(CAST(record AS TEXT), '$.public'))"


def instances(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of instances that begin so."""
    return _instances(ctx, incomplete)


def templates(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of templates that begin so."""
    return _instances(ctx, incomplete, "Template")


def sources(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of what can be forked: also of public templates, whoever's they are."""
    return _instances(ctx, incomplete, others=_PUBLIC)


def snapshots(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of snapshots that begin so."""
    return _named(ctx, "snapshots", incomplete)


def volumes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of volumes that begin so."""
    return _named(ctx, "volumes", incomplete)


def mounts(ctx: typer.Context, incomplete: str) -> list[str]:
    """`NAME:` for `--volume`; the path is the guest's."""
    return [f"{name}:" for name in volumes(ctx, incomplete)]


def paths(ctx: typer.Context, incomplete: str) -> list[str]:
    """`NAME:` for an end of `cp`; the shell completes local paths."""
    return [f"{name}:" for name in _instances(ctx, incomplete, "Running")]


def images(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of images that begin so."""
    from coppice.errors import CoppiceError
    from coppice.images.store import ImageStore
    from coppice.ownership import may_use_image

    root, owner = _home(ctx) / "images", _owner(ctx)
    with contextlib.suppress(OSError, CoppiceError):
        if root.is_dir():
            found = [image for image in ImageStore(root).list() if may_use_image(owner, image)]
            return [image.name for image in found if image.name and image.name.startswith(incomplete)]
    return []


def kernels(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys of kernels that begin so."""
    from coppice.errors import CoppiceError
    from coppice.guest.kernel import KernelStore

    with contextlib.suppress(OSError, CoppiceError):
        found = KernelStore(_home(ctx) / "kernels").kernels()
        return [kernel.key for kernel in found if kernel.key.startswith(incomplete)]
    return []


def states(incomplete: str) -> list[str]:
    """States that begin so, in the case that the user began in."""
    from coppice.model import State

    known = [state.lower() if incomplete.islower() else state.value for state in State]
    return [state for state in known if state.startswith(incomplete)]


def _instances(ctx: typer.Context, incomplete: str, state: str = "", others: str = "FALSE") -> list[str]:
    query = (
        "SELECT name FROM instances WHERE substr(name, 1, length(:prefix)) = :prefix AND (:state = '' OR state = :state) "  # noqa: S608 - constants
        f"AND ({_OWNED} OR {others}) ORDER BY name"
    )
    return _names(ctx, query, prefix=incomplete, state=state)


def _named(ctx: typer.Context, table: str, incomplete: str) -> list[str]:
    query = f"SELECT name FROM {table} WHERE substr(name, 1, length(:prefix)) = :prefix AND {_OWNED} ORDER BY name"  # noqa: S608 - constants
    return _names(ctx, query, prefix=incomplete)


def _names(ctx: typer.Context, query: str, **parameters: str) -> list[str]:
    import sqlite3

    database = _home(ctx) / "coppice.db"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=0.5)
        ) as connection,
    ):
        return [name for (name,) in connection.execute(query, {**parameters, "owner": _owner(ctx)})]
    return []


def _owner(ctx: typer.Context) -> str | None:
    return ctx.find_root().params.get("owner") or os.environ.get("COPPICE_OWNER") or None


def _home(ctx: typer.Context) -> Path:
    from coppice.errors import CoppiceError
    from coppice.store.layout import default_home

    if chosen := ctx.find_root().params.get("home"):
        return Path(chosen)
    try:
        return default_home()
    except CoppiceError:
        return Path(os.devnull)  # where nothing is found
