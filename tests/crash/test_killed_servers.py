"""Kill servers in every operation that a client can repeat, over fake machines: the client gets its
result, the operation is carried out once, and nothing else is left.
"""

from __future__ import annotations

import pytest

from crash.operation import Operation
from crash.plan import kill_in, repeatable
from crash.served import ServedGround
from fakes.driver import PERSONALITIES


@pytest.fixture(scope="session", params=PERSONALITIES[:1])
def personality(request: pytest.FixtureRequest) -> str:
    """How fake machines keep their RAM. A server does not depend on it, so one kind is enough."""
    return str(request.param)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", repeatable(), ids=lambda operation: operation.name)
async def test_a_client_of_a_killed_server_gets_its_result(served_ground: ServedGround, operation: Operation) -> None:
    """The operation was carried out completely, and once."""
    await kill_in(served_ground, operation)
