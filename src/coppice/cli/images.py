"""The commands of images and kernels, and doctor, which checks this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import format, options, output, parse, several, table
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Commands, Option, ProgramExit

if TYPE_CHECKING:
    from coppice.model import Check, Image
    from coppice.model.kernel import Kernel

image_app = Commands("image", help="Build, pull, import and list images.")
kernel_app = Commands("kernel", help="Add, fetch, list and remove guest kernels.")
NewName = Annotated[str, Argument(metavar="NAME", help="Name of the image, such as `web` or `team/web:1`.")]


@image_app.declare("build")
def build(
    ctx: click.Context,
    name: NewName,
    suite: Annotated[str, Option("--suite", help="The Debian suite.")] = "bookworm",
    include: Annotated[
        list[str] | None, Option("--include", metavar="PACKAGE[,...]", help="Packages to add; repeatable.")
    ] = None,
    ca: options.Authorities = None,
    proxy: Annotated[
        str | None,
        Option("--proxy", metavar="URL", help="HTTP proxy for the downloads. Default: http_proxy and its like."),
    ] = None,
    public: options.Public = False,
) -> None:
    """Build an image of a Debian suite with extra packages."""
    from coppice.requests import ImageBuildRequest

    cli = Cli.of(ctx)
    packages = [word for words in include or () for word in words.replace(",", " ").split()]
    request = ImageBuildRequest(
        name=name,
        suite=suite,
        include=packages,
        certificates=parse.certificates(ca),
        proxy=proxy,
        public=public,
    )
    _made(cli, cli.request(request))


@image_app.declare("import")
def import_(
    ctx: click.Context,
    name: NewName,
    path: Annotated[Path, Argument(metavar="PATH", help="A tar archive, or the directory of an OCI layout.")],
    tag: Annotated[
        str | None,
        Option("--tag", help="Selects one of several images: a tag, or a reference or digest of a layout."),
    ] = None,
    ca: options.Authorities = None,
    public: options.Public = False,
) -> None:
    """Make an image of a root file system tar, a `docker save` archive or an OCI layout. The format
    is detected.
    """
    from coppice.requests import ImageImportRequest

    cli = Cli.of(ctx)
    request = ImageImportRequest(name=name, path=str(path), tag=tag, certificates=parse.certificates(ca), public=public)
    _made(cli, cli.request(request))


@image_app.declare("pull")
def pull(
    ctx: click.Context,
    references: Annotated[
        list[str], Argument(metavar="REF", help="Images in their registries: [REGISTRY/]NAME[:TAG][@DIGEST].")
    ],
    name: Annotated[str | None, Option("--name", help="Name for the image, if it is one. Default: REF.")] = None,
    platform: Annotated[
        str | None,
        Option("--platform", metavar="OS/ARCH[/VARIANT]", help="Which of several images. Default: this machine's."),
    ] = None,
    creds_file: Annotated[
        Path | None,
        Option(
            "--creds-file",
            metavar="FILE",
            help="A file with USER:PASSWORD; `-`: standard input. Default: COPPICE_REGISTRY_CREDS, else the logins "
            "that `skopeo login` or `docker login` saved.",
        ),
    ] = None,
    tls_verify: Annotated[
        bool | None,
        Option(
            "--tls-verify/--no-tls-verify",
            help="Require HTTPS with a trusted certificate. Default: unless the registry is on a loopback address.",
        ),
    ] = None,
    public: options.Public = False,
    tag: options.Tags = None,
    quiet: options.Quiet = False,
) -> None:
    """Pull images from registries. `alpine` means docker.io/library/alpine:latest."""
    from coppice.requests import ImagePullRequest

    options.refuse_one_name(name, references)
    credentials, tags = parse.credentials(creds_file), parse.pairs(tag or (), "tag")

    def request(reference: str) -> ImagePullRequest:
        return ImagePullRequest(
            reference=reference,
            name=name,
            platform=platform,
            credentials=credentials,
            tls_verify=tls_verify,
            public=public,
            tags=tags,
        )

    several.change(
        Cli.of(ctx), references, request, lambda image: image.name or image.digest if quiet else _line(image)
    )


def _made(cli: Cli, image: Image) -> None:
    cli.show(image, lambda: output.line(_line(image)))


def _line(image: Image) -> str:
    return f"{image.name} is {image.digest}, {format.size(image.size_bytes)}"


@image_app.declare("ls")
def image_ls(ctx: click.Context, quiet: options.Quiet = False, everything: options.All = False) -> None:
    """List images."""
    from coppice.requests import ImageLsRequest

    del everything
    cli = Cli.of(ctx)
    images = cli.request(ImageLsRequest())

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
                ("AGE", "right"),
                ("SOURCE", "left"),
            ],
            [
                [
                    image.name or "-",
                    image.digest.removeprefix("sha256:")[:12],
                    format.size(image.size_bytes),
                    format.age(image.created_at),
                    output.printable(image.source),
                ]
                for image in images
            ],
        )

    cli.show(images, human)


@image_app.declare("inspect")
def image_inspect(ctx: click.Context, images: options.ImageNames) -> None:
    """Show images: digest, size, source and the process to run. With --json: always a list."""
    from coppice.requests import ImageInspectRequest

    several.inspect(Cli.of(ctx), images, lambda image: ImageInspectRequest(image=image), _details)


def _details(image: Image) -> list[output.Field]:
    import shlex

    config = image.config
    details = [
        ("Name", image.name),
        ("Digest", image.digest),
        ("Size", format.size(image.size_bytes)),
        ("Source", image.source),
        ("Manifest", image.manifest_digest or ""),
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


@image_app.declare("tag")
def image_tag(ctx: click.Context, image: options.ImageName, name: NewName, public: options.Public = False) -> None:
    """Give an image another name. If it already has the name, only --public changes."""
    from coppice.requests import ImageTagRequest

    cli = Cli.of(ctx)
    _made(cli, cli.request(ImageTagRequest(image=image, name=name, public=public)))


@image_app.declare("rm")
def image_rm(ctx: click.Context, images: options.ImageNames, force: options.Force = False) -> None:
    """Remove images, or names of images. Refused while instances or snapshots use an image as their
    root.
    """
    from coppice.requests import ImageRmRequest

    several.remove(Cli.of(ctx), images, lambda image: ImageRmRequest(image=image), force=force)


@kernel_app.declare("add")
def kernel_add(
    ctx: click.Context,
    kernel: Annotated[Path, Argument(metavar="KERNEL", help="A bzImage, or an uncompressed vmlinux.")],
    modules: Annotated[Path | None, Argument(metavar="MODULES", help="Its modules: .../lib/modules/VERSION.")] = None,
    config: Annotated[
        Path | None, Option("--config", metavar="FILE", help="The .config that it was built with.")
    ] = None,
    no_modules: Annotated[bool, Option("--no-modules", help="All drivers that a guest needs are built in.")] = False,
    acpi: Annotated[
        bool | None,
        Option("--acpi/--no-acpi", help="Whether it supports ACPI. Without ACPI, devices are on its command line."),
    ] = None,
) -> None:
    """Add your own kernel; print its key for `run --kernel`.

    A kernel with CONFIG_IKCONFIG contains its configuration. For other kernels give MODULES, and
    --config or the flags.
    """
    from coppice.requests import KernelAddRequest

    cli = Cli.of(ctx)
    request = KernelAddRequest(
        kernel=str(kernel),
        modules=None if modules is None else str(modules),
        config=None if config is None else str(config),
        no_modules=no_modules,
        acpi=acpi,
    )
    _print_kernel(cli, cli.request(request))


@kernel_app.declare("fetch")
def kernel_fetch(ctx: click.Context) -> None:
    """Fetch Debian's cloud kernel if it is missing; print its key."""
    from coppice.requests import KernelFetchRequest

    cli = Cli.of(ctx)
    _print_kernel(cli, cli.request(KernelFetchRequest()))


@kernel_app.declare("ls")
def kernel_ls(ctx: click.Context) -> None:
    """List kernels."""
    from coppice.requests import KernelLsRequest

    cli = Cli.of(ctx)
    kernels = cli.request(KernelLsRequest())
    cli.show(
        [_kernel_fields(kernel) for kernel in kernels],
        lambda: output.table(
            [("KEY", "left"), ("VERSION", "left")], [[kernel.key, kernel.version] for kernel in kernels]
        ),
    )


@kernel_app.declare("rm")
def kernel_rm(ctx: click.Context, kernels: options.KernelKeys, force: options.Force = False) -> None:
    """Remove kernels. Refused while instances or snapshots use a kernel."""
    from coppice.requests import KernelRmRequest

    several.remove(Cli.of(ctx), kernels, lambda kernel: KernelRmRequest(kernel=kernel), force=force)


def _print_kernel(cli: Cli, kernel: Kernel) -> None:
    cli.show(_kernel_fields(kernel), lambda: output.line(kernel.key))


def _kernel_fields(kernel: Kernel) -> dict[str, object]:
    files = {"vmlinuz": kernel.vmlinuz, "vmlinux": kernel.vmlinux, "modules": kernel.modules, "config": kernel.config}
    return {
        "key": kernel.key,
        "version": kernel.version,
        "acpi": kernel.acpi,
        **{name: None if path is None else str(path) for name, path in files.items()},
    }


def doctor(ctx: click.Context) -> None:
    """Check this host, and print the command that fixes each failure.

    Exit status 5 if a check fails.
    """
    from coppice.requests import DoctorRequest

    cli = Cli.of(ctx)
    # Not opened: an unusable data directory is one of the failures to report.
    checks = cli.request(DoctorRequest(), needs_data=False)
    cli.show(checks, lambda: _print_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise ProgramExit(5)


def _print_checks(checks: list[Check]) -> None:
    rows: list[list[str]] = []
    for check in checks:
        rows.append([table.status(check.status), check.name, check.detail])
        if check.cure and check.status != "ok":
            rows.append(["", "", table.Styled(f"-> {check.cure}", table.BOLD)])
    output.table([("", "left"), ("CHECK", "left"), ("FOUND", "left")], rows)
