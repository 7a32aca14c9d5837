"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from coppice.cli import complete

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name or id of an instance.", autocompletion=complete.instances)
]
Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help="Names or ids of instances.", autocompletion=complete.instances)
]
ImageName = Annotated[
    str, typer.Argument(metavar="IMAGE", help="Name or digest of an image.", autocompletion=complete.images)
]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A tag to put on it; repeatable.")]
TagFilter = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="KEY=VALUE", help="Only those with this tag; repeatable, all must match."),
]
Published = Annotated[
    list[str] | None,
    typer.Option(
        "--publish",
        "-p",
        metavar="[ADDRESS:]HOST:GUEST[/udp]",
        help="Forward a port of this host to the guest; repeatable.",
    ),
]
Volumes = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        "-v",
        metavar="NAME:PATH[:ro]",
        help="Attach a volume, mounted at PATH; repeatable.",
        autocompletion=complete.mounts,
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Other owners may use it too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print names only.")]
