"""Kill host processes in every operation over real machines of QEMU: nothing is lost and nothing is
left. `test_killed_hosts_of_fakes.py` does the same over fake machines.
"""

from __future__ import annotations

import pytest

from crash.kills import HostGround
from crash.kinds import RealKind
from crash.operation import Operation
from crash.operations import OPERATIONS
from crash.plan import chosen, kill_in


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", chosen(RealKind), ids=lambda operation: operation.name)
async def test_a_killed_host_loses_nothing_and_leaves_nothing(real_ground: HostGround, operation: Operation) -> None:
    """Every machine is complete or absent and answers as itself; nothing else is left or
    changed.
    """
    await kill_in(real_ground, operation)


@pytest.mark.timeout(1200)
async def test_a_host_killed_as_it_starts_a_tool_leaves_no_tool(real_ground: HostGround) -> None:
    """The tool is about to ask the kernel for its end with the host, and the host is already gone."""
    await real_ground.kill_at_first(OPERATIONS["restore-that-merges-disk-layers"], "started setpriv qemu")
