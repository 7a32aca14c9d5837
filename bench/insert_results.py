"""Insert the committed benchmark results into README.md, docs/benchmarks.md and the recipes.

python -m bench.insert_results           write the pages
python -m bench.insert_results --check   only list outdated pages; exit status 1 if any is

A page marks the place of a table by `<!-- results: NAME -->` and `<!-- end of results -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from bench.client_cpu import HOST, ClientCpuReport
from bench.cookbook import PAGES as RECIPES
from bench.cookbook import CookbookReport
from bench.records import Cache, CaptureBenchReport, FanOutReport, FanOutSummary, Method, TreeReport
from bench.report import capture_cells, cost_cells, describe_host, ratio_to_shared, size_text
from bench.side_by_side import SideBySide
from coppice.model import GIB, MIB

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/benchmarks.md", *(f"docs/cookbook/{page}.md" for page in RECIPES))
_REGION = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """Return a table. The first `text_columns` are left-aligned, the others right-aligned."""
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    return "".join("| " + " | ".join(row) + " |\n" for row in (headings, rule, *rows))


def short_table(report: FanOutReport) -> str:
    """Return the README's table: one guest size, warm cache, smallest and largest count."""
    sizes = sorted({row.memory_bytes for row in report.summary})
    size = GIB if GIB in sizes else sizes[0]
    counts = sorted({row.count for row in report.summary})
    rows = [
        (
            str(row.count),
            f"**{row.method}**" if row.method is Method.SHARED else row.method,
            f"{row.answered_ms.p50:.0f} ms",
            f"{row.answered_ms.p90:.0f} ms",
            _ratio(report.summary, row),
            f"{row.unique_worked_bytes.p50 / MIB:.0f} MiB",
            f"{row.disk_written_bytes.p50 / MIB:.1f} MiB",
        )
        for count in (counts[0], counts[-1])
        for row in report.summary
        if (row.memory_bytes, row.count, row.cache) == (size, count, Cache.WARM)
    ]
    table = markdown(
        ("at once", "method", "answered (p50)", "p90", "x", "own memory each", "disk written each"),
        rows,
        text_columns=2,
    )
    return f"Guests of {size_text(size)}, {report.workload_bytes // MIB} MiB filled by each:\n\n{table}\n{describe_host(report.host)}.\n"


def fan_out_table(report: FanOutReport) -> str:
    """Return the table of all fan-out cases."""
    measured = any(row.available_bytes for row in report.summary)
    rows = [
        (
            size_text(row.memory_bytes),
            str(row.count),
            row.method,
            "" if row.method is Method.COLD else row.cache,
            f"{row.answered_ms.p50:.0f}",
            f"{row.answered_ms.p90:.0f}",
            f"{row.answered_ms.p99:.0f}",
            _ratio(report.summary, row),
            *cost_cells(row),
            *([f"{row.available_bytes.p50 / MIB:.1f}" if row.available_bytes else ""] if measured else []),
            str(row.answered_ms.samples),
        )
        for row in report.summary
    ]
    headings = (
        "RAM", "N", "method", "cache", "p50 ms", "p90", "p99", "x", "wall ms", "CPU ms VMM", "CPU ms host", "own MiB",
        "own MiB worked", "disk MiB", *(["MemAvailable MiB"] if measured else []), "samples",
    )  # fmt: skip
    left_out = "".join(
        f"* Skipped: {case.count} x {case.method} of {size_text(case.memory_bytes)}: {case.reason}.\n"
        for case in report.skipped
    )
    return (
        f"{describe_host(report.host)}.\n\n{markdown(headings, rows, text_columns=4)}{left_out and chr(10) + left_out}"
    )


def capture_table(report: CaptureBenchReport) -> str:
    """Return the table of all capture cases."""
    rows = [
        (
            size_text(row.memory_bytes),
            "just booted" if row.source == "boot" else f"fork, {row.dirtied_bytes // MIB} MiB filled",
            *capture_cells(row),
        )
        for row in report.summary
    ]
    headings = (
        "RAM",
        "source",
        "pause ms (p50)",
        "p99",
        "whole ms (p50)",
        "p99",
        "own pages MiB",
        "RAM written MiB",
        "samples",
    )
    return f"{describe_host(report.host)}.\n\n{markdown(headings, rows, text_columns=2)}"


def tree_table(report: TreeReport) -> str:
    """Return the table of both methods, level by level, with what each tree has in all."""
    rows: list[tuple[str, ...]] = []
    for tree in report.trees:
        rows += [
            (
                size_text(tree.memory_bytes),
                tree.method,
                str(level.number),
                f"{level.dirty_bytes / MIB:.1f}",
                f"{level.written_bytes / MIB:.1f}",
                f"{level.fork_ms:.0f}",
                f"{level.capture_ms:.0f}",
                f"{level.file_bytes / MIB:.1f}",
                "",
            )
            for level in tree.levels
        ]
        all_files = (f"{tree.disk_bytes / MIB:.0f}", f"{tree.cached_bytes / MIB:.0f}")
        base = f"all, base {tree.base_bytes / MIB:.0f} MiB"
        rows.append((size_text(tree.memory_bytes), tree.method, base, "", "", "", "", *all_files))
    headings = (
        "RAM",
        "memory",
        "level",
        "dirty MiB",
        "written MiB",
        "fork ms",
        "capture ms",
        "disk MiB",
        "page cache MiB",
    )
    return f"{describe_host(report.host)}.\n\n{markdown(headings, rows, text_columns=3)}"


def host_cpu_table(report: SideBySide) -> str:
    """Return the CPU time of each operation before and after, and the Standby forks per second."""
    rows = [
        (name, f"{each.before:.2f}", f"{each.after:.2f}", f"{report.host[name].before / report.host[name].after:.1f}")
        for name, each in report.host_ms.items()
    ]
    rows += [
        (f"{name}, per second", f"{each.before:.0f}", f"{each.after:.0f}", f"{each.after / each.before:.1f}")
        for name, each in report.forks_per_second.items()
    ]
    host = (
        f"{describe_host(report.facts)}; the fixed loop took {report.loop_ms.after:.0f} ms.\n\n" if report.facts else ""
    )
    return host + markdown(("operation", "before, ms", "after, ms", "x"), rows, text_columns=1)


def recipe_table(report: CookbookReport, page: str) -> str:
    """Return the times of a recipe's commands, and the tree of its forks."""
    (cost,) = (cost for cost in report.costs if cost.page == page)
    rows = [
        (f"`{step.command}`", f"{step.seconds:.1f}")
        for step in cost.steps
        if step.seconds >= 0.05 and not step.command.startswith("coppice rm")  # shorter ones begin a pipeline
    ]
    return f"{describe_host(cost.host)}.\n\n{markdown(('command', 's'), rows, text_columns=1)}\n```text\n{cost.tree}\n```\n"


def client_cpu_table(report: ClientCpuReport) -> str:
    """Return the CPU time of each command, on the data directory and through a server."""
    programs = {name: cost for name, cost in report.costs.items() if not name.startswith(f"coppice {HOST}")}
    rows: list[tuple[str, ...]] = []
    for name, cost in programs.items():
        remote = report.costs.get(f"coppice {HOST}{name.removeprefix('coppice ')}")
        rows.append(
            (
                f"`{name}`",
                f"{cost.median_ms:.0f}",
                f"{cost.least_ms:.0f}",
                f"{remote.median_ms:.0f}" if remote else "",
                f"{remote.least_ms:.0f}" if remote else "",
            )
        )
    headings = ("program", "ms (p50)", "least", "through a server (p50)", "least")
    host = f"{describe_host(report.host)}. " if report.host else ""
    about = f"{host}Python {report.python}, {report.samples} samples of each."
    return f"{about}\n\n{markdown(headings, rows, text_columns=1)}"


def _ratio(summary: Sequence[FanOutSummary], row: FanOutSummary) -> str:
    ratio = ratio_to_shared(summary, row)
    return "1" if ratio is None else f"{ratio:.1f}"


def filled(page: str) -> str:
    """Return the page with its tables replaced by the current results."""
    fan_out = msgspec.json.decode((ROOT / "benchmarks/fan-out.json").read_bytes(), type=FanOutReport)
    capture = msgspec.json.decode((ROOT / "benchmarks/capture.json").read_bytes(), type=CaptureBenchReport)
    firecracker = msgspec.json.decode((ROOT / "benchmarks/firecracker.json").read_bytes(), type=FanOutReport)
    all_in = msgspec.json.decode((ROOT / "benchmarks/all-in.json").read_bytes(), type=FanOutReport)
    kvm = msgspec.json.decode((ROOT / "benchmarks/kvm.json").read_bytes(), type=FanOutReport)
    host_cpu = msgspec.json.decode((ROOT / "benchmarks/host-cpu-side-by-side.json").read_bytes(), type=SideBySide)
    tree = msgspec.json.decode((ROOT / "benchmarks/tree.json").read_bytes(), type=TreeReport)
    recipes = msgspec.json.decode((ROOT / "benchmarks/cookbook.json").read_bytes(), type=CookbookReport)
    client_cpu = msgspec.json.decode((ROOT / "benchmarks/client-cpu.json").read_bytes(), type=ClientCpuReport)
    tables: dict[str, Callable[[], str]] = {
        **{f"cookbook-{name}": partial(recipe_table, recipes, name) for name in RECIPES},
        "short": lambda: short_table(fan_out),
        "fan-out": lambda: fan_out_table(fan_out),
        "all-in": lambda: fan_out_table(all_in),
        "firecracker": lambda: fan_out_table(firecracker),
        "capture": lambda: capture_table(capture),
        "tree": lambda: tree_table(tree),
        "host-cpu": lambda: host_cpu_table(host_cpu),
        "kvm": lambda: fan_out_table(kvm),
        "client-cpu": lambda: client_cpu_table(client_cpu),
    }
    return _REGION.sub(lambda found: f"{found[1]}\n{tables[found[2]]()}\n{found[3]}", (ROOT / page).read_text())


def main() -> int:
    """Write or check all pages."""
    stale = [page for page in PAGES if filled(page) != (ROOT / page).read_text()]
    for page in stale:
        if "--check" in sys.argv[1:]:
            sys.stderr.write(f"{page} is out of date: run `python -m bench.insert_results`\n")
        else:
            (ROOT / page).write_text(filled(page))
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
