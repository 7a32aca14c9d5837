"""Tables of results for the terminal, with ratios."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.records import CaptureBenchReport, CaptureSummary, FanOutReport, FanOutSummary, HostFacts, Method, TreeReport
from coppice.model import GIB, MIB


def describe_host(facts: HostFacts) -> str:
    """Return one line about the host and the run."""
    load = facts.load_average[0]
    return (
        f"{facts.cpu_model}, {facts.cpu_threads} threads, {facts.ram_bytes / GIB:.0f} GiB; Linux {facts.kernel}; {facts.driver} "
        f"{facts.vmm_version}, {facts.accel}; {facts.filesystem}; load {load:.1f}; coppice {facts.coppice_version}; {facts.date}"
    )


def ratio_to_shared(summary: Sequence[FanOutSummary], row: FanOutSummary) -> float | None:
    """Return the time to an answer divided by that of the same run's shared fork; None for that
    itself.
    """
    if row.method is Method.SHARED:
        return None
    for other in summary:
        same = (other.count, other.memory_bytes, other.cache) == (row.count, row.memory_bytes, row.cache)
        if same and other.method is Method.SHARED:
            return row.answered_ms.p50 / other.answered_ms.p50
    return None


def fan_out_table(report: FanOutReport) -> Table:
    """One row per case."""
    table = Table(title="Until a command inside has answered", caption=describe_host(report.host))
    for heading in ("RAM", "N", "method", "cache"):
        table.add_column(heading)
    for heading in (
        "p50 ms", "p90", "p99", "wall ms", "CPU ms VMM", "CPU ms host", "own MiB", "own MiB worked", "disk MiB", "x shared",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    following = [*report.summary[1:], None]
    for row, after in zip(report.summary, following, strict=True):
        ratio = ratio_to_shared(report.summary, row)
        table.add_row(
            size_text(row.memory_bytes),
            str(row.count),
            row.method,
            "-" if row.method is Method.COLD else row.cache,
            f"{row.answered_ms.p50:.0f}",
            f"{row.answered_ms.p90:.0f}",
            f"{row.answered_ms.p99:.0f}",
            *cost_cells(row),
            f"{ratio:.1f}" if ratio is not None else "",
            end_section=after is not None and (after.memory_bytes, after.count) != (row.memory_bytes, row.count),
        )
    return table


def cost_cells(row: FanOutSummary) -> tuple[str, ...]:
    """Return the cells of a case's times and bytes."""
    return (
        f"{row.wall_ms.p50:.0f}",
        f"{row.vmm_cpu_ms.p50:.0f}",
        f"{row.host_cpu_ms.p50:.0f}",
        f"{row.unique_ready_bytes.p50 / MIB:.1f}",
        f"{row.unique_worked_bytes.p50 / MIB:.1f}",
        f"{row.disk_written_bytes.p50 / MIB:.1f}",
    )


def capture_cells(row: CaptureSummary) -> tuple[str, ...]:
    """Return the cells of a case's pauses and bytes."""
    return (
        f"{row.pause_ms.p50:.1f}",
        f"{row.pause_ms.p99:.1f}",
        f"{row.total_ms.p50:.0f}",
        f"{row.total_ms.p99:.0f}",
        f"{row.dirty_bytes.p50 / MIB:.1f}",
        f"{row.ram_written_bytes.p50 / MIB:.1f}",
        str(row.pause_ms.samples),
    )


def capture_table(report: CaptureBenchReport) -> Table:
    """One row per case."""
    table = Table(title="Standby", caption=describe_host(report.host))
    for heading in ("RAM", "source"):
        table.add_column(heading)
    for heading in (
        "dirtied MiB",
        "pause ms p50",
        "p99",
        "total ms p50",
        "p99",
        "found dirty MiB",
        "RAM written MiB",
        "samples",
    ):
        table.add_column(heading, justify="right")
    for row in report.summary:
        table.add_row(
            size_text(row.memory_bytes),
            row.source,
            str(row.dirtied_bytes // MIB) if row.source == "fork" else "-",
            *capture_cells(row),
        )
    return table


def tree_table(report: TreeReport) -> Table:
    """One row per level, and one per tree."""
    table = Table(
        title=f"A tree, {report.dirtied_bytes // MIB} MiB dirtied per level", caption=describe_host(report.host)
    )
    for heading in ("RAM", "memory", "level"):
        table.add_column(heading)
    for heading in (
        "dirty MiB", "written MiB", "x dirty", "fork ms", "answered ms", "pause ms", "capture ms", "extents",
        "disk MiB", "page cache MiB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for tree in report.trees:
        for level in tree.levels:
            table.add_row(
                size_text(tree.memory_bytes),
                tree.method,
                str(level.number),
                f"{level.dirty_bytes / MIB:.1f}",
                f"{level.written_bytes / MIB:.1f}",
                f"{level.written_bytes / level.dirty_bytes:.2f}",
                f"{level.fork_ms:.0f}",
                f"{level.answered_ms:.0f}",
                f"{level.pause_ms:.1f}",
                f"{level.capture_ms:.0f}",
                str(level.extents),
                f"{level.file_bytes / MIB:.1f}",
                "",
            )
        base = f"base {tree.base_bytes / MIB:.0f} MiB"
        cells = [""] * 8
        table.add_row(
            size_text(tree.memory_bytes), tree.method, f"all, {base}", *cells, f"{tree.disk_bytes / MIB:.1f}",
            f"{tree.cached_bytes / MIB:.1f}", end_section=True,
        )  # fmt: skip
    return table


def size_text(size_bytes: int) -> str:
    """Return a RAM size as text."""
    return f"{size_bytes // GIB} GiB" if size_bytes % GIB == 0 else f"{size_bytes // MIB} MiB"
