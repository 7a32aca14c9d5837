"""Tab completion of names. It must answer at once and must not fail.

It therefore reads the data directory without opening it. With an owner it offers only the names
that the owner may use, by the rules of `coppice.model.ownership`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Literal

import click

from coppice.cli import output
from coppice.cli.declare import Argument

# Two additions to click's scripts: no blank follows `NAME:`, because a path comes next; and if no
# name matches, local files are offered.
_BASH = {
    "COMPREPLY+=($value)": "COMPREPLY+=($value); [[ $value == *: ]] && compopt -o nospace",
    "complete -o nosort": "complete -o default -o nosort",
}
_ZSH = {
    'if [ -n "$completions" ]; then': '[ -n "$response" ] || _files\n\n    if [ -n "$completions" ]; then',
    "compadd -U -V unsorted -a completions": """\
local -a open=(${(M)completions:#*:}) closed=(${completions:#*:})
        compadd -U -V unsorted -S '' -a open
        compadd -U -V unsorted -a closed""",
}
_PATIENCE_S = 2.0  # with an agent or a server
_OWNED = "(:owner IS NULL OR json_extract(CAST(record AS TEXT), '$.owner') = :owner)"
_PUBLIC = "(state = 'Template' AND json_extract(CAST(record AS TEXT), '$.public'))"


def instances(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of instances with this prefix."""
    return _instances(ctx, incomplete)


def templates(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of templates with this prefix."""
    return _instances(ctx, incomplete, "Template")


def sources(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of instances that can be forked, including public templates of any owner."""
    return _instances(ctx, incomplete, others=_PUBLIC)


def snapshots(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of snapshots with this prefix."""
    return _named(ctx, "snapshots", incomplete)


def volumes(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of volumes with this prefix."""
    return _named(ctx, "volumes", incomplete)


def mounts(ctx: click.Context, incomplete: str) -> list[str]:
    """Return `NAME:` for `--volume`; the user types the path in the guest."""
    return [f"{name}:" for name in volumes(ctx, incomplete)]


def paths(ctx: click.Context, incomplete: str) -> list[str]:
    """Return `NAME:` of running instances for an end of `cp`; the shell completes local paths."""
    return [f"{name}:" for name in _instances(ctx, incomplete, "Running")]


def images(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the names of images with this prefix."""
    query = (
        "SELECT name FROM images WHERE name <> '' AND substr(name, 1, length(:prefix)) = :prefix "  # noqa: S608 - constants
        f"AND ({_OWNED} OR json_extract(CAST(record AS TEXT), '$.public')) ORDER BY name"
    )
    return _names(ctx, query, prefix=incomplete)


def kernels(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the keys of kernels with this prefix."""
    from coppice.boot.kernel import KernelStore
    from coppice.errors import CoppiceError

    with contextlib.suppress(OSError, CoppiceError):
        found = KernelStore(_home(ctx) / "kernels").kernels()
        return [kernel.key for kernel in found if kernel.key.startswith(incomplete)]
    return []


def commands(ctx: click.Context, incomplete: str) -> list[str]:
    """Return the ids of the commands of a running instance, asked from its agent."""
    import asyncio

    from coppice.cli.context import Cli, HostFactory, open_host, opened
    from coppice.requests import CommandLsRequest

    root, name = ctx.find_root().params, str(ctx.params.get("name"))
    server = root.get("host") or os.environ.get("COPPICE_HOST") or None
    if server is None and name not in _instances(ctx, name, "Running"):
        return []
    make_host: HostFactory = ctx.find_root().obj or open_host
    cli = Cli(home=_home(ctx), owner=_owner(ctx), server=server, background="off", host_factory=make_host)

    async def ask() -> list[str]:
        async with asyncio.timeout(_PATIENCE_S), opened(make_host(cli)) as host:
            return [each.id for each in await host.call(CommandLsRequest(instance=name))]

    with contextlib.suppress(Exception):
        return [each for each in asyncio.run(ask()) if each.startswith(incomplete)]
    return []


def states(_: click.Context, incomplete: str) -> list[str]:
    """Return the states with this prefix, in the case that the user typed."""
    from coppice.model import State

    known = [state.lower() if incomplete.islower() else state.value for state in State]
    return [state for state in known if state.startswith(incomplete)]


def _instances(ctx: click.Context, incomplete: str, state: str = "", others: str = "FALSE") -> list[str]:
    query = (
        "SELECT name FROM instances WHERE substr(name, 1, length(:prefix)) = :prefix AND (:state = '' OR state = :state) AND name NOT LIKE '.%' "  # noqa: S608 - constants
        f"AND ({_OWNED} OR {others}) ORDER BY name"
    )
    return _names(ctx, query, prefix=incomplete, state=state)


def _named(ctx: click.Context, table: str, incomplete: str) -> list[str]:
    query = f"SELECT name FROM {table} WHERE substr(name, 1, length(:prefix)) = :prefix AND {_OWNED} ORDER BY name"  # noqa: S608 - constants
    return _names(ctx, query, prefix=incomplete)


def _names(ctx: click.Context, query: str, **parameters: str) -> list[str]:
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


def _owner(ctx: click.Context) -> str | None:
    return ctx.find_root().params.get("owner") or os.environ.get("COPPICE_OWNER") or None


def _home(ctx: click.Context) -> Path:
    from coppice.errors import CoppiceError
    from coppice.state.layout import data_directory

    try:
        return data_directory(ctx.find_root().params.get("home"))
    except CoppiceError:
        return Path(os.devnull)  # no data directory: find no names


def completion(
    _: click.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that lets a shell complete commands and names.

    Put one line into the shell's start file. bash, zsh: `source <(coppice completion bash)`.
    fish: `coppice completion fish | source`.
    """
    from click.shell_completion import get_completion_class

    from coppice.cli.app import app

    register()
    kind = get_completion_class(shell)
    if kind is None:
        raise AssertionError(f"click has no completion class for {shell}")
    output.write(kind(app, {}, "coppice", "_COPPICE_COMPLETE").source().encode())


def register() -> None:
    """Replace click's completion scripts by ours."""
    from click.shell_completion import BashComplete, ZshComplete, add_completion_class

    for base, changes in ((BashComplete, _BASH), (ZshComplete, _ZSH)):
        template = base.source_template
        for before, after in changes.items():
            template = template.replace(before, after)
        add_completion_class(type(base.__name__, (base,), {"source_template": template}))
