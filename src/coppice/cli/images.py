"""Commands of what machines are made of: image, kernel; and doctor, which checks this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import format, options, output
from coppice.cli.context import Cli

if TYPE_CHECKING:
    from rich.text import Text

    from coppice.guest.kernel import Kernel
    from coppice.host import AsyncHost
    from coppice.model import Check, Image

image_app = typer.Typer(rich_markup_mode=None)
kernel_app = typer.Typer(rich_markup_mode=None)
NewName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the image, such as `web` or `team/web:1`.")]


@image_app.command("build")
def build(
    ctx: typer.Context,
    name: NewName,
    suite: Annotated[str, typer.Option("--suite", help="The Debian suite.")] = "bookworm",
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PACKAGE[,...]", help="Packages to add; repeatable.")
    ] = None,
    public: options.Public = False,
) -> None:
    """Build an image of a Debian suite with extra packages."""
    cli = Cli.of(ctx)
    packages = [word for words in include or () for word in words.replace(",", " ").split()]

    async def work(host: AsyncHost) -> Image:
        with cli.progress() as progress:
            return await host.image_build(name, suite=suite, include=packages, public=public, progress=progress)

    _made(cli, cli.call(work))


@image_app.command("import")
def import_(
    ctx: typer.Context,
    name: NewName,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A tar archive, or the directory of an OCI layout.")],
    tag: Annotated[
        str | None,
        typer.Option(
            "--tag", help="Which image, where several are in it: a tag, or a reference or digest of a layout."
        ),
    ] = None,
    public: options.Public = False,
) -> None:
    """Make an image of a root file system tar, a `docker save` archive or an OCI layout; it is recognised."""
    cli = Cli.of(ctx)

    async def work(host: AsyncHost) -> Image:
        with cli.progress() as progress:
            return await host.image_import(name, path, tag=tag, public=public, progress=progress)

    _made(cli, cli.call(work))


def _made(cli: Cli, image: Image) -> None:
    cli.show(image, lambda: output.line(f"{image.name} is {image.digest}, {format.size(image.size_bytes)}"))


@image_app.command("ls")
def image_ls(ctx: typer.Context, quiet: options.Quiet = False) -> None:
    """List images."""
    cli = Cli.of(ctx)
    images = cli.call(lambda host: host.image_ls())

    def human() -> None:
        if quiet:
            for image in images:
                output.line(image.name or image.digest)
            return
        output.table(
            [
                ("NAME", "left"),
                ("DIGEST", "left"),
                ("SIZE", "right"),
                ("KIND", "left"),
                ("AGE", "right"),
                ("SOURCE", "left"),
            ],
            [
                [
                    image.name or "-",
                    image.digest.removeprefix("sha256:")[:12],
                    format.size(image.size_bytes),
                    image.filesystem,
                    format.age(image.created_at),
                    output.printable(image.source),
                ]
                for image in images
            ],
        )

    cli.show(images, human)


@image_app.command("inspect")
def image_inspect(ctx: typer.Context, image: options.ImageName) -> None:
    """Show an image: its digest, and the process that it is made for."""
    cli = Cli.of(ctx)
    found = cli.call(lambda host: host.image_inspect(image))
    cli.show(found, lambda: output.fields(_details(found)))


def _details(image: Image) -> list[output.Field]:
    import shlex

    config = image.config
    details = [
        ("Name", image.name),
        ("Digest", image.digest),
        ("Size", f"{format.size(image.size_bytes)} ({image.filesystem})"),
        ("Source", image.source),
        ("Created", format.moment(image.created_at)),
        ("Entrypoint", shlex.join(config.entrypoint)),
        ("Command", shlex.join(config.cmd)),
        ("User", config.user),
        ("Directory", config.workdir),
        ("Environment", ", ".join(f"{key}={value}" for key, value in config.env.items())),
        ("Labels", ", ".join(f"{key}={value}" for key, value in config.labels.items())),
        ("Tags", format.tags(image.tags) if image.tags else ""),
        ("Owner", f"{image.owner or ''}{', public' if image.public else ''}".removeprefix(", ")),
    ]
    return [(label, output.printable(text)) for label, text in details]


@image_app.command("tag")
def image_tag(ctx: typer.Context, image: options.ImageName, name: NewName, public: options.Public = False) -> None:
    """Give an image another name; its own name anew changes whether it is public."""
    cli = Cli.of(ctx)
    _made(cli, cli.call(lambda host: host.image_tag(image, name, public=public)))


@image_app.command("rm")
def image_rm(ctx: typer.Context, image: options.ImageName) -> None:
    """Remove an image, or one of its names. Refused while instances or snapshots have it as their root."""
    cli = Cli.of(ctx)
    cli.call(lambda host: host.image_rm(image))
    cli.show({"removed": [image]}, lambda: output.line(image))


@kernel_app.command("add")
def kernel_add(
    ctx: typer.Context,
    kernel: Annotated[Path, typer.Argument(metavar="KERNEL", help="A bzImage.")],
    modules: Annotated[Path, typer.Argument(metavar="MODULES", help="Its modules: .../lib/modules/VERSION.")],
) -> None:
    """Add a kernel of your own; print its key, which `run --kernel` takes."""
    cli = Cli.of(ctx)
    _print_kernel(cli, cli.call(lambda host: host.kernel_add(kernel, modules)))


@kernel_app.command("fetch")
def kernel_fetch(ctx: typer.Context) -> None:
    """Fetch Debian's cloud kernel, where it is not there yet; print its key."""
    cli = Cli.of(ctx)

    async def work(host: AsyncHost) -> Kernel:
        with cli.progress() as progress:
            return await host.kernel_fetch(progress=progress)

    _print_kernel(cli, cli.call(work))


@kernel_app.command("ls")
def kernel_ls(ctx: typer.Context) -> None:
    """List kernels."""
    cli = Cli.of(ctx)
    kernels = cli.call(lambda host: host.kernel_ls())
    cli.show(
        [_kernel_fields(kernel) for kernel in kernels],
        lambda: output.table(
            [("KEY", "left"), ("VERSION", "left")], [[kernel.key, kernel.version] for kernel in kernels]
        ),
    )


@kernel_app.command("rm")
def kernel_rm(ctx: typer.Context, kernel: options.KernelKey) -> None:
    """Remove a kernel. Refused while instances or snapshots have it."""
    cli = Cli.of(ctx)
    cli.call(lambda host: host.kernel_rm(kernel))
    cli.show({"removed": [kernel]}, lambda: output.line(kernel))


def _print_kernel(cli: Cli, kernel: Kernel) -> None:
    cli.show(_kernel_fields(kernel), lambda: output.line(kernel.key))


def _kernel_fields(kernel: Kernel) -> dict[str, str]:
    return {
        "key": kernel.key,
        "version": kernel.version,
        "vmlinuz": str(kernel.vmlinuz),
        "modules": str(kernel.modules),
    }


_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(ctx: typer.Context) -> None:
    """Check this host, and say what to type where something is missing.

    Exit status 5 if a check fails.
    """
    cli = Cli.of(ctx)
    # Not opened: a data directory that cannot be opened is one of the things to be told.
    checks = cli.call(lambda host: host.doctor(), opened=False)
    cli.show(checks, lambda: _print_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(5)


def _print_checks(checks: list[Check]) -> None:
    from rich.text import Text

    rows: list[list[str | Text]] = []
    for check in checks:
        rows.append([Text(check.status, style=_STATUS_STYLES[check.status]), check.name, check.detail])
        if check.cure and check.status != "ok":
            rows.append(["", "", Text(f"-> {check.cure}", style="bold")])
    output.table([("", "left"), ("CHECK", "left"), ("FOUND", "left")], rows)
