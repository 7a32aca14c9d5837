"""CPU time of the client process of `coppice ls`, `tree`, `stats` and `rm --tag` over many instances.

    python -m bench.many --output benchmarks/many.json

The instances are a template and forks of it in standby, in a new data directory. Their memory is an empty
file, and no machine is started, so neither an image nor a kernel is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from bench.client_cpu import EMPTY, ClientCpuReport, coppice, measure, show
from bench.records import write_report
from coppice.model import (
    MIB,
    Capture,
    Instance,
    MachineSpec,
    Manifest,
    MemFile,
    ProcessSpec,
    Publish,
    Record,
    Sharing,
    State,
)
from coppice.names import new_id, new_name
from coppice.state.journal import JournalOperation
from coppice.state.layout import Layout
from coppice.state.store import Store
from coppice.vmm import driver as files
from coppice.vmm.process import own_process
from coppice.vmm.qemu.driver import QemuDriver

_EMPTY_LINE = {EMPTY: [sys.executable, "-c", "pass"]}
_MACHINE: Final = MachineSpec(memory_bytes=512 * MIB, overlay_bytes=1024 * MIB, kernel="debian", network="user")
_REMOVE: Final = "coppice rm --tag"
_COMMANDS: Final = {
    "coppice ls": coppice("ls"),
    "coppice ls --json": coppice("--json", "ls"),
    "coppice tree": coppice("tree"),
    "coppice stats": coppice("stats"),
    _REMOVE: coppice("rm", "--tag", "wanted=no"),
}


class ManyReport(Record, frozen=True, kw_only=True):
    """Figures by number of forks."""

    counts: dict[str, ClientCpuReport]


def record(name: str, state: State, manifest: Manifest, parent: Instance | None = None) -> Instance:
    """Return the record of a machine with a captured memory."""
    memory = MemFile(
        inode=1, device=1, size_bytes=_MACHINE.memory_bytes, sharing=Sharing.HARDLINK if parent else Sharing.OWN
    )
    return Instance(
        id=new_id(),
        name=name,
        state=state,
        created_at=time.time(),
        driver="qemu",
        image="sha256:" + "0" * 64,
        image_name="debian",
        machine=_MACHINE,
        process=ProcessSpec(),
        hostname=name,
        tags={"wanted": "yes"},
        publish=(Publish(host_port=8080, guest_port=80, host_address="own"),) if parent else (),
        parent=parent.id if parent else None,
        parent_name=parent.name if parent else None,
        capture=Capture(mem_file=memory, manifest=manifest, captured_at=time.time()),
    )


def fill(store: Store, layout: Layout, manifest: Manifest, count: int) -> None:
    """Record a template and `count` forks of it."""
    template = record("stump", State.TEMPLATE, manifest)
    forks = [record(f"fork-{number}", State.STANDBY, manifest, template) for number in range(count)]
    memory = layout.instance(template.id) / files.MEMORY
    memory.parent.mkdir()
    memory.write_bytes(b"")
    for fork in forks:
        layout.instance(fork.id).mkdir()
        (layout.instance(fork.id) / files.MEMORY).hardlink_to(memory)
    made = store.create([template, *forks], JournalOperation.RUN)
    store.finish(made, JournalOperation.RUN)


def add_unwanted(store: Store, manifest: Manifest) -> None:
    """Record the one instance that the next `rm --tag` removes."""
    unwanted = msgspec.structs.replace(
        record(new_name("unwanted"), State.STOPPED, manifest), tags={"wanted": "no"}, capture=None
    )
    store.finish(store.create([unwanted], JournalOperation.RUN), JournalOperation.RUN)


def measured(count: int, samples: int) -> ClientCpuReport:
    """Measure the commands over so many forks."""
    with tempfile.TemporaryDirectory() as temporary:
        layout = Layout(Path(temporary) / "home")
        layout.create()
        env = {**os.environ, "COPPICE_HOME": str(layout.home)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        with closing(Store(layout.database, own_process())) as store:
            manifest = asyncio.run(QemuDriver().manifest(_MACHINE))  # one that this host can load
            fill(store, layout, manifest, count)

            def prepare(name: str) -> None:
                if name == _REMOVE:
                    add_unwanted(store, manifest)

            return measure({**_EMPTY_LINE, **_COMMANDS}, samples, env, prepare=prepare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="number of forks")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    report = ManyReport(counts={str(count): measured(count, options.samples) for count in (0, options.count)})
    for count, each in report.counts.items():
        sys.stdout.write(f"{count} forks\n")
        show(each)
    if options.output:
        write_report(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
