"""Plot results. Only this module imports matplotlib, when it draws a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.records import (
    Cache,
    CaptureBenchReport,
    CaptureSummary,
    FanOutReport,
    FanOutSummary,
    HostFacts,
    Method,
    Percentiles,
)
from bench.report import size_text
from coppice.errors import MissingTool
from coppice.linux.files import publish, temporary_beside
from coppice.model import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_COLORS = {
    Method.COLD: "#999999",
    Method.COPY: "#D55E00",
    Method.SPARSE: "#E69F00",
    Method.SHARED: "#009E73",
    Method.AHEAD: "#56B4E9",
}
_CAPTURE_COLORS = ("#999999", "#56B4E9", "#0072B2", "#004466", "#001122")
_DPI = 110


def plot_fan_out(report: FanOutReport, path: Path) -> None:
    """Plot time and memory of each method by N, with a warm page cache, as a PNG file at `path`.

    :raises MissingTool: matplotlib is not installed
    """
    sizes = sorted({row.memory_bytes for row in report.summary})
    metrics: list[tuple[str, float, Callable[[FanOutSummary], Percentiles]]] = [
        ("request to answer, ms", 1, lambda row: row.answered_ms),
        ("own memory after the workload, MiB", MIB, lambda row: row.unique_worked_bytes),
    ]
    figure, axes = _figure(len(metrics), len(sizes), report.host)
    for (label, unit, metric), line in zip(metrics, axes, strict=True):
        for size, axis in zip(sizes, line, strict=True):
            rows = [row for row in report.summary if row.memory_bytes == size and row.cache is Cache.WARM]
            _bars(axis, rows, metric, unit)
            axis.set_title(f"{size_text(size)} guest")
            axis.set_xlabel("machines at once")
        line[0].set_ylabel(f"{label} (log)")
        _same_scale(line, [metric(row).p50 / unit for row in report.summary])
    _legend(figure, axes[0][0])
    _save(figure, path)


def plot_capture(report: CaptureBenchReport, path: Path) -> None:
    """Plot pause and total time of a standby, by dirtied memory and RAM size, as a PNG file at
    `path`.

    :raises MissingTool: matplotlib is not installed
    """
    sizes = sorted({row.memory_bytes for row in report.summary})
    kinds = list(dict.fromkeys((row.source, row.dirtied_bytes) for row in report.summary))
    figure, axes = _figure(1, 2, report.host)
    metrics: list[tuple[str, Callable[[CaptureSummary], Percentiles]]] = [
        ("pause of the guest, ms", lambda row: row.pause_ms),
        ("whole standby, ms", lambda row: row.total_ms),
    ]
    width = 0.8 / len(kinds)
    for (label, metric), axis in zip(metrics, axes[0], strict=True):
        for index, (source, dirtied) in enumerate(kinds):
            rows = [
                row
                for size in sizes
                for row in report.summary
                if (row.memory_bytes, row.source, row.dirtied_bytes) == (size, source, dirtied)
            ]
            bars = axis.bar(
                [sizes.index(row.memory_bytes) + (index - (len(kinds) - 1) / 2) * width for row in rows],
                [metric(row).p50 for row in rows],
                width,
                color=_CAPTURE_COLORS[index % len(_CAPTURE_COLORS)],
                label="just booted" if source == "boot" else f"fork, {dirtied // MIB} MiB dirtied",
            )
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(len(sizes)), [size_text(size) for size in sizes])
        axis.set_xlabel("guest RAM")
        axis.set_title(f"{label}, median")
        axis.margins(y=0.12)
    _legend(figure, axes[0][0])
    _save(figure, path)


def _figure(rows: int, columns: int, facts: HostFacts) -> tuple[Figure, list[list[Axes]]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingTool(
            "matplotlib is not installed, so there is no plot", hint="install it with `pip install matplotlib`"
        ) from error
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.6), layout="constrained")
    figure.suptitle(
        f"{facts.cpu_model}, {facts.cpu_threads} threads, {facts.driver} {facts.vmm_version.split()[0]} ({facts.accel}), "
        f"{facts.filesystem}, {facts.date[:10]}",
        fontsize=9,
    )
    axes = [
        [figure.add_subplot(rows, columns, row * columns + column + 1) for column in range(columns)]
        for row in range(rows)
    ]
    for axis in (axis for line in axes for axis in line):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def _bars(
    axis: Axes, rows: Sequence[FanOutSummary], metric: Callable[[FanOutSummary], Percentiles], unit: float
) -> None:
    """Draw groups of bars on a logarithmic scale: the median, with a whisker to p90."""
    counts = sorted({row.count for row in rows})
    methods = [method for method in Method if any(row.method is method for row in rows)]
    width = 0.84 / max(1, len(methods))
    for index, method in enumerate(methods):
        of_method = [row for row in rows if row.method is method]
        heights = [metric(row).p50 / unit for row in of_method]
        bars = axis.bar(
            [counts.index(row.count) + (index - (len(methods) - 1) / 2) * width for row in of_method],
            heights,
            width,
            yerr=[[0.0] * len(heights), [(metric(row).p90 - metric(row).p50) / unit for row in of_method]],
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            color=_COLORS[method],
            label=method,
        )
        axis.bar_label(bars, labels=[_short(height) for height in heights], fontsize=6.5, padding=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])


def _same_scale(axes: Sequence[Axes], values: Sequence[float]) -> None:
    """Set the same limits for all, at whole decades: bars on a logarithmic scale have no zero."""
    positive = [value for value in values if value > 0] or [1.0]
    bottom, top = math.floor(math.log10(min(positive) * 0.99)), math.ceil(math.log10(max(positive) * 1.3))
    for axis in axes:
        axis.set_ylim(10**bottom, 10**top)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _save(figure: Figure, path: Path) -> None:
    temporary = temporary_beside(path)
    try:
        figure.savefig(temporary, format="png", dpi=_DPI)
        publish(temporary, path, sync=False)
    finally:
        temporary.unlink(missing_ok=True)
