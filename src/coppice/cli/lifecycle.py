"""Commands that change an instance: run, start, stop, standby, restore, promote, update, rm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from coppice.cli import complete, format, options, output, parse, several
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option
from coppice.errors import CoppiceError, NotFound, UsageError

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import CaptureReport, EgressReport, Instance


def run(
    ctx: click.Context,
    image: options.ImageName,
    policies: options.PolicyOptions,
    command: Annotated[
        list[str] | None,
        Argument(metavar="COMMAND", help="After `--`: replaces the image's command; its entrypoint stays."),
    ] = None,
    *,
    entrypoint: Annotated[
        str | None,
        Option(
            "--entrypoint",
            metavar="PROGRAM",
            help="Replaces the image's entrypoint and command; COMMAND is its arguments.",
        ),
    ] = None,
    name: Annotated[str | None, Option("--name", help="Name of the instance. Default: generated.")] = None,
    cpus: Annotated[int, Option("--cpus", help="Virtual CPUs.")] = 1,
    memory: Annotated[str, Option("--memory", "-m", metavar="SIZE", help="RAM, such as 512M or 2G.")] = "512M",
    overlay: Annotated[str, Option("--overlay", metavar="SIZE", help="Size of its own writable disk.")] = "2G",
    env: options.Env = None,
    env_file: Annotated[
        list[Path] | None,
        Option("--env-file", metavar="FILE", help="A file of variables, one KEY=VALUE per line; repeatable."),
    ] = None,
    workdir: Annotated[
        str | None, Option("--workdir", "-w", metavar="DIR", help="Working directory of its process.")
    ] = None,
    user: Annotated[str | None, Option("--user", "-u", help="User of its process: a name, UID, or UID:GID.")] = None,
    hostname: Annotated[
        str | None, Option("--hostname", help="The guest's host name. Default: the name of the instance.")
    ] = None,
    tag: options.Tags = None,
    publish: options.Published = None,
    network: Annotated[
        str | None,
        Option(
            "--network",
            metavar="nat|user|passt|none",
            help="Its network. nat: its own subnet with an egress policy; none: no NIC. Default: nat if this host can "
            "provide it, else user. Also set by COPPICE_NETWORK.",
        ),
    ] = None,
    vmm: Annotated[
        str | None, Option("--vmm", metavar="NAME", help="Its VMM: qemu or firecracker. Default: the host's.")
    ] = None,
    egress: options.Egress = None,
    memory_limit: options.MemoryLimit = None,
    cpu_limit: options.CpuLimit = None,
    pids_limit: options.PidsLimit = None,
    io_limit: options.IoLimit = None,
    volume: options.Volumes = None,
    ca: options.Authorities = None,
    proxy: Annotated[
        str | None,
        Option("--proxy", metavar="URL", help="HTTP proxy of its programs, as http_proxy, https_proxy and their like."),
    ] = None,
    kernel: Annotated[
        str | None,
        Option(
            "--kernel",
            metavar="KEY|PATH",
            help="The key of an added kernel, or the path of one (see `coppice kernel add`).",
            autocompletion=complete.kernels,
        ),
    ] = None,
    modules: Annotated[
        Path | None,
        Option("--modules", metavar="DIR", help="The modules of the kernel: .../lib/modules/VERSION."),
    ] = None,
    pull: Annotated[
        Literal["missing", "always", "never"],
        Option(
            "--pull",
            help="When to pull the image. missing: if it is missing and its name begins with a registry, as in "
            "docker.io/library/alpine.",
        ),
    ] = "missing",
    notify: options.Notify = None,
    no_start: Annotated[bool, Option("--no-start", help="Make the instance, but do not boot it.")] = False,
    wait: Annotated[
        str | None,
        Option("--wait", metavar="TIME", help="Then wait up to TIME, such as 60s, until its health check succeeds."),
    ] = None,
    detach: options.Detach = False,
) -> None:
    """Make an instance of an image and boot it; print its name.

    Return when the guest has answered, or with --wait its service. The first run fetches a kernel.
    Options go before `--`, the command after it.
    """
    from coppice.names import parse_size
    from coppice.requests import KernelAddRequest, ReadyRequest, RunRequest

    del detach
    cli = Cli.of(ctx)
    patience_s = None if wait is None else parse.duration(wait)
    if patience_s is not None and (no_start or policies.health in (None, "none")):
        raise UsageError("--wait needs --health, and a machine that starts", hint="add --health http:80/")
    if modules is not None and kernel is None:
        raise UsageError("--modules needs --kernel", hint="add --kernel PATH")
    memory_bytes, overlay_bytes = parse_size(memory), parse_size(overlay)
    environment = parse.environment(env or (), env_file or ())
    tags, ports = parse.pairs(tag or (), "tag"), parse.publish(publish or ())
    volumes, authorities = parse.volumes(volume or ()), parse.certificates(ca)

    if kernel is not None and (modules is not None or "/" in kernel):
        added = KernelAddRequest(kernel=kernel, modules=None if modules is None else str(modules))
        kernel = cli.request(added).key
    instance = cli.request(
        RunRequest(
            image=image,
            command=command or (),
            entrypoint=None if entrypoint is None else [entrypoint],
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
            network=parse.network(network),
            vmm=vmm,
            egress=parse.egress(egress),
            limits=parse.limits(memory_limit, cpu_limit, pids_limit, io_limit),
            volumes=volumes,
            certificates=authorities,
            proxy=proxy,
            notify=parse.endpoint(notify),
            kernel=kernel,
            start=not no_start,
            pull=pull,
            **policies.policies(),
        )
    )
    if patience_s is not None:
        cli.request(ReadyRequest(instance=instance.id, deadline_s=patience_s))
    cli.show(instance, lambda: output.line(instance.name))
    policies.warn_without_server(cli)


def start(
    ctx: click.Context,
    names: options.Names,
    command: Annotated[
        str | None,
        Option("--command", metavar="WORDS", help="Another command, from now on; the image's entrypoint stays."),
    ] = None,
    entrypoint: Annotated[
        str | None,
        Option("--entrypoint", metavar="PROGRAM", help="Another entrypoint, from now on; --command is its arguments."),
    ] = None,
    ttl: options.Ttl = None,
    on_expiry: options.OnExpiry = None,
) -> None:
    """Boot Stopped instances from their disks."""
    from coppice.requests import StartRequest

    ttl_s = parse.ttl(ttl)
    words = None if command is None else parse.words(command)
    first = None if entrypoint is None else [entrypoint]
    several.change(
        Cli.of(ctx),
        names,
        lambda name: StartRequest(instance=name, command=words, entrypoint=first, ttl_s=ttl_s, on_expiry=on_expiry),
        several.is_now,
    )


def ready(
    ctx: click.Context,
    names: options.Names,
    timeout: Annotated[
        str, Option("--timeout", metavar="TIME", help="Fail if a service does not answer in this time.")
    ] = "60s",
) -> None:
    """Wait until the services of Running instances answer: each health check has succeeded.

    `coppice fork SOURCE -n 4 -q --health http:80/ | xargs coppice ready` waits for forks.
    """
    from coppice.requests import ReadyRequest

    deadline_s = parse.duration(timeout)
    several.change(
        Cli.of(ctx),
        names,
        lambda name: ReadyRequest(instance=name, deadline_s=deadline_s),
        lambda instance: f"{instance.name} is ready",
    )


def update(ctx: click.Context, names: options.Names, policies: options.PolicyOptions) -> None:
    """Change the policies of instances, in any state. What is not given stays as it is.

    A server carries policies out (`coppice serve`). Without one, the next command ends the machines
    whose lifetime is over.
    """
    from coppice.requests import UpdateRequest

    given = policies.policies()
    several.change(
        Cli.of(ctx),
        names,
        lambda name: UpdateRequest(instance=name, **given),
        lambda changed: f"{changed.name}: {format.policies(changed.supervision) or 'no policies'}",
    )
    policies.warn_without_server(Cli.of(ctx))


def stop(
    ctx: click.Context,
    names: options.Names,
    grace: Annotated[
        float | None,
        Option(
            "--grace",
            "--time",
            "-t",
            metavar="SECONDS",
            help="Time for the guest to power off. 0: end it at once. Default: 30.",
        ),
    ] = None,
) -> None:
    """Power off guests. After the grace period, end them. Their memory is lost; their disks are
    kept.
    """
    from coppice.requests import StopRequest

    several.change(Cli.of(ctx), names, lambda name: StopRequest(instance=name, grace_s=grace), several.is_now)


def standby(ctx: click.Context, names: options.Names) -> None:
    """Capture Running instances and end their VMM processes.

    They hold no RAM until `restore` continues them.
    """
    from coppice.requests import StandbyRequest

    several.change(
        Cli.of(ctx),
        names,
        lambda name: StandbyRequest(instance=name),
        lambda done: several.is_now(done.instance) + _cost(done.capture),
    )


def _cost(capture: CaptureReport) -> str:
    if not capture.total_ms:
        return ""
    return (
        f" (paused for {format.duration(capture.pause_ms)}, {format.duration(capture.total_ms)} in all, "
        f"{format.size(capture.ram_bytes_written)} of RAM written)"
    )


def restore(ctx: click.Context, names: options.Names) -> None:
    """Continue Standby instances from their captured memory, or Running ones that a full disk has
    paused.
    """
    from coppice.requests import RestoreRequest

    several.change(Cli.of(ctx), names, lambda name: RestoreRequest(instance=name), several.is_now)


def promote(
    ctx: click.Context,
    names: options.Names,
    public: Annotated[
        bool | None,
        Option("--public/--private", help="Whether other owners may also fork it, and so share its memory."),
    ] = None,
    notify: options.Notify = None,
) -> None:
    """Make Standby instances Templates, which can only be forked. `demote` reverses it.

    It warns of processes whose random numbers all forks would share.
    """
    from coppice.requests import PromoteRequest

    to = parse.endpoint(notify)

    def line(template: Instance) -> str:
        output.warn_of_shared_random(template.name, template.shared_random)
        return several.is_now(template)

    several.change(Cli.of(ctx), names, lambda name: PromoteRequest(instance=name, public=public, notify=to), line)


def demote(
    ctx: click.Context,
    names: Annotated[
        list[str], Argument(metavar="NAME", help="Names or ids of templates.", autocompletion=complete.templates)
    ],
) -> None:
    """Make Templates Standby instances again. Refused while they have forks."""
    from coppice.requests import DemoteRequest

    several.change(Cli.of(ctx), names, lambda name: DemoteRequest(instance=name), several.is_now)


def egress(
    ctx: click.Context,
    name: options.Name,
    policy: Annotated[
        str | None,
        Argument(metavar="none|all|allow=LIST", help="The new policy. Default: show the current one."),
    ] = None,
) -> None:
    """Show or change the egress policy of a guest on the network `nat`, in any state.

    Also show the refused destinations. LIST is comma-separated: networks, such as 192.0.2.0/24, and
    names, such as example.org or *.example.org.
    """
    from coppice.requests import EgressRequest

    cli = Cli.of(ctx)
    report = cli.request(EgressRequest(instance=name, policy=parse.egress(policy)))
    cli.show(report, lambda: _show_egress(report))


def _show_egress(report: EgressReport) -> None:
    output.line(
        f"{format.egress(report.policy)}: {report.passed_packets} packets passed, {report.refused_packets} refused"
    )
    for each in report.refused:
        output.line(f"  refused {output.printable(each.what)} ({each.count})")


def rm(
    ctx: click.Context,
    names: Annotated[
        list[str] | None,
        Argument(metavar="NAME", help="Names or ids of instances.", autocompletion=complete.instances),
    ] = None,
    tag: options.TagFilter = None,
    everything: Annotated[bool, Option("--all", help="All instances; needs --yes.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Confirm --all.")] = False,
    force: options.Force = False,
) -> None:
    """Remove instances in any state, also running ones: by name, by tag, or all. Forks go before
    their sources.

    If one cannot be removed, the others still are. The exit status is then that of the first
    failure.
    """
    cli = Cli.of(ctx)
    if sum((bool(names), bool(tag), everything)) != 1:
        raise UsageError("rm needs names, a tag or --all", hint="give names, or --tag KEY=VALUE, or --all --yes")
    if everything and not yes:
        raise UsageError("--all removes every instance of this data directory", hint="add --yes to confirm")
    tags = parse.pairs(tag or (), "tag")

    async def work(host: Backend) -> tuple[list[str], dict[str, CoppiceError]]:
        from coppice.completion import each_of
        from coppice.requests import GetRequest, LsRequest, RmRequest

        failed: dict[str, CoppiceError] = {}
        found: dict[str, Instance] = {}
        for name in dict.fromkeys(names or ()):
            try:
                instance = await host.call(GetRequest(instance=name))
                found[instance.id] = instance
            except CoppiceError as error:
                if not (force and isinstance(error, NotFound)):
                    failed[name] = error
        if not names:
            found = {instance.id: instance for instance in await host.call(LsRequest(tags=tags))}
        removed: list[str] = []
        for generation in _youngest_first(found):
            outcomes = await each_of(host.call(RmRequest(instance=instance.id)) for instance in generation)
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
    """Group instances into generations, forks before their sources.

    Removals in the same generation do not wait for each other.
    """
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
