"""Tab completion of names. It must answer at once and may never fail: it reads the data directory without opening it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import typer


def instances(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of instances that begin so."""
    return _instances(ctx, incomplete)


def templates(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of templates that begin so."""
    return _instances(ctx, incomplete, "Template")


def snapshots(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of snapshots that begin so."""
    return _names(ctx, "SELECT name FROM snapshots WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name", incomplete)


def volumes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of volumes that begin so."""
    return _names(ctx, "SELECT name FROM volumes WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name", incomplete)


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

    root = _home(ctx) / "images"
    with contextlib.suppress(OSError, CoppiceError):
        if root.is_dir():
            return [image.name for image in ImageStore(root).list() if image.name and image.name.startswith(incomplete)]
    return []


def states(incomplete: str) -> list[str]:
    """States that begin so, in the case that the user began in."""
    from coppice.model import State

    known = [state.lower() if incomplete.islower() else state.value for state in State]
    return [state for state in known if state.startswith(incomplete)]


def _instances(ctx: typer.Context, incomplete: str, state: str = "") -> list[str]:
    query = (
        "SELECT name FROM instances WHERE substr(name, 1, length(?1)) = ?1 AND (?2 = '' OR state = ?2) ORDER BY name"
    )
    return _names(ctx, query, incomplete, state)


def _names(ctx: typer.Context, query: str, *parameters: str) -> list[str]:
    import sqlite3

    database = _home(ctx) / "coppice.db"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=0.5)
        ) as connection,
    ):
        return [name for (name,) in connection.execute(query, parameters)]
    return []


def _home(ctx: typer.Context) -> Path:
    from coppice.store.layout import default_home

    chosen = ctx.find_root().params.get("home")
    return Path(chosen) if chosen else default_home()
