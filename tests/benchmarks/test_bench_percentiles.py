"""Percentiles are measured values, and summaries keep cases apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.percentiles import nearest_rank, percentiles, summarize_fan_out
from bench.records import Cache, Method
from bench_samples import capture_report, fan_out_report, one_round


def test_the_nearest_rank_of_known_values() -> None:
    """The definition is checked by hand on 1 to 100 and on five values."""
    hundred = list(range(1, 101))
    assert [nearest_rank(hundred, percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    five = [15, 20, 35, 40, 50]
    assert [nearest_rank(five, percent) for percent in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0.001, 100))
def test_a_percentile_is_a_measured_value_that_covers_its_share(values: list[float], percent: float) -> None:
    """No value is interpolated: at least that share of the values is not larger, and with any
    smaller value the share would be too small.
    """
    found = nearest_rank(values, percent)
    share = len(values) * percent / 100
    assert found in values
    assert sum(value <= found for value in values) >= share
    assert sum(value < found for value in values) < share


@given(st.lists(st.floats(0, 1e9), min_size=1))
def test_percentiles_are_ordered(values: list[float]) -> None:
    """p50 <= p90 <= p99, all within the measured range, whatever the order of the samples."""
    found = percentiles(values)
    assert found == percentiles(reversed(values))
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    assert found.samples == len(values)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_no_percentile_of_nothing(values: list[float], percent: float) -> None:
    """A case without samples is an error, never a zero in a table."""
    with pytest.raises(ValueError, match="percentile"):
        nearest_rank(values, percent)


def test_a_summary_per_case() -> None:
    """Method, count, RAM and cache define a case; the machines of all its rounds are its samples,
    and the rounds give its wall times.
    """
    report = fan_out_report()
    cases = {(row.method, row.count, row.memory_bytes, row.cache) for row in report.summary}
    assert len(cases) == len(report.summary) == 2 * 2 * 8
    row = next(row for row in report.summary if row.method is Method.SHARED and row.count == 4)
    assert (row.rounds, row.answered_ms.samples, row.wall_ms.samples) == (2, 8, 2)
    assert row.answered_ms.p50 == 311.0
    assert row.host_cpu_ms.p50 == 40.0


def test_cold_and_warm_are_not_mixed() -> None:
    """A slow round with a cold cache does not affect the warm case."""
    rows = summarize_fan_out([one_round(Method.SHARED, 1, 0), one_round(Method.SHARED, 1, 500, cache=Cache.COLD)])
    assert [(row.cache, row.answered_ms.p99) for row in rows] == [(Cache.WARM, 300.0), (Cache.COLD, 800.0)]


def test_captures_are_separated_by_source_and_dirty_memory() -> None:
    """A freshly booted machine is a different case from a fork that dirtied nothing."""
    summary = capture_report().summary
    assert [(row.source, row.dirtied_bytes >> 20) for row in summary] == [("boot", 0), ("fork", 0), ("fork", 16)]
    assert [row.pause_ms.p50 for row in summary] == [11.0, 11.0, 11.0]
