"""Reports are complete JSON documents that can be read back, tables have the right ratio, and plots
are images.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from bench.plot import plot_capture, plot_fan_out
from bench.records import CaptureBenchReport, FanOutReport, Method, write_report
from bench.report import capture_table, fan_out_table, ratio_to_shared, size_text
from bench_samples import capture_report, fan_out_report
from coppice.errors import CoppiceError
from coppice.model import GIB, MIB
from documentation import ROOT


def test_reports_survive_json(tmp_path: Path) -> None:
    """The file contains every raw sample, and decodes to equal records."""
    first, second = tmp_path / "fan-out.json", tmp_path / "capture.json"
    write_report(fan_out_report(), first)
    write_report(capture_report(), second)
    assert msgspec.json.decode(first.read_bytes(), type=FanOutReport) == fan_out_report()
    assert msgspec.json.decode(second.read_bytes(), type=CaptureBenchReport) == capture_report()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capture.json", "fan-out.json"]


def test_a_report_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """A result of many minutes is not lost in a traceback, and no half-written file stays."""
    with pytest.raises(CoppiceError, match=r"write .*nowhere"):
        write_report(fan_out_report(), tmp_path / "nowhere" / "x.json")


def test_the_ratio_compares_methods_of_one_case() -> None:
    """A method is compared with the shared fork of the same count, size and cache; the shared fork
    itself has no ratio.
    """
    summary = fan_out_report().summary
    ratios = {row.method: ratio_to_shared(summary, row) for row in summary if row.count == 1}
    assert ratios == {Method.COLD: 10.0, Method.COPY: 3.0, Method.SPARSE: 2.0, Method.SHARED: None, Method.AHEAD: 0.8}
    alone = [row for row in summary if row.method is not Method.SHARED]
    assert ratio_to_shared(alone, alone[0]) is None


def _text(table: Table) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_tables_have_every_case_and_the_host() -> None:
    """A table that is pasted elsewhere still shows where its numbers come from."""
    fan_out, capture = fan_out_table(fan_out_report()), capture_table(capture_report())
    assert fan_out.row_count == 32
    assert capture.row_count == 3
    for table in (fan_out, capture):
        assert "Example CPU" in _text(table)
        assert "tcg" in _text(table)
    assert "10.0" in _text(fan_out)


def test_sizes_are_written_in_readable_units() -> None:
    """Whole GiB are written as GiB, all other sizes as MiB."""
    assert [size_text(size) for size in (256 * MIB, GIB, 4 * GIB)] == ["256 MiB", "1 GiB", "4 GiB"]


def test_plots_are_images(tmp_path: Path) -> None:
    """Both reports become complete PNG files, without a display."""
    plot_fan_out(fan_out_report(), tmp_path / "fan-out.png")
    plot_capture(capture_report(), tmp_path / "capture.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_matplotlib_is_named_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence that says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CoppiceError, match="pip install matplotlib"):
        plot_fan_out(fan_out_report(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_does_not_load_matplotlib_to_measure() -> None:
    """matplotlib takes a second and 50 MiB, so it is imported only for a plot."""
    code = "import sys, bench.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0
