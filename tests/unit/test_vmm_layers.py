"""Whether a driver may say that its VMM can map layers."""

from __future__ import annotations

import pytest

from coppice.vmm.layers import allows


@pytest.mark.parametrize(
    ("scope", "capable", "allowed"),
    [(0, False, True), (1, False, True), (2, False, False), (2, True, True), (3, True, False)],
)
def test_yama_decides_who_may_trace(scope: int, capable: bool, allowed: bool) -> None:
    """A VMM is a child of its restorer: scope 1 allows that, 2 only with CAP_SYS_PTRACE, 3 never."""
    assert allows(scope, capable=capable) == allowed
