"""Commands about what a server does by itself with an instance: automatic standbys and scheduled snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import format, options, output, parse
from coppice.cli.context import Cli
from coppice.cli.declare import Commands, Option

if TYPE_CHECKING:
    from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule

auto_standby_app = Commands("auto-standby", help="See when an idle instance is put into standby, and hold that off.")
schedule_app = Commands("schedule", help="Let a server take snapshots again and again, and remove old ones.")


@auto_standby_app.declare("status")
def status(ctx: click.Context, name: options.Name) -> None:
    """Show when an instance is put into standby, and what keeps it awake.

    Set the policy with --auto-standby of run or update.
    """
    from coppice.requests import AutoStandbyRequest

    cli = Cli.of(ctx)
    found = cli.request(AutoStandbyRequest(instance=name))
    cli.show(found, lambda: output.fields(_status(found)))


@auto_standby_app.declare("hold")
def hold(ctx: click.Context, name: options.Name) -> None:
    """Keep an instance from an automatic standby for its idle time, from now on.

    Then a connection finds it running. It is refused (exit status 4) if the instance is in standby already.
    """
    from coppice.requests import AutoStandbyHoldRequest

    cli = Cli.of(ctx)
    found = cli.request(AutoStandbyHoldRequest(instance=name))
    cli.show(found, lambda: output.fields(_status(found)))


def _status(found: AutoStandbyStatus) -> list[tuple[str, str]]:
    use = ["in use"] if found.in_use else []
    if found.connections:
        use.append(format.count(found.connections, "connection"))
    return [
        ("Status", found.status.replace("_", " ")),
        ("Idle time", f"{found.idle_timeout_s:g} s" if found.idle_timeout_s else ""),
        ("Awake", ", ".join(use)),
        ("Idle since", format.moment(found.idle_since) if found.idle_since else ""),
        ("Standby at", format.moment(found.standby_at) if found.standby_at else ""),
        ("Held until", format.moment(found.hold_until) if found.hold_until else ""),
    ]


@schedule_app.declare("set")
def set_(
    ctx: click.Context,
    name: options.Name,
    every: Annotated[str, Option("--every", metavar="TIME", help="Between two snapshots, such as 1h; at least 1m.")],
    keep: Annotated[
        int | None, Option("--keep", metavar="N", min=1, help="Keep the newest N of its scheduled snapshots.")
    ] = None,
    max_age: Annotated[
        str | None,
        Option(
            "--max-age",
            metavar="TIME",
            help="Remove its scheduled snapshots after this time, also when the instance is removed.",
        ),
    ] = None,
    prefix: Annotated[
        str | None, Option("--prefix", help="Beginning of the snapshots' names. Default: the instance's name.")
    ] = None,
    tag: Annotated[
        list[str] | None, Option("--tag", metavar="KEY=VALUE", help="A tag for its snapshots; repeatable.")
    ] = None,
) -> None:
    """Let a server take snapshots of an instance at an interval; print the time of the next one.

    --keep or --max-age is needed. A Running instance is paused for each snapshot. This replaces the schedule
    that the instance has.
    """
    from coppice.requests import SnapshotScheduleSetRequest

    cli = Cli.of(ctx)
    made = cli.request(
        SnapshotScheduleSetRequest(
            instance=name,
            interval_s=parse.duration(every),
            max_count=keep,
            max_age_s=parse.ttl(max_age),
            name_prefix=prefix,
            tags=parse.pairs(tag or (), "tag"),
        )
    )
    cli.show(made, lambda: output.line(format.moment(made.next_run_at)))
    options.warn_without_server(cli, "the schedule")


@schedule_app.declare("show")
def show(ctx: click.Context, name: options.Name) -> None:
    """Show the snapshot schedule of an instance, and its latest run."""
    from coppice.requests import SnapshotScheduleRequest

    cli = Cli.of(ctx)
    found = cli.request(SnapshotScheduleRequest(instance=name))
    cli.show(found, lambda: output.fields(_schedule(found)))


def _schedule(found: SnapshotSchedule) -> list[tuple[str, str]]:
    limits = [f"the newest {found.max_count}"] if found.max_count else []
    if found.max_age_s:
        limits.append(f"for {found.max_age_s:g} s")
    return [
        ("Every", f"{found.interval_s:g} s"),
        ("Kept", ", ".join(limits)),
        ("Prefix", found.name_prefix),
        ("Tags", format.tags(found.tags) if found.tags else ""),
        ("Next", format.moment(found.next_run_at)),
        ("Latest", format.moment(found.last_run_at) if found.last_run_at else ""),
        ("Snapshot", found.last_snapshot or ""),
        ("Error", found.last_error),
    ]


@schedule_app.declare("rm")
def rm(ctx: click.Context, name: options.Name) -> None:
    """Take no further scheduled snapshots of an instance. Those that exist stay."""
    from coppice.requests import SnapshotScheduleRmRequest

    cli = Cli.of(ctx)
    cli.request(SnapshotScheduleRmRequest(instance=name))
    cli.show({"removed": name}, lambda: None)
