"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

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
KernelKey = Annotated[
    str, typer.Argument(metavar="KEY", help="Key of a kernel, as `ls` has it.", autocompletion=complete.kernels)
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
        help="Forward a port of this host to the guest; repeatable. HOST `auto`: any that is free. ADDRESS: 127.0.0.1 if left out; `own`: each has another.",
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--count", "-n", help="How many forks to grow, in parallel. Default: as many as names or payloads, else 1."
    ),
]
ForkNames = Annotated[
    list[str] | None,
    typer.Option(
        "--name", help="Name of a fork; repeatable. One name for several forks is numbered. Default: generated."
    ),
]
Target = Annotated[Literal["running", "standby", "stopped"], typer.Option("--target", help="What the forks become.")]
Atomic = Annotated[bool, typer.Option("--atomic", help="All or none: one failure undoes all.")]
Payload = Annotated[
    str | None,
    typer.Option(
        "--payload",
        metavar="FILE|JSON",
        help="What each fork finds in /run/coppice/payload; `-`: standard input. Others can see the words of a command, so put secrets into a file.",
    ),
]
Payloads = Annotated[
    str | None,
    typer.Option(
        "--payloads",
        metavar="FILE",
        help="A payload for each fork: a JSON array, or one JSON document in each line; `-`: standard input.",
    ),
]
Volumes = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        "-v",
        metavar="NAME:PATH[:ro]",
        help="Attach a volume, mounted at PATH (`:ro`: to read only); repeatable.",
        autocompletion=complete.mounts,
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Other owners may use it too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print names only.")]
