"""Commands that change what an instance is: run, start, stop, standby, restore, promote, demote, rm."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import complete, format, options, output, parse, several
from coppice.cli.context import Cli
from coppice.errors import CoppiceError, UsageError

if TYPE_CHECKING:
    from coppice.host import AsyncHost
    from coppice.model import Instance


def run(
    ctx: typer.Context,
    image: options.ImageName,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="After `--`: instead of the image's command; its entrypoint stays."),
    ] = None,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the instance; generated where it is not given.")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", help="Virtual CPUs.")] = 1,
    memory: Annotated[str, typer.Option("--memory", "-m", metavar="SIZE", help="RAM, such as 512M or 2G.")] = "512M",
    overlay: Annotated[str, typer.Option("--overlay", metavar="SIZE", help="Size of its own writable disk.")] = "2G",
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="KEY=VALUE",
            help="A variable of its process; repeatable. KEY alone: with the value that it has here.",
        ),
    ] = None,
    env_file: Annotated[
        list[Path] | None,
        typer.Option("--env-file", metavar="FILE", help="Variables, one KEY=VALUE in a line; repeatable."),
    ] = None,
    workdir: Annotated[
        str | None, typer.Option("--workdir", "-w", metavar="DIR", help="Working directory of its process.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="User of its process: a name, UID, or UID:GID.")
    ] = None,
    hostname: Annotated[
        str | None, typer.Option("--hostname", help="The guest's host name. Default: the name of the instance.")
    ] = None,
    tag: options.Tags = None,
    publish: options.Published = None,
    volume: options.Volumes = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            metavar="KEY|PATH",
            help="A kernel that was added, or a bzImage (with --modules).",
            autocompletion=complete.kernels,
        ),
    ] = None,
    modules: Annotated[
        Path | None,
        typer.Option("--modules", metavar="DIR", help="The modules of the kernel: .../lib/modules/VERSION."),
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Make it, but do not boot it.")] = False,
) -> None:
    """Make an instance of an image and boot it; print its name.

    Returns when the guest has answered. The first run fetches a kernel. Options go before `--`, the command after it.
    """
    from coppice.names import parse_size

    cli = Cli.of(ctx)
    if modules is not None and kernel is None:
        raise UsageError("--modules belongs to a kernel", hint="give its bzImage with --kernel PATH")
    if kernel is not None and "/" in kernel and modules is None:
        raise UsageError(f"the kernel {kernel} comes without its modules", hint="add --modules .../lib/modules/VERSION")
    memory_bytes, overlay_bytes = parse_size(memory), parse_size(overlay)
    environment = parse.environment(env or (), env_file or ())
    tags, ports = parse.pairs(tag or (), "tag"), parse.publish(publish or ())
    volumes = parse.volumes(volume or ())

    async def work(host: AsyncHost) -> Instance:
        key = kernel
        if kernel is not None and modules is not None:
            key = (await host.kernel_add(kernel, modules)).key
        with cli.progress() as progress:
            return await host.run(
                image,
                command or (),
                name=name,
                cpus=cpus,
                memory_bytes=memory_bytes,
                overlay_bytes=overlay_bytes,
                env=environment,
                workdir=workdir,
                user=user,
                hostname=hostname,
                tags=tags,
                publish=ports,
                volumes=volumes,
                kernel=key,
                start=not no_start,
                progress=progress,
            )

    instance = cli.call(work)
    cli.show(instance, lambda: output.line(instance.name))


def start(ctx: typer.Context, name: options.Name) -> None:
    """Boot a Stopped instance from its disk."""
    cli = Cli.of(ctx)

    async def work(host: AsyncHost) -> Instance:
        with cli.progress() as progress:
            return await host.start(name, progress=progress)

    _tell(cli, cli.call(work))


def stop(
    ctx: typer.Context,
    name: options.Name,
    grace: Annotated[
        float | None,
        typer.Option("--grace", metavar="SECONDS", help="Time to power off by itself; 0: none. Default: 30."),
    ] = None,
) -> None:
    """Power a guest off, hard where it does not obey in time. Its memory is gone, its disk stays."""
    _change(ctx, lambda host: host.stop(name, grace_s=grace))


def standby(ctx: typer.Context, name: options.Name) -> None:
    """Capture a Running instance and end its VMM process.

    It holds no RAM then, and `restore` lets it run on.
    """
    cli = Cli.of(ctx)
    instance, capture = cli.call(lambda host: host.standby(name))
    cost = (
        f" (paused for {format.duration(capture.pause_ms)}, {format.duration(capture.total_ms)} in all, "
        f"{format.size(capture.ram_bytes_written)} of RAM written)"
    )
    cli.show(
        {"instance": instance, "capture": capture},
        lambda: output.line(f"{instance.name} is {instance.state}{cost if capture.total_ms else ''}"),
    )


def restore(ctx: typer.Context, name: options.Name) -> None:
    """Let a Standby instance run on from its captured memory, or a Running one that a full disk has paused."""
    _change(ctx, lambda host: host.restore(name))


def promote(
    ctx: typer.Context,
    name: options.Name,
    public: Annotated[
        bool | None,
        typer.Option("--public/--private", help="Whether other owners may fork it too, and so share its memory."),
    ] = None,
) -> None:
    """Make a Standby instance a Template, which can only be forked."""
    _change(ctx, lambda host: host.promote(name, public=public))


def demote(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name or id of a template.", autocompletion=complete.templates)
    ],
) -> None:
    """Make a Template a Standby instance again. Refused while it has forks."""
    _change(ctx, lambda host: host.demote(name))


def _change(ctx: typer.Context, work: Callable[[AsyncHost], Awaitable[Instance]]) -> None:
    cli = Cli.of(ctx)
    _tell(cli, cli.call(work))


def _tell(cli: Cli, instance: Instance) -> None:
    cli.show(instance, lambda: output.line(f"{instance.name} is {instance.state}"))


def rm(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Names or ids of instances.", autocompletion=complete.instances),
    ] = None,
    tag: options.TagFilter = None,
    everything: Annotated[bool, typer.Option("--all", help="All instances; needs --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Really, with --all.")] = False,
) -> None:
    """Remove instances in any state: by name, by tag, or all. Forks go before what they were forked from.

    If one cannot be removed, the others still are; the exit status is then the first failure's.
    """
    cli = Cli.of(ctx)
    if sum((bool(names), bool(tag), everything)) != 1:
        raise UsageError("it is not clear what to remove", hint="give names, or --tag KEY=VALUE, or --all")
    if everything and not yes:
        raise UsageError("--all removes every instance of this data directory", hint="add --yes if that is meant")
    tags = parse.pairs(tag or (), "tag")

    async def work(host: AsyncHost) -> tuple[list[str], dict[str, CoppiceError]]:
        from coppice.completion import each_of

        failed: dict[str, CoppiceError] = {}
        found: dict[str, Instance] = {}
        for name in dict.fromkeys(names or ()):
            try:
                instance = await host.get(name)
                found[instance.id] = instance
            except CoppiceError as error:
                failed[name] = error
        if not names:
            found = {instance.id: instance for instance in await host.ls(tags=tags)}
        removed: list[str] = []
        for generation in _youngest_first(found):
            outcomes = await each_of(host.rm(instance) for instance in generation)
            for instance, outcome in zip(generation, outcomes, strict=True):
                if outcome is None:
                    removed.append(instance.name)
                elif isinstance(outcome, CoppiceError):
                    failed[instance.name] = outcome
                else:
                    raise outcome
        return removed, failed

    several.show_removal(cli, *cli.call(work))


def _youngest_first(instances: dict[str, Instance]) -> Sequence[list[Instance]]:
    """Generations: those that none of the others was forked from come first. A removal never waits for one in its own generation."""
    depths: dict[str, int] = {}
    for instance in instances.values():
        ancestors, parent = 0, instance.parent
        while parent is not None and parent in instances:
            ancestors, parent = ancestors + 1, instances[parent].parent
        depths[instance.id] = ancestors
    return [
        [instances[key] for key, depth in depths.items() if depth == wanted]
        for wanted in sorted(set(depths.values()), reverse=True)
    ]
