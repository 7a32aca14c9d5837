"""The comparison of two checkouts: its arithmetic."""

from __future__ import annotations

from bench.host_cpu import Batch, HostCpuReport, Spent
from bench.side_by_side import compared, host_figures, shares


def test_a_figure_is_a_share_of_the_fixed_loop_of_its_run() -> None:
    """So a run on a host that was twice as slow gives the same figure."""
    report = HostCpuReport(
        python="3.11",
        samples=1,
        loop_ms=50.0,
        spent={"0": {"fork": Spent(median_ms=10.0, least_ms=9.0)}},
        batches={"0": [Batch(count=100, cpu_ms_per_fork=5.0, forks_per_second=200.0)]},
    )
    spent_ms, rates = host_figures(report)
    assert spent_ms == {"fork, 0 others": [10.0], "each of 100 Standby forks, 0 others": [5.0]}
    assert shares(report) == {"fork, 0 others": [0.2], "each of 100 Standby forks, 0 others": [0.1]}
    assert rates == {"100 Standby forks, 0 others": [200.0]}


def test_only_what_both_measured_is_compared() -> None:
    """An older checkout may lack a command."""
    found = compared([{"ls": [2.0]}, {"ls": [4.0]}], [{"ls": [1.0], "exec": [1.0]}, {"ls": [1.0], "exec": [1.0]}])
    assert {name: (each.before, each.after) for name, each in found.items()} == {"ls": (3.0, 1.0)}
