"""Arguments and options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from coppice.cli import complete, output, parse
from coppice.cli.declare import Argument, Option, Values
from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.cli.context import Cli
    from coppice.requests import FanOut

F = TypeVar("F", bound="FanOut")

Name = Annotated[str, Argument(metavar="NAME", help="Name or id of an instance.", autocompletion=complete.instances)]
Names = Annotated[
    list[str], Argument(metavar="NAME", help="Names or ids of instances.", autocompletion=complete.instances)
]
ImageNames = Annotated[
    list[str], Argument(metavar="IMAGE", help="Names or digests of images.", autocompletion=complete.images)
]
ImageName = Annotated[
    str, Argument(metavar="IMAGE", help="Name or digest of an image.", autocompletion=complete.images)
]
KernelKeys = Annotated[
    list[str], Argument(metavar="KEY", help="Keys of kernels, as `ls` prints them.", autocompletion=complete.kernels)
]
Tags = Annotated[list[str] | None, Option("--tag", metavar="KEY=VALUE", help="A tag for it; repeatable.")]
TagFilter = Annotated[
    list[str] | None,
    Option("--tag", metavar="KEY=VALUE", help="Only with this tag; repeatable, all must match."),
]
Published = Annotated[
    list[str] | None,
    Option(
        "--publish",
        "-p",
        metavar="[ADDRESS:]HOST:GUEST[/udp]",
        help="Forward a port of this host to the guest; repeatable. HOST `auto`: any free port. "
        "ADDRESS: default 127.0.0.1; `own`: an address of the machine's own.",
    ),
]
Egress = Annotated[
    str | None,
    Option(
        "--egress",
        metavar="none|all|allow=LIST",
        help="Destinations that the guest may reach (--network nat). LIST: comma-separated networks and names. "
        "Default: all, or the source's policy.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    Option(
        "--memory-limit",
        metavar="SIZE",
        help="The most RAM that the VMM may use, with that of the guest; more ends it. 0: no limit.",
    ),
]
CpuLimit = Annotated[
    float | None, Option("--cpu-limit", metavar="CPUS", help="The most CPU time, such as 0.5 or 2. 0: no limit.")
]
PidsLimit = Annotated[int | None, Option("--pids-limit", metavar="N", help="The most threads of the VMM. 0: no limit.")]
IoLimit = Annotated[
    str | None,
    Option(
        "--io-limit",
        metavar="SIZE",
        help="The most bytes per second read from the disk, and as many written. 0: no limit.",
    ),
]
Ttl = Annotated[
    str | None,
    Option("--ttl", metavar="TIME", help="Lifetime from now, such as 90s, 15m, 8h or 30d; 0s: no end."),
]
OnExpiry = Annotated[
    Literal["remove", "standby", "stop"] | None,
    Option("--on-expiry", help="What happens at the end of its lifetime. Default: remove."),
]
Count = Annotated[
    int | None,
    Option("--count", "-n", help="How many forks to grow, in parallel. Default: one per payload or name, else 1."),
]
ForkNames = Annotated[
    list[str] | None,
    Option("--name", help="Name of a fork; repeatable. One name for several forks is numbered. Default: generated."),
]
Target = Annotated[Literal["running", "standby", "stopped"], Option("--target", help="State of the forks.")]
Vmm = Annotated[
    str | None,
    Option(
        "--vmm",
        metavar="NAME",
        help="VMM of the forks. Default: the source's. Another VMM cannot use the source's memory: it needs a Stopped "
        "source, or --target stopped.",
    ),
]
Atomic = Annotated[bool, Option("--atomic", help="All or none: a failure undoes all forks.")]
Payload = Annotated[
    str | None,
    Option(
        "--payload",
        metavar="FILE|JSON",
        help="Written to /run/coppice/payload in each fork; `-`: standard input. Put secrets into a file: other "
        "users can see the words of a command.",
    ),
]
Payloads = Annotated[
    str | None,
    Option(
        "--payloads",
        metavar="FILE",
        help="One payload per fork: a JSON array, or one JSON document per line; `-`: standard input.",
    ),
]


Notify = Annotated[
    str | None,
    Option(
        "--notify",
        metavar="PORT|unix:PATH|none",
        help="Address of a warm process that is to know of each fork, by POST /coppice/fork with the payload. "
        "Default: none; a fork: its source's.",
    ),
]


def refuse_one_name(name: str | None, sources: Sequence[str]) -> None:
    """Refuse one name for the results of several sources.

    :raises UsageError: there are a name and several sources
    """
    if name is not None and len(sources) > 1:
        raise UsageError(
            f"--name {name} is one name for {len(sources)} results", hint="omit --name, or name one source"
        )


def warn_without_server(cli: "Cli", what: str) -> None:
    """Print that nothing carries something out, if only a server can and none runs."""
    from coppice.state import locks
    from coppice.state.layout import Layout, data_directory

    if cli.server is not None:
        return
    layout = Layout(data_directory(cli.home))
    for owner in {None, cli.owner}:
        lock = layout.supervisor_lock(owner)
        descriptor = locks.try_lock(lock, shared=True, create=False) if lock.exists() else -1
        if descriptor is None:
            return
        if descriptor >= 0:
            locks.release(descriptor)
    output.complain(f"no server runs on {layout.home}, so nothing carries out {what} yet")
    output.complain("hint: run `coppice serve` there")


class PolicyOptions(Values):
    """The options of every command that sets policies."""

    ttl: Ttl = None
    on_expiry: OnExpiry = None
    restart: Annotated[
        str | None,
        Option(
            "--restart",
            metavar="never|on-failure[:N]|always[:N]",
            help="When a server starts it again after it ended by itself, N times in a row at most.",
        ),
    ] = None
    restart_delay: Annotated[
        str | None,
        Option(
            "--restart-delay", metavar="TIME", help="Before the first attempt; twice as long each time. Default: 1s."
        ),
    ] = None
    health: Annotated[
        str | None,
        Option(
            "--health",
            metavar="exec:COMMAND|tcp:PORT|http:PORT[/PATH]|log:TEXT|none",
            help="How a server, or `ready`, checks its health. PORT is of the guest's own loopback, TEXT a part of a "
            "line of the console.",
        ),
    ] = None
    health_interval: Annotated[
        str | None, Option("--health-interval", metavar="TIME", help="Between two checks. Default: 30s.")
    ] = None
    health_timeout: Annotated[
        str | None, Option("--health-timeout", metavar="TIME", help="Of each check. Default: 5s.")
    ] = None
    health_retries: Annotated[
        int | None,
        Option("--health-retries", metavar="N", min=1, help="Failures in a row that make it unhealthy. Default: 3."),
    ] = None
    health_start_period: Annotated[
        str | None, Option("--health-start-period", metavar="TIME", help="In which failures do not count.")
    ] = None
    restart_unhealthy: Annotated[
        bool, Option("--restart-unhealthy", help="An unhealthy machine is a failed one for --restart.")
    ] = False
    auto_standby: Annotated[
        str | None,
        Option(
            "--auto-standby",
            metavar="TIME",
            help="A server puts it into standby after this time without a command, copy or connection to a published "
            "port, and wakes it at the next connection; 0s: never.",
        ),
    ] = None

    def policies(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return {
            "ttl_s": parse.ttl(self.ttl),
            "on_expiry": self.on_expiry,
            "restart": parse.restart(self.restart, self.restart_delay),
            "health_check": parse.health(
                self.health,
                interval=self.health_interval,
                timeout=self.health_timeout,
                failures=self.health_retries,
                start_period=self.health_start_period,
                restart=self.restart_unhealthy,
            ),
            "auto_standby_s": parse.ttl(self.auto_standby),
        }

    def warn_without_server(self, cli: "Cli") -> None:
        """Print that nothing carries the policies out, if only a server can and none runs."""
        restarts, rests = self.restart not in (None, "never"), bool(parse.ttl(self.auto_standby))
        given = [f"--{name}" for name, wanted in (("restart", restarts), ("auto-standby", rests)) if wanted]
        if given:
            warn_without_server(cli, " and ".join(given))


class ForkOptions(PolicyOptions):
    """The options of every command that grows forks. They correspond to the fields of `FanOut`; memory is always measured."""

    count: Count = None
    name: ForkNames = None
    target: Target = "running"
    atomic: Atomic = False
    payload: Payload = None
    payloads: Payloads = None
    notify: Notify = None
    vmm: Vmm = None
    tag: Tags = None
    publish: Published = None
    egress: Egress = None
    memory_limit: MemoryLimit = None
    cpu_limit: CpuLimit = None
    pids_limit: PidsLimit = None
    io_limit: IoLimit = None

    def request(self, kind: type[F], **source: Any) -> F:
        """Return a request of that kind for forks of a source."""
        from coppice.model import State

        shared, each = parse.forks_payloads(self.payload, self.payloads)
        return kind(
            count=parse.fork_count(self.count, each, self.name or ()),
            names=self.name or (),
            target=State(self.target.capitalize()),
            atomic=self.atomic,
            vmm=self.vmm,
            payload=shared,
            payloads=each,
            notify=parse.endpoint(self.notify),
            tags=parse.pairs(self.tag or (), "tag"),
            publish=parse.publish(self.publish or ()),
            egress=parse.egress(self.egress),
            limits=parse.limits(self.memory_limit, self.cpu_limit, self.pids_limit, self.io_limit),
            measure=self.target == "running",
            **self.policies(),
            **source,
        )


Env = Annotated[
    list[str] | None,
    Option(
        "--env",
        "-e",
        metavar="KEY=VALUE",
        help="A variable; repeatable. KEY alone: with its value in your environment.",
    ),
]
Authorities = Annotated[
    list[Path] | None,
    Option(
        "--ca",
        metavar="FILE",
        help="A PEM file of certificates to trust besides those of the image, such as a company's; repeatable.",
    ),
]
Volumes = Annotated[
    list[str] | None,
    Option(
        "--volume",
        "-v",
        metavar="NAME:PATH[:ro]",
        help="Attach a volume and mount it at PATH (`:ro`: read-only); repeatable.",
        autocompletion=complete.mounts,
    ),
]
Public = Annotated[bool, Option("--public", help="Other owners may also use it.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print names only.")]

Force = Annotated[bool, Option("--force", "-f", help="A missing name is no error.")]

# Options that users of other programs type. They have no effect, because this is the behaviour
# anyway.
Detach = Annotated[bool, Option("--detach", "-d", hidden=True, help="Machines always run in the background.")]
All = Annotated[bool, Option("--all", "-a", hidden=True, help="All are listed anyway.")]
Once = Annotated[bool, Option("--no-stream", hidden=True, help="The figures are printed once anyway.")]
Recursive = Annotated[bool, Option("--recursive", "-r", "-R", hidden=True, help="Directories are copied anyway.")]
