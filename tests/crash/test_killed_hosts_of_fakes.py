"""Kill host processes in every operation over fake machines of each personality: nothing is lost
and nothing is left. It is quick, and covers drivers that keep first-boot RAM in no file.
"""

from __future__ import annotations

import pytest

from crash.fake_kind import FakeKind
from crash.kills import HostGround
from crash.operation import Operation
from crash.plan import chosen, kill_in


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", chosen(FakeKind), ids=lambda operation: operation.name)
async def test_a_killed_host_loses_nothing_and_leaves_nothing(fake_ground: HostGround, operation: Operation) -> None:
    """Every machine is complete or absent and answers as itself; nothing else is left or
    changed.
    """
    await kill_in(fake_ground, operation)
