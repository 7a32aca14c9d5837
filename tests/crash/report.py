"""The report of a run of kills: JSON with every kill, and a readable page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from bench.records import HostFacts
from bench.report import describe_host
from coppice.model import Record
from crash.kills import Kill
from crash.operations import OPERATIONS
from crash.plan import MOST_BOOT_STEPS, MOST_SERVED_STEPS, MOST_STEPS


class CrashReport(Record, frozen=True, kw_only=True):
    """All kills of one test session."""

    schema: Literal["coppice.crash/2"] = "coppice.crash/2"
    host: HostFacts
    seed: int
    wall_s: float
    kills: tuple[Kill, ...]


@dataclass
class Runs:
    """The kills of a session so far, over all kinds of machines."""

    seed: int
    kills: list[Kill] = field(default_factory=list)
    host: HostFacts | None = None  # known when a real VMM ran

    def report(self, wall_s: float) -> CrashReport:
        """Return the report of a session that ran a real VMM."""
        assert self.host is not None
        return CrashReport(host=self.host, seed=self.seed, wall_s=wall_s, kills=tuple(self.kills))


def write(report: CrashReport, raw: Path, page: Path) -> None:
    """Write the JSON file and the page."""
    raw.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    page.write_text(_page(report, raw.name))


def _page(report: CrashReport, raw: str) -> str:
    died = [kill for kill in report.kills if kill.died]
    findings = [kill for kill in report.kills if kill.finding]
    found = "\n".join(
        f"* {kill.machines}: {kill.operation}, {kill.kind} {kill.at:g} ({kill.step}): {kill.finding}"
        for kill in findings
    )
    outcomes = Counter(_outcome(kill) for kill in died)
    tables = "\n".join(
        f"## {machines}\n\n{_table([kill for kill in report.kills if kill.machines == machines])}"
        for machines in dict.fromkeys(kill.machines for kill in report.kills)
    )
    return f"""# Killed hosts: the full run

Written by `make crash`. It kills host processes with SIGKILL in every operation. The VMMs continue.
It runs over QEMU machines and over the fake VMMs of the tests, which hold RAM in a file or in
anonymous memory, or speak Firecracker's API. Over those with RAM in a file it also kills `coppice serve`, in the
operations that a client can repeat: the client gets its result from the next server, and the
operation was carried out once.

It kills at every step that recovery depends on, at a quarter of the other steps, and at random
instants. Over QEMU machines it takes at most {MOST_STEPS} of these steps. In operations that take seconds there,
it takes at most {MOST_BOOT_STEPS} of the steps that recovery depends on, and in operations of a server at most {MOST_SERVED_STEPS}.

Over the fake VMMs it kills at every step of these operations, which make, merge, flatten, give back
or remove layers of memory, disks and volumes. Of the steps that one call repeats, such as one for
each port, it takes the first. The operations are
{_on_layers()}.

After each kill a new process opens the data directory, and the run checks that

* the journal is empty, and the recorded VMM is the only process that works in an instance's
  directory; no tool that the killed host has started is left;
* no directory, socket, temporary file or lock file is left, and each captured memory has as many
  links as holders;
* the template is unchanged: inode, mode, time, SHA-256;
* a volume is complete or absent, and its file has one link for each machine that uses it;
* every machine is in a state that the operation may leave, and a new one is complete or absent;
* running machines answer with their own name, and with the expected data of their memory and disk;
  machines in standby do so after a restore;
* `gc --dry-run` finds nothing.

{describe_host(report.host)}. Seed {report.seed}; {report.wall_s / 60:.0f} minutes. Every kill is in [{raw}](../benchmarks/{raw}).

**{len(died)} processes were killed, with {len(findings)} findings.** Recovery undid {outcomes["undone"]} operations and finished
{outcomes["finished"]}; after {outcomes["nothing to do"]} kills it had nothing to do. {len(report.kills) - len(died)} more processes had ended before the kill
reached them, and were checked in the same way.
{found}
{_summary(report.kills)}
{tables}
## The steps

What a process was about to do, or had just done (`committed`, `started`, `signalled`),
when it was killed.

{_steps(died)}"""


def _on_layers() -> str:
    """Return the names of the operations that are killed at every step."""
    return ", ".join(f"`{each.name}`" for each in OPERATIONS.values() if each.of_layers)


def _summary(kills: Sequence[Kill]) -> str:
    """Return one row per kind of machines."""
    lines = [
        "| machines | killed | ended before | findings | slowest opening after a kill, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for machines in dict.fromkeys(kill.machines for kill in kills):
        mine = [kill for kill in kills if kill.machines == machines]
        died = [kill for kill in mine if kill.died]
        numbers = (len(died), len(mine) - len(died), sum(kill.finding is not None for kill in mine))
        slowest = max((kill.recovery_ms for kill in died), default=0.0)
        lines.append(f"| {machines} | " + " | ".join(map(str, numbers)) + f" | {slowest:.0f} |")
    return "\n".join(lines) + "\n"


def _outcome(kill: Kill) -> str:
    if not kill.recovered:
        return "nothing to do"
    return "finished" if any(line.endswith(": finished") for line in kill.recovered) else "undone"


def _table(kills: Sequence[Kill]) -> str:
    """Return one row per operation."""
    lines = [
        "| operation | killed at a step | different steps | killed at an instant | undone | finished | nothing to recover | findings |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for operation in dict.fromkeys(kill.operation for kill in kills):
        mine = [kill for kill in kills if kill.operation == operation and kill.died]
        outcomes = Counter(_outcome(kill) for kill in mine)
        numbers = (
            sum(kill.kind == "step" for kill in mine),
            len({kill.step for kill in mine if kill.step}),
            sum(kill.kind == "instant" for kill in mine),
            outcomes["undone"],
            outcomes["finished"],
            outcomes["nothing to do"],
            sum(kill.finding is not None for kill in kills if kill.operation == operation),
        )
        lines.append(f"| {operation} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def _steps(kills: Sequence[Kill]) -> str:
    """Return each kind of step with the number of kills at it."""
    counted = Counter(kill.step.partition(" /")[0] for kill in kills if kill.step)
    lines = [
        "| step | kills |",
        "| --- | ---: |",
        *(f"| {name} | {count} |" for name, count in sorted(counted.items())),
    ]
    return "\n".join(lines) + "\n"
