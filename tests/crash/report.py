"""What a run of kills found, as JSON with every kill, and as a page for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from coppice.bench.records import HostFacts
from coppice.bench.report import describe_host
from coppice.model import Record
from crash.kills import Kill


class CrashReport(Record, frozen=True, kw_only=True):
    """One run."""

    schema: Literal["coppice.crash/1"] = "coppice.crash/1"
    host: HostFacts
    seed: int
    wall_s: float
    kills: tuple[Kill, ...]


def write(report: CrashReport, raw: Path, page: Path) -> None:
    """Write both."""
    raw.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    page.write_text(_page(report, raw.name))


def _page(report: CrashReport, raw: str) -> str:
    died = [kill for kill in report.kills if kill.died]
    findings = [kill for kill in report.kills if kill.finding]
    slowest = max((kill.recovery_ms for kill in died), default=0.0)
    outcomes = Counter(_outcome(kill) for kill in died)
    found = "\n".join(f"* {kill.operation}, {kill.kind} {kill.at:g} ({kill.step}): {kill.finding}" for kill in findings)
    quiet = outcomes["nothing to do"]
    return f"""# Killed hosts: the full run

Written by `make crash`. It kills host processes (SIGKILL; the VMMs live on) in every operation over real machines: at every step that recovery decides
by, at a quarter of the other steps, and at random instants; where an operation boots a machine, at some of them. After each kill a new process opens the
data directory, and it is checked that

* the journal is empty, and no process works in an instance's directory but the VMM that is recorded;
* no directory, socket, temporary file or lock file is left, and each captured memory has as many links as it has holders;
* the template is as it was: inode, mode, time, SHA-256;
* a volume is whole or absent, and its file has one link for each machine that has it;
* every machine is in a state that the operation may leave, and a new one is whole or absent;
* those that run answer with their own name, and with what their memory and their disk know; those in standby do so after a restore;
* `gc --dry-run` finds nothing.

{describe_host(report.host)}. Seed {report.seed}; {report.wall_s / 60:.0f} minutes. Every kill is in [{raw}](../benchmarks/{raw}).

**{len(died)} host processes were killed, with {len(findings)} findings.** {len(report.kills) - len(died)} more had ended before the kill reached them, and
were checked alike. Recovery undid {outcomes["undone"]} operations and finished {outcomes["finished"]}; after {quiet} kills there was nothing to recover.
The slowest opening of a data directory after a kill took {slowest:.0f} ms.
{found}
{_table(report.kills)}
## The steps

What a process was about to do, or had just done (`committed`, `started`, `signalled`), when it was killed.

{_steps(died)}"""


def _outcome(kill: Kill) -> str:
    if not kill.recovered:
        return "nothing to do"
    return "finished" if any(line.endswith(": finished") for line in kill.recovered) else "undone"


def _table(kills: Sequence[Kill]) -> str:
    """One row per operation."""
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
    """Where they were killed: each kind of step with how often."""
    counted = Counter(kill.step.partition(" /")[0] for kill in kills if kill.step)
    lines = [
        "| step | kills |",
        "| --- | ---: |",
        *(f"| {name} | {count} |" for name, count in sorted(counted.items())),
    ]
    return "\n".join(lines) + "\n"
